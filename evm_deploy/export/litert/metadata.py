"""Metadata of a TFLite file as TensorFlow's libraries read them: names, colours, size, and a file of labels.

The format is `metadata_schema.fbs` of tflite-support, version M001: a FlatBuffer of its own in the buffer METADATA.
The files that it names are a zip behind the model, in the same file.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from evm_deploy.data.reading import MODES
from evm_deploy.tasks.classification import LOGITS, PROBABILITIES
from evm_deploy.tasks.segmentation import LABEL_MAP

METADATA = "TFLITE_METADATA"
IDENTIFIER = b"M001"
LABELS_FILE = "labels.txt"
PARSER = "1.0.0"  # oldest parser that knows these fields
COLOURS = {"RGB": 1, "L": 2}  # ColorSpaceType
IMAGE = 2  # of the union ContentProperties
AXIS_LABELS, VALUE_LABELS = 2, 3  # AssociatedFileType: what each value is for; what each number means
LABELLED = {LOGITS: AXIS_LABELS, PROBABILITIES: AXIS_LABELS, "labels": VALUE_LABELS, LABEL_MAP: VALUE_LABELS}
MEANING = {
    LOGITS: "score of each class before the softmax",
    PROBABILITIES: "probability of each class",
    "labels": "class of each detection, -1 for none",
    LABEL_MAP: "class of each pixel",
}
EPOCH = (1980, 1, 1, 0, 0, 0)  # equal exports give equal files


class Tables:
    """Builder of FlatBuffers tables without generated classes. A field is its number in the table."""

    def __init__(self) -> None:
        import flatbuffers

        self.builder = flatbuffers.Builder(1024)

    def text(self, value: str) -> int:
        """Add a string."""
        return int(self.builder.CreateString(value))

    def many(self, items: Sequence[int]) -> int:
        """Add a vector of tables or strings."""
        self.builder.StartVector(4, len(items), 4)
        for item in reversed(items):
            self.builder.PrependUOffsetTRelative(item)
        return int(self.builder.EndVector())

    def table(
        self,
        refs: Mapping[int, int],
        *,
        bytes_: Mapping[int, int] | None = None,
        uints: Mapping[int, int] | None = None,
    ) -> int:
        """Add a table. refs: fields that are strings, vectors or tables. bytes_, uints: fields that are numbers."""
        fields = {*refs, *(bytes_ or {}), *(uints or {})}
        self.builder.StartObject(max(fields) + 1)
        for place, value in refs.items():
            self.builder.PrependUOffsetTRelativeSlot(place, value, 0)
        for place, value in (uints or {}).items():
            self.builder.PrependUint32Slot(place, value, 0)
        for place, value in (bytes_ or {}).items():
            self.builder.PrependInt8Slot(place, value, 0)
        return int(self.builder.EndObject())

    def finish(self, root: int) -> bytes:
        """Return the FlatBuffer."""
        self.builder.Finish(root, IDENTIFIER)
        return bytes(self.builder.Output())


def model_metadata(
    facts: Mapping[str, str],
    inputs: Mapping[str, tuple[tuple[int, ...], str]],
    outputs: Sequence[str],
    *,
    labels: bool,
) -> bytes:
    """Return the buffer METADATA.

    facts: metadata of the hub graph. inputs: name -> shape and dtype; outputs: names; both in the subgraph's order.
    labels: whether the file carries LABELS_FILE.
    """
    t = Tables()
    read = [_input(t, name, shape, dtype) for name, (shape, dtype) in inputs.items()]
    written = [_output(t, name, labels and name in LABELLED) for name in outputs]
    subgraph = t.table({0: t.text("main"), 2: t.many(read), 3: t.many(written)})
    kind = " ".join(facts[key] for key in ("variant", "family") if facts.get(key))
    fields = {
        0: t.text(facts.get("model", "")),
        1: t.text(f"{kind}, exported by evm-deploy"),
        2: t.text(facts.get("checkpoint_sha256", "")[:16]),
        3: t.many([subgraph]),
        7: t.text(PARSER),
    }
    return t.finish(t.table(fields))


def _input(t: Tables, name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Add the TensorMetadata of an input: an image if it is one of pixels."""
    pixels = dtype == "uint8" and len(shape) == 4
    mode = MODES.get(shape[-1]) if pixels else None
    meaning = "pixels 0..255; mean and std are in the model" if pixels else "normalised values, channels first"
    if mode not in COLOURS:
        return t.table({0: t.text(name), 1: t.text(meaning)})
    size = t.table({}, uints={0: shape[2], 1: shape[1]})
    image = t.table({1: size}, bytes_={0: COLOURS[mode]})
    content = t.table({1: image}, bytes_={0: IMAGE})
    return t.table({0: t.text(name), 1: t.text(meaning), 3: content})


def _output(t: Tables, name: str, labelled: bool) -> int:
    """Add the TensorMetadata of an output, with the file of labels if it has one."""
    fields: dict[int, Any] = {0: t.text(name), 1: t.text(MEANING.get(name, name))}
    if labelled:
        file = t.table({0: t.text(LABELS_FILE), 1: t.text("class names, one per line")}, bytes_={2: LABELLED[name]})
        fields[6] = t.many([file])
    return t.table(fields)


def with_labels(model: bytes, labels: Sequence[str]) -> bytes:
    """Return a TFLite file with LABELS_FILE in a zip behind the model, where TensorFlow's libraries look for it."""
    file = io.BytesIO(model)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(LABELS_FILE, EPOCH), "\n".join(labels) + "\n")
    return file.getvalue()
