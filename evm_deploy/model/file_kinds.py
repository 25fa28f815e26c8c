"""Recognise a file by its content: checkpoints by their container format, other files by a name that people know.

No torch is imported and no code in the file is executed.
"""

from __future__ import annotations

import codecs
import re
import zipfile
from pathlib import Path

from evm_deploy._util.text import command
from evm_deploy.errors import CheckpointError

HEAD = 4096  # bytes that decide
AGAIN = "download it again, and look at the address: sites answer with such a page in place of a file"
STATE = "save model.state_dict() with torch.save or safetensors, and give that file"
UNPACK = "unpack it, and give the checkpoint that is inside"
CUT = "copy or download it again"
# (start of the content, name, hint): formats that begin with a fixed signature
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/", "a git-lfs pointer: text that stands for the file", "run  git lfs pull"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it", "checkpoints of PyTorch are supported"),
    (b"\x93NUMPY", "a numpy array (.npy)", STATE),
    (b"GGUF", "a GGUF file, as llama.cpp reads it", "give the checkpoint that it was made from"),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a rar archive", UNPACK),
    (b"\x89PNG\r\n", "a PNG image", "give a checkpoint; images are for evm-run"),
    (b"\xff\xd8\xff", "a JPEG image", "give a checkpoint; images are for evm-run"),
    (b"%PDF", "a PDF document", "give a checkpoint"),
    (b"ftrt", "an engine that is already built", "give the checkpoint that it was made from"),
    (b"ptrt", "an engine that is already built", "give the checkpoint that it was made from"),
)
ONNX = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]")  # field ir_version, then another field
SAFETENSORS = re.compile(rb".{6}\x00\x00\s*\{", re.DOTALL)  # length of the header, then its JSON
PICKLE = re.compile(rb"\x80[\x02-\x05]|\(dp0\n|\}q\x00")  # protocols 2 to 5; a dict in protocol 0 and 1
MARKUP = re.compile(rb"\s*<(!doctype html|html|head|body|script|!--)", re.IGNORECASE)


def file_kind(path: Path) -> str:
    """Return the format of the file `path`, whatever its name is: safetensors, torch, torchscript, pickle or index.

    index: JSON that may list the shards of a checkpoint. pickle: also torch's format before version 1.6.
    Raises CheckpointError that says what the file is, if it is of a format that holds no weights that can be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes)", CUT)
    if not head.strip(b"\0"):
        raise CheckpointError(f"checkpoint {path} is damaged: it begins with {len(head)} zero bytes", CUT)
    text = head.removeprefix(codecs.BOM_UTF8)
    for signature, name, hint in SIGNATURES:
        if text.startswith(signature):
            raise _not_a_checkpoint(path, name, hint)
    if SAFETENSORS.match(head):
        return "safetensors"
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if head[257:262] == b"ustar":
        raise _not_a_checkpoint(path, "a tar archive", UNPACK)
    if PICKLE.match(head):
        return "pickle"
    if ONNX.match(head):
        raise _not_a_checkpoint(path, "an ONNX model: already exported", "give the checkpoint that it was made from")
    if MARKUP.match(text):
        raise _not_a_checkpoint(path, "a page of HTML", AGAIN)
    return _text_kind(path, head)


def of_python_code(factory: str) -> str:
    """Return the hint for `factory`, a name such as `file.py:make` that was given in place of a checkpoint."""
    return f"a network of Python code:  {command('evm-export', '--model', factory)}"


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged: its zip has no directory", CUT) from error
    inner = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inner:
        return "torchscript"
    if "data.pkl" in inner:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        raise _not_a_checkpoint(path, "an archive of numpy arrays (.npz)", STATE)
    if "manifest.json" in inner or "manifest.json" in names:
        raise _not_a_checkpoint(path, "a bundle: already exported", "run it with  evm-run")
    if any("serialized_exported_program" in name or name.startswith("archive/models/") for name in names):
        raise _not_a_checkpoint(path, "a program of torch.export (.pt2)", STATE)
    listed = ", ".join(names[:3]) or "nothing"
    raise _not_a_checkpoint(path, f"a zip archive that torch did not write; it holds {listed}", UNPACK)


def _text_kind(path: Path, head: bytes) -> str:
    try:
        text = head.decode("utf-8-sig") if len(head) < HEAD else head[:-3].decode("utf-8-sig", "ignore")
    except UnicodeDecodeError:
        text = ""
    if text and all(each.isprintable() or each.isspace() for each in text):
        start = text.lstrip()[:1]
        if start == "{":
            return "index"
        if start == "<":
            raise _not_a_checkpoint(path, "an XML file", "give a checkpoint")
        if path.suffix == ".py":
            raise _not_a_checkpoint(path, "Python code", of_python_code(f"{path}:FACTORY"))
        raise CheckpointError(
            f"checkpoint {path}: unknown file type: plain text, not a torch checkpoint, or a damaged one", CUT
        )
    raise CheckpointError(
        f"checkpoint {path}: unknown file type: neither a torch checkpoint nor safetensors, or damaged; it begins with "
        f"{head[:8]!r}",
        CUT,
    )


def _not_a_checkpoint(path: Path, name: str, hint: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is {name}, not a checkpoint", hint)
