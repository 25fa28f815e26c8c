"""Core ML packages on disk: one program, or several functions that share weights. Bytes are reproducible."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evm_deploy._util.files import copy_folder
from evm_deploy._util.silence import silence_libraries
from evm_deploy.runtimes.coreml.tools import coremltools


def save(model: Any, path: Path) -> None:
    """Write `model`, coremltools' MLModel, as a package with one function, `main`."""
    with tempfile.TemporaryDirectory() as folder, silence_libraries():
        fresh = Path(folder) / path.name
        model.save(str(fresh))
        _write(fresh, path, model.get_spec().description.metadata)


def save_functions(models: Mapping[str, Any], path: Path) -> None:
    """Write MLModels as the functions of one package, for iOS18. The first is the default. Equal weights are shared."""
    tools = coremltools().utils
    with tempfile.TemporaryDirectory() as folder, silence_libraries():
        functions = tools.MultiFunctionDescriptor()
        for name, model in models.items():
            single = Path(folder) / f"{name}.mlpackage"
            model.save(str(single))
            functions.add_function(str(single), "main", name)
        functions.default_function_name, first = next(iter(models.items()))
        fresh = Path(folder) / path.name
        tools.save_multifunction(functions, str(fresh))
        _write(fresh, path, first.get_spec().description.metadata)


def _write(fresh: Path, path: Path, metadata: Any) -> None:
    """Copy the package `fresh` to `path`, with `metadata` and fixed item names.

    coremltools drops the metadata of a package of several functions, and names the items of any package at random.
    """
    copy_folder(fresh, path)
    spec = coremltools().utils.load_spec(str(fresh))
    spec.description.metadata.CopyFrom(metadata)
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    file.write_bytes(spec.SerializeToString(deterministic=True))
    manifest = path / "Manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    items = content["itemInfoEntries"]
    names = {key: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for key, item in items.items()}
    content["itemInfoEntries"] = {names[key]: item for key, item in items.items()}
    content["rootModelIdentifier"] = names[content["rootModelIdentifier"]]
    manifest.write_text(json.dumps(content, indent=4, sort_keys=True), encoding="utf-8")
    # Opening a package rewrites this file in the opener's format. Open the package now, before files are hashed.
    coremltools().utils.load_spec(str(path))
