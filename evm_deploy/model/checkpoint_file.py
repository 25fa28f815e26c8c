"""Read the content of a checkpoint file: nested dicts and lists of tensors, as the training tool saved them.

No code in the file is executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shlex
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from evm_deploy._util.files import sha256
from evm_deploy.errors import CheckpointError, UsageError
from evm_deploy.model.factory import Factory
from evm_deploy.model.file_kinds import CUT, file_kind, of_python_code
from evm_deploy.model.openmmlab import LOG, TrainingSettings, logs_ignored

SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
ORIGIN = "evm_deploy_origin"  # key of a converted file's metadata: the checkpoint that it was made from
TRAINING = "evm_deploy_training"  # another: the `meta` that mmengine wrote into that checkpoint
MAX_INDEX_BYTES = 64 << 20
UNSAFE = "unsafe"  # code of the error for a file that only loads by running the code in it
FOLDERS = (  # a file that such a folder holds, name of the folder, hint
    (
        ".metadata",
        "a distributed checkpoint (FSDP)",
        "join it with  python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE",
    ),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed", "join it with the script zero_to_fp32.py that lies in it"),
    ("data.pkl", "an unpacked torch file", "give the file as torch.save wrote it"),
    ("manifest.json", "a bundle: already exported", "run it with  evm-run"),
)


@dataclass
class Content:
    """Content of a checkpoint file.

    value: dicts and lists of tensors and numbers. metadata: settings saved with the weights. origin: the file that this
    one was converted from. training: settings of the run of mmengine that wrote the file. notes: remarks on the
    reading, for users.
    """

    path: Path
    value: Any
    sha256: str
    metadata: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    notes: list[str] = field(default_factory=list)


def _instead(path: Path) -> str:
    """Return the hint for a path that does not exist; the name of a factory is recognised."""
    try:
        return of_python_code(Factory(str(path)).where)
    except UsageError:
        return "give the path of a checkpoint file"


def read_content(path: Path) -> Content:
    """Read the checkpoint file `path` without executing code. Its content decides the format, not its name.

    A shard, or the index of sharded weights, stands for all shards. Raises CheckpointError if the file is missing,
    empty, damaged, unsafe, or no checkpoint; the message says what it is.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        what = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}", _instead(path)) from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise _is_folder(path)
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"checkpoint {path} is a device or pipe, not a file", "save it to a file first")
    kind = file_kind(path)
    if kind == "index":
        return _joined(path, _shards_of_index(path))
    shards = _shards_of_part(path)
    return _joined(path, shards) if shards else _read(path, kind)


def _read(path: Path, kind: str) -> Content:
    try:
        digest = sha256(path)
        if kind == "safetensors":
            return _read_safetensors(path, digest)
        if kind == "torchscript":
            raise _unsafe(path, "is a TorchScript archive, which holds code")
        value = _read_pickle(path, kind)
        meta = value.get("meta") if isinstance(value, dict) else None
        return Content(path, value, digest, training=TrainingSettings.read(meta))
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error


def _is_folder(path: Path) -> CheckpointError:
    """Return the error for a folder given as a checkpoint: what the folder is, or the files in it to choose from."""
    try:
        names = sorted(each.name for each in path.iterdir())
    except OSError as error:
        return CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}")
    for name, what, hint in FOLDERS:
        if name in names:
            return CheckpointError(f"checkpoint {path} is a directory: {what}", hint)
    found = [name for name in names if name.lower().endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar"))]
    hint = f"give one of its files, such as {', '.join(found[:4])}" if found else "give a checkpoint file"
    return CheckpointError(f"checkpoint {path} is a directory, not a checkpoint", hint)


def _shards_of_index(path: Path) -> list[Path]:
    """Return the shards that an index file lists. Raises CheckpointError if the JSON is no such index."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("too large")
        index = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {str(name) for name in index["weight_map"].values()}
        if not names:
            raise ValueError("empty")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} is JSON text, and no index of sharded weights (it has no 'weight_map')",
            "give the file of the weights",
        ) from error
    if bad := [name for name in names if Path(name).name != name or "\\" in name or name.startswith(".")]:
        raise CheckpointError(f"checkpoint {path}: the index names files outside its folder: {min(bad)!r:.80}")
    return _present(path, [path.with_name(name) for name in sorted(names)])


def _shards_of_part(path: Path) -> list[Path]:
    """Return all shards of the checkpoint that the file `path` is a part of; none if it is not a part."""
    match = SHARD.fullmatch(path.name)
    if not match or int(match["count"]) < 2:
        return []
    index = path.with_name(f"{match['stem']}{match['suffix']}.index.json")
    if index.is_file():
        return _shards_of_index(index)
    count = match["count"]
    names = [f"{match['stem']}-{number:05d}-of-{count}{match['suffix']}" for number in range(1, int(count) + 1)]
    return _present(path, [path.with_name(name) for name in names])


def _present(path: Path, shards: list[Path]) -> list[Path]:
    missing = [each.name for each in shards if not each.is_file()]
    if missing:
        raise CheckpointError(
            f"checkpoint {path} is a part of {len(shards)} files (shards), and {len(missing)} are not beside it: "
            f"{', '.join(missing[:3])}",
            "put all shards into one folder",
        )
    return shards


def _joined(path: Path, shards: list[Path]) -> Content:
    """Read all shards into one flat state dict. Raises CheckpointError if two shards hold the same tensor."""
    parts = [_read(each, file_kind(each)) for each in shards]
    value: dict[Any, Any] = {}
    for part in parts:
        if not isinstance(part.value, dict):
            raise CheckpointError(f"checkpoint {part.path} is a shard that holds no state dict")
        if twice := value.keys() & part.value.keys():
            raise CheckpointError(f"checkpoint {path}: two shards hold the tensor {min(map(str, twice))!r:.80}")
        value |= part.value
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    metadata = {key: item for part in parts for key, item in part.metadata.items()}
    return Content(path, value, digest, metadata, notes=[f"joined from {len(parts)} shards"])


def _read_safetensors(path: Path, digest: str) -> Content:
    """Read a safetensors file through Python's own file: the library opens no name that is not UTF-8."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    try:
        value = dict(sorted(load(data).items()))  # the library's order changes from run to run
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, struct.error, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}", CUT) from error
    try:
        metadata = json.loads(header.get("evm_deploy", "{}"))
        _check_settings(metadata)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: metadata 'evm_deploy' is wrong: {error}") from error
    training = TrainingSettings.from_json(header.get(TRAINING, "{}"))
    return Content(path, value, digest, metadata, _origin(header.get(ORIGIN, "{}")), training)


