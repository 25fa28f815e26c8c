"""Readers of untrusted files, which fuzz.py tests with broken files."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"


@dataclass(frozen=True)
class Target:
    """A reader to fuzz: `read(path)` reads a file named `name`.

    structured: the file is JSON, and mutations replace its values. bundle: the file's folder is a bundle for this
    target. prepare(folder): writes further files that the reader needs, and returns good inputs beside the corpus.
    """

    name: str
    read: Callable[[Path], object]
    structured: bool = False
    bundle: str = ""
    prepare: Callable[[Path], list[bytes]] | None = None


def _manifest(path: Path) -> object:
    from evm_deploy.bundle.manifest import Manifest

    return Manifest.read(path.parent)


def _bundle(path: Path) -> object:
    """Open, run and self-test the bundle that contains the file."""
    from evm_deploy.bundle.loaded import load

    with load(path.parent) as model:
        found = model.predict([path.parent / "selftest" / "picture.png"])
        assert all(0 <= each.score <= 1 for row in found for each in row), found
        return model.selftest()


def bundle_into(folder: Path, target: str) -> None:
    """Export the demo for a target into `folder`."""
    from evm_deploy.demo import CHECKPOINT
    from evm_deploy.export.pipeline import export
    from evm_deploy.export.plan import ExportPlan

    with tempfile.TemporaryDirectory() as out:
        shutil.copytree(export(CHECKPOINT, ExportPlan(target), out).path, folder, dirs_exist_ok=True)


def rehash(bundle: Path, name: str) -> None:
    """Update the hash and size of a file in the manifest."""
    from evm_deploy._util.files import sha256

    file, manifest = bundle / name, json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][name] = {"sha256": sha256(file), "size_bytes": file.stat().st_size}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _read(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(folder / name).read_bytes()]


def _selftest(path: Path) -> object:
    """Write the tensors of a self-test that the JSON file describes into a valid bundle, then open and test it."""
    from safetensors.numpy import save_file

    from evm_deploy.errors import BundleError

    try:
        described = json.loads(path.read_bytes())
        files = {f: {n: np.ones(shape, dtype) for n, (dtype, shape) in t.items()} for f, t in described.items()}
        assert files.keys() == {f"selftest/{name}.safetensors" for name in ("probes", "scans")}
        assert all(array.nbytes < 1 << 24 for arrays in files.values() for array in arrays.values())
        for file, arrays in files.items():
            save_file(arrays, path.parent / file)
    except Exception as error:
        raise BundleError(f"no tensors are described: {error}") from error
    for file in files:
        rehash(path.parent, file)
    return _bundle(path)


def _described_selftest(folder: Path) -> list[bytes]:
    from safetensors.numpy import load_file

    files = {
        f"selftest/{name}.safetensors": folder / "selftest" / f"{name}.safetensors" for name in ("probes", "scans")
    }
    described = {
        name: {key: [str(value.dtype), list(value.shape)] for key, value in load_file(path).items()}
        for name, path in files.items()
    }
    return [json.dumps(described).encode()]


def _package(path: Path) -> object:
    """Put the program of a Core ML package into a valid bundle, then open and test it in the MIL runtime."""
    shutil.copyfile(path, path.parent / PROGRAM)
    rehash(path.parent, PROGRAM)
    return _bundle(path)


def _archive(path: Path) -> object:
    from evm_deploy.bundle.archive import unpack

    into = path.parent / "unpacked"
    try:
        folder = unpack(path, into)
        outside = [file for file in path.parent.rglob("*") if file != path and into not in (file, *file.parents)]
        assert not outside, f"written outside: {outside}"
        return folder
    finally:
        shutil.rmtree(into, ignore_errors=True)


def _checkpoint(path: Path) -> object:
    from evm_deploy.model.families import load_checkpoint

    return load_checkpoint(path)


def _tiny_network(depth: int) -> dict[str, Any]:
    """Return the state dict of the smallest possible network, with `depth` scan blocks."""
    import torch

    from evm_deploy.model.efficientvmamba.network import Architecture, EfficientVMamba

    torch.manual_seed(0)
    architecture = Architecture(dim=8, depths=(depth, 0, 0, 0), num_classes=2, d_state=1, dt_ranks=(1, 1))
    return EfficientVMamba(architecture).state_dict()


def _saved_by_torch(folder: Path) -> list[bytes]:
    """Save tiny networks in both formats of torch. The older format has no checksums, so that mutations are read."""
    import torch

    files = []
    for depth in (0, 1):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save({"model": _tiny_network(depth)}, buffer, _use_new_zipfile_serialization=zipped)
            files.append(buffer.getvalue())
    return files


def _saved_by_safetensors(folder: Path) -> list[bytes]:
    from safetensors.torch import save

    settings = {"labels": ["a", "b"], "imgsz": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    return [save(_tiny_network(depth), {"evm_deploy": json.dumps(settings)}) for depth in (0, 1)]


def _image(path: Path) -> object:
    from evm_deploy.data.preprocessing import Preprocessing

    return Preprocessing((64, 64)).pixels(path)


def _table(path: Path) -> object:
    from evm_deploy.calib.table import CalibrationTable

    return CalibrationTable.from_json(path.read_bytes().decode("utf-8", "surrogateescape"))


def _record(path: Path) -> object:
    """Read a record and render it with all outputs of evm-report."""
    from evm_deploy.report.collect import candidates, collect
    from evm_deploy.report.page import page
    from evm_deploy.report.table import grouped
    from evm_deploy.report.write import markdown, table_csv

    groups = grouped(candidates(collect([path])))
    return page(groups), markdown(groups), table_csv(groups)


def _fleet(path: Path) -> object:
    from evm_deploy.bench.record import Settings
    from evm_deploy.bench.remote.fleet import read_fleet
    from evm_deploy.bench.remote.hosts import HostOptions
    from evm_deploy.bench.sweep import Sweep

    return read_fleet(path, HostOptions(), Sweep((), (None,), (None,), (1,), Settings(), path.parent))


def _sweep(path: Path) -> object:
    from evm_deploy.sweep.plan import read_sweep

    return read_sweep(path)


def _profile(path: Path) -> object:
    from evm_deploy.devices.profiles import find_profile

    return find_profile(str(path))


def _config(path: Path) -> object:
    from evm_deploy.commands.config import read_config
    from evm_deploy.commands.export_flags import export_parser

    return read_config(path, export_parser())


def _perf_test(path: Path) -> object:
    from evm_deploy.bench.remote.perf_test import read

    printed, _, result = path.read_bytes().decode("utf-8", "replace").partition("====\n")
    return read(printed, result)


def _listed(path: Path) -> object:
    """Read a list of images, or an .npz file."""
    from evm_deploy.data.sources import find_images

    return find_images(path)


def _two_images(folder: Path) -> list[bytes]:
    """Write two images; return lists of them with class numbers, with class names, and in spreadsheets' formats."""
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 8), "#" + name[0] * 6).save(folder / name)
    return [b"path,class\na.png,0\nb.png,1\n", b"\xef\xbb\xbfa.png,cat\r\nb.png,dog\r\n", b'"a.png",0\n./b.png,1\n']


