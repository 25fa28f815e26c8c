"""Golden detectors of mmdet as checkpoint files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.conftest import GOLDEN

sys.path.insert(0, str(GOLDEN / "detseg"))
import detseg

from evm_deploy.data.geometry import Geometry

CASES = [name for name in detseg.names() if name.startswith("retina")]
CONFIG = (GOLDEN / "detseg" / "cfg_retinanet.txt").read_text()
CLASSES = ("person", "自転車", "λεωφορείο", "traffic light", "🦆")


def case(name: str) -> SimpleNamespace:
    return detseg.case(name)


def tensors(given: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in given.state.items()}


def save(path: Path, state: dict[str, torch.Tensor], meta: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write a checkpoint as mmdet's publishing tool does."""
    torch.save({"meta": meta or {}, "state_dict": state}, path, **options)
    return path


def saved(folder: Path, name: str = "retina_micro", **changes: Any) -> Path:
    """Write the file of a golden case; changes: keys whose tensors are replaced, or left out for None."""
    state = {**tensors(case(name)), **changes}
    return save(folder / f"{name}.pth", {key: value for key, value in state.items() if value is not None})


def places(given: SimpleNamespace) -> list[Geometry]:
    """Return the place of each image of a case in its padded input."""
    size = tuple(given.inputs.shape[2:])
    return [Geometry(tuple(meta["ori_shape"]), tuple(meta["img_shape"]), size, (0, 0)) for meta in given.metas]
