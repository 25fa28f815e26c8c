"""Read a checkpoint file into a plain state dict: find the container, remove prefixes and stray keys.

No code in the file is executed.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import sha256
from evm_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".ckpt", ".pth", ".pt", ".pth.tar", ".safetensors")
CONTAINERS = {
    "ema": ("ema_model", "model_ema", "state_dict", "model", "raw"),
    "raw": ("model", "raw", "state_dict"),
}
PREFIXES = ("module.", "_orig_mod.")
STRAY = ("total_ops", "total_params")  # buffers that the profiler thop leaves in a model
LISTED = 6  # number of keys of each kind that an error message shows
CONVERT_HINT = (
    "if you trust the file, convert it once:  python -c \"import torch; c = torch.load('{name}', weights_only=False); "
    "torch.save({{'state_dict': c.get('model_ema') or c.get('model') or c['state_dict']}}, 'clean.pth')\""
)


@dataclass
class RawCheckpoint:
    """A state dict without the prefixes of training tools, and facts about its file.

    container: key of the state dict in the file. dropped: keys that were removed.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    container: str
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path, weights: str = "ema") -> RawCheckpoint:
    """Read the checkpoint `path` (.ckpt .pth .pt .pth.tar .safetensors) without executing code.

    weights: `ema` takes averaged weights where the file has them, `raw` the other weights. Raises CheckpointError if
    the file is missing, empty, damaged or unsafe, or holds no state dict.
    """
    if not path.is_file():
        what = "is a directory, not a checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}", f"give a file: {' '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes)", "copy or download it again")
    if not path.name.endswith(SUFFIXES):
        raise CheckpointError(f"checkpoint {path}: unknown file type", f"supported types: {' '.join(SUFFIXES)}")
    try:
        digest = sha256(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        container = "safetensors"
    else:
        container, tensors = _container(path, _read_pickle(path), weights)
        metadata = {}
    raw = RawCheckpoint(path, {}, digest, container, metadata=metadata)
    _normalise_names(path, tensors, raw)
    return raw


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}", "copy or download it again") from error
    try:
        metadata = json.loads(header.get("evm_deploy", "{}"))
        _check_settings(metadata)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: metadata 'evm_deploy' is wrong: {error}") from error
    return tensors, metadata


def _check_settings(settings: Any) -> None:
    """Check the types that docs/checkpoints.md states; later code checks the values. Raises ValueError."""
    if not isinstance(settings, dict):
        raise ValueError("not a JSON object")
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("labels", "mean", "std"), list),
        "imgsz": (int, str),
        "crop_pct": (int, float),
        "interpolation": str,
    }
    for key, kind in kinds.items():
        if key in settings and (not isinstance(settings[key], kind) or isinstance(settings[key], bool)):
            raise ValueError(f"{key} cannot be {settings[key]!r}")
    if not all(isinstance(value, int | float) for key in ("mean", "std") for value in settings.get(key, [])):
        raise ValueError("mean and std must be lists of numbers")


def _read_pickle(path: Path) -> Any:
    import warnings

    import torch

    try:
        with warnings.catch_warnings():  # torch warns about old pickle protocols, but loads them
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe or "Unsupported" in str(error):
            name = unsafe[1] if unsafe else "objects other than tensors"
            raise CheckpointError(
                f"checkpoint {path} needs code to load ({name}); refused, no code was executed",
                CONVERT_HINT.format(name=path.name),
            ) from error
        raise CheckpointError(f"checkpoint {path} is not a torch checkpoint, or is damaged") from error
    except Exception as error:  # torch's readers raise errors of any type for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged: {reason}", "copy or download it again"
        ) from error


def _container(path: Path, content: Any, weights: str) -> tuple[str, dict[str, Tensor]]:
    """Return (key, state dict): the first dict of tensors under a known key, else ("file", the top-level dict).

    Raises CheckpointError if neither holds tensors.
    """
    import torch

    def tensors_of(value: Any) -> dict[str, Tensor] | None:
        if not isinstance(value, dict):
            return None
        found = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
        return found or None

    if isinstance(content, dict):
        for key in CONTAINERS[weights]:
            found = tensors_of(content.get(key))
            if found:
                return key, found
        found = tensors_of(content)
        if found:
            return "file", found
        keys = ", ".join(sorted(map(str, content))[:8])
        raise CheckpointError(f"checkpoint {path} holds no state dict; its keys: {keys}")
    raise CheckpointError(
        f"checkpoint {path} holds a {type(content).__name__}, not a state dict", "save model.state_dict() instead"
    )


def _normalise_names(path: Path, tensors: dict[str, Tensor], raw: RawCheckpoint) -> None:
    names = {key: key for key in tensors if key.rsplit(".", 1)[-1] not in STRAY}
    raw.dropped += [key for key in tensors if key not in names]
    names = _strip_prefixes(names)
    if any(name.startswith("backbone.") for name in names.values()):
        kept = {key: name for key, name in names.items() if name.startswith("backbone.")}
        raw.dropped += [key for key in names if key not in kept]
        names = _strip_prefixes({key: name.removeprefix("backbone.") for key, name in kept.items()})
    raw.tensors = {name: tensors[key] for key, name in names.items()}


def rename(raw: RawCheckpoint, patterns: Sequence[tuple[re.Pattern[str], str]]) -> RawCheckpoint:
    """Return the checkpoint with its keys renamed: the replacement of every pattern is applied, in order.

    Raises CheckpointError if two keys get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in raw.tensors.items():
        name = key
        for pattern, replacement in patterns:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise CheckpointError(f"checkpoint {raw.path}: two keys stand for '{name}', one of them is '{key}'")
        renamed[name] = tensor
    return replace(raw, tensors=renamed)


def some(keys: list[str]) -> str:
    """Return the first LISTED names as text, and the number of the others."""
    rest = f", and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + rest


def _strip_prefixes(names: dict[str, str]) -> dict[str, str]:
    """Remove a known prefix while every name begins with it; repeat for nested prefixes."""
    while names:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names.values())), None)
        if prefix is None:
            break
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    return names
