"""Convert a checkpoint of any layout to a safetensors file: the weights of one network, under their own names."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.files import write_output
from evm_deploy.errors import CheckpointError
from evm_deploy.model.checkpoint_file import ORIGIN, TRAINING, UNSAFE, Content, read_content
from evm_deploy.model.families import find_network
from evm_deploy.model.openmmlab import TrainingSettings
from evm_deploy.model.state_dict import RawCheckpoint
from evm_deploy.model.trusted import read_trusted

if TYPE_CHECKING:
    from torch import Tensor


def convert(
    path: Path,
    out: Path,
    *,
    weights: str = "ema",
    drop: Sequence[str] = (),
    half: bool = False,
    trust: bool = False,
    force: bool = False,
) -> RawCheckpoint:
    """Write the weights of the network in the checkpoint `path` to the safetensors file `out`, and return them.

    weights, drop: as for `load_checkpoint`. half: round weights to float16, half the bytes. trust: if the file only
    loads by running code in it, RUN THAT CODE. force: replace an existing file. The new file says where it comes from
    and which weights it holds. Raises CheckpointError, also for a weight that float16 cannot hold.
    """
    if not out.name.lower().endswith(".safetensors"):
        raise CheckpointError(f"{out} is no name for a safetensors file", "end the name of -o with .safetensors")
    if os.path.lexists(out) and out.resolve() == path.resolve():
        raise CheckpointError(f"{out} is the checkpoint itself, which is not replaced", "give another name with -o")
    if os.path.lexists(out) and (not force or out.is_dir()):
        raise CheckpointError(f"{out} exists already", "give another name with -o, or replace a file with --force")
    _, raw = find_network(_content(path, trust), weights, drop)
    if not raw.origin:
        facts = raw.facts()
        raw.origin = {key: facts[key] for key in ("file", "sha256", "container", "weights")}
    if half:
        raw.tensors = {name: _rounded(path, name, tensor) for name, tensor in raw.tensors.items()}
        raw.notes.append("weights are rounded to float16")
    _write(out, raw)
    return raw


def _content(path: Path, trust: bool) -> Content:
    try:
        return read_content(path)
    except CheckpointError as error:
        if not trust or error.code != UNSAFE:
            raise
    return read_trusted(path)


def _rounded(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Round a tensor of floating point numbers to float16. Raises CheckpointError if a number becomes infinite."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if bool((half.isinf() & ~tensor.isinf()).any()):
        largest = float(tensor.abs().max())
        raise CheckpointError(
            f"checkpoint {path}: {name} reaches {largest:g}, the largest float16 is 65504", "convert without --half"
        )
    return half


def _write(out: Path, raw: RawCheckpoint) -> None:
    from safetensors.torch import save

    tensors = {name: tensor.contiguous().clone() for name, tensor in raw.tensors.items()}
    settings = {"evm_deploy": json.dumps(raw.metadata)} if raw.metadata else {}
    if raw.training != TrainingSettings():
        settings[TRAINING] = raw.training.to_json()
    content = save(tensors, metadata={"format": "pt", ORIGIN: json.dumps(raw.origin), **settings})
    try:
        write_output(out, content)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}", "give a name with -o") from error