def _origin(text: str) -> dict[str, Any]:
    """Return the origin of a converted file; empty if the text is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    keys = ("file", "sha256", "container", "weights")
    kept = {key: found[key] for key in keys if isinstance(found, dict) and isinstance(found.get(key), str)}
    return kept if len(kept) == len(keys) and kept["weights"] in ("ema", "raw") else {}


def _check_settings(settings: Any) -> None:
    """Check the types that docs/checkpoints.md states; later code checks the values. Raises ValueError."""
    if not isinstance(settings, dict):
        raise ValueError("not a JSON object")
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("labels", "mean", "std"), list),
        "imgsz": (int, str),
        "crop_pct": (int, float),
        **dict.fromkeys(("resize", "interpolation"), str),
    }
    for key, kind in kinds.items():
        if key in settings and (not isinstance(settings[key], kind) or isinstance(settings[key], bool)):
            raise ValueError(f"{key} cannot be {settings[key]!r}")
    if not all(isinstance(value, int | float) for key in ("mean", "std") for value in settings.get(key, [])):
        raise ValueError("mean and std must be lists of numbers")


def _read_pickle(path: Path, kind: str) -> Any:
    import warnings

    import torch

    try:
        # torch warns about old pickle protocols, but loads them; its zip reader opens no name that is not UTF-8
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                if LOG not in str(error):
                    raise
            file.seek(0)
            with logs_ignored():
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if kind == "pickle" and not saved_by_torch(path):
            raise _unsafe(path, "is a pickle that torch.save did not write") from error
        if not _needs_code(path, kind):
            raise CheckpointError(
                f"checkpoint {path} is not a torch checkpoint, or is truncated or damaged", CUT
            ) from error
        unsafe = re.search(r"(?:GLOBAL|type|class) ([\w.]*[a-zA-Z_]\w*\.\w+)", str(error))
        name = unsafe[1] if unsafe else "objects other than tensors"
        raise _unsafe(path, f"needs code to load ({name})") from error
    except Exception as error:  # torch's readers raise errors of any type for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is truncated or damaged: {reason}", CUT) from error


def _unsafe(path: Path, why: str) -> CheckpointError:
    """Return the error for a file that only loads by running the code in it."""
    file = f"./{path}" if str(path).startswith("-") else str(path)
    return CheckpointError(
        f"checkpoint {path} {why}; refused, no code was executed",
        f"if you trust its author, convert it once:  evm-export convert {shlex.quote(file)} --trust",
        code=UNSAFE,
    )


def saved_by_torch(path: Path) -> bool:
    """Test whether a pickle begins as torch.save began its files before version 1.6."""
    from torch.serialization import MAGIC_NUMBER

    with path.open("rb") as file:
        return MAGIC_NUMBER.to_bytes(10, "little") in file.read(64)


def _needs_code(path: Path, kind: str) -> bool:
    """Test whether the pickle in a file is whole, so that it was refused for what it holds. Executes none of it."""
    import pickletools
    import zipfile

    try:
        with path.open("rb") as file:
            stream: IO[bytes] = file
            if kind == "torch":
                with zipfile.ZipFile(file) as archive:
                    name = next(each for each in archive.namelist() if each.endswith("/data.pkl"))
                    stream = io.BytesIO(archive.read(name))
            return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(stream))
    except Exception:  # a damaged pickle or zip
        return False