def _labelled(path: Path) -> object:
    from evm_deploy.data.images import labelled_images
    from evm_deploy.data.preprocessing import Preprocessing

    return labelled_images(path, Preprocessing((64, 64)), 2).all()


TARGETS = {
    "manifest": Target("manifest.json", _manifest, structured=True),
    "bundle": Target("manifest.json", _bundle, structured=True, bundle="onnx", prepare=_read("manifest.json")),
    "selftest": Target("tensors.json", _selftest, structured=True, bundle="onnx", prepare=_described_selftest),
    "package": Target("program", _package, bundle="coreml", prepare=_read(PROGRAM)),
    "zip": Target("bundle.zip", _archive),
    "checkpoint": Target("net.pth", _checkpoint, prepare=_saved_by_torch),
    "safetensors": Target("net.safetensors", _checkpoint, prepare=_saved_by_safetensors),
    "image": Target("image", _image),
    "calibration": Target("table.json", _table, structured=True),
    "record": Target("record.json", _record, structured=True),
    "fleet": Target("fleet.toml", _fleet),
    "sweep": Target("sweep.toml", _sweep),
    "profile": Target("profile.toml", _profile),
    "config": Target("evm.toml", _config),
    "perf_test": Target("printed.txt", _perf_test),
    "listed": Target("images.txt", _listed),
    "npz": Target("images.npz", _listed),
    "labelled": Target("val.csv", _labelled, prepare=_two_images),
}
