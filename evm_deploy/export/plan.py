"""Settings of an export: one frozen dataclass, complete before work starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from evm_deploy._util.text import one_of, size_text
from evm_deploy._util.values import Converter, convert_fields, listed, path_text, text, whole, wrong
from evm_deploy.bundle.manifest import Decision
from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.data.preprocessing import MAX_SIDE
from evm_deploy.errors import UsageError
from evm_deploy.export.preprocessing import CONVERTERS as PREPROCESSING_CONVERTERS
from evm_deploy.export.preprocessing import make_preprocessing
from evm_deploy.runtimes.base import Batch
from evm_deploy.toolchain.platforms import PLATFORMS

HEADS = ("logits", "probs", "features", "raw", "detections", "label_map")
INPUTS = ("image", "tensor")
PRECISION_ALIASES = {"w8a16": "w8"}  # the field's name for int8 weights with float activations
PRECISIONS = ("fp32", "fp16", "int8", "int8-fp16", "w8")
CALIBRATED = ("int8", "int8-fp16")  # int8-fp16: float16 outside the int8 layers
QUANTIZED = (*CALIBRATED, "w8")
HOW_TO_CALIBRATE = ("calib_images", "calib_method", "force_calib")  # fields without effect on a float export
MIN_TARGETS = ("iOS16", "iOS17", "iOS18")
SCANS = ("auto", "plugin", "aot", "portable", "unrolled")
NO_LIBRARY = ("portable", "unrolled")  # lowerings that need none
MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 18, 23, 20
# int8: finds gross faults only; the accuracy check decides. w8: logits of correct exports differ by 0.003 (trained T)
# to 0.016 (seeded T, S, B), feature maps by up to 0.04. The accuracy check without labels also allows a 10 % error.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5, "int8-fp16": 0.5, "w8": 0.1}
# Least share of detections, or of pixels, that the float model gives too. Random weights put many boxes at the limit
# of the NMS.
AGREEMENTS = {"fp32": 0.99, "fp16": 0.9}
# Relative to the artifact's own outputs. int8: integer kernels round differently. w8 computes in float32, like fp32.
SELFTEST_TOLERANCES = {"int8": 0.05, "int8-fp16": 0.05, "w8": TOLERANCES["fp32"]}
CALIB_METHODS = ("minmax", "percentile", "mse", "entropy", "auto")
SMOOTHINGS = ("auto", "on", "off")
WEIGHT_BITS = (7, 8)
DEFAULT_WEIGHT_BITS = 8
MAX_DROP = 1.0
DEFAULT_IMGSZ = (224, 224)


@dataclass(frozen=True)
class ExportPlan:
    """Settings of one export to one target. None means: the checkpoint's value, else the target's default.

    All fields are checked when the plan is made, and converted to the annotated types: paths may be Path objects,
    numbers numpy scalars, tuples lists or arrays, sizes and batches also a number or the text of the flag. Raises
    UsageError.
    imgsz: (H, W) pixels. more_imgsz: further sizes that the same artifact takes (Core ML).
    tol: largest accepted difference from the float model, relative to max(1, largest output).
    weights: `ema`, `raw`, or the name of a set of weights in the checkpoint. drop: patterns of its keys to leave out.
    multi_label: classes are independent of each other: the head is probs, by sigmoid in place of softmax.
    mean, std: one value for each input channel, of channels scaled to 0..1. resize: `crop`, `stretch` or `pad`
    (`data.preprocessing.Preprocessing`). crop_pct: share of the resized image that the crop keeps; for `crop` alone.
    native_library: platform whose native library goes into the bundle. platform: platform that the artifact is for,
    None for any. chosen: target and precision with the reason, if a device profile decided them. min_target: oldest
    system that must run the artifact (Core ML).
    calib: calibration images for int8, or evaluation images for w8 without val. calib_images: number of these images.
    calib_method: how ranges are computed, one of CALIB_METHODS. force_calib: accept calibration images that fail the
    checks. smooth: whether int8 applies SmoothQuant first. weight_bits: 8 (default), or 7 for int8 weights that cannot
    saturate on x86 CPUs without VNNI. val: labelled evaluation images for int8 and w8. max_drop:
    largest accepted loss of accuracy on val, in points. nms, score_thr, iou, max_det: selection of a detector, as in
    `data.boxes.SelectionSettings`. layout: arrangement of the bundle for a server, `NAME` or `NAME:DIR` with the folder
    of the bundles on the server; None for none. settings: the target's own, an instance of `Target.settings`.
    """

    target: str
    precision: str | None = None
    imgsz: tuple[int, int] | None = None
    more_imgsz: tuple[tuple[int, int], ...] = ()
    batch: Batch = Batch(1, 1, 1)
    input: str = "image"
    head: str | None = None
    multi_label: bool = False
    scan: str = "auto"
    native_library: str | None = None
    platform: str | None = None
    chosen: Decision | None = None
    min_target: str | None = None
    opset: int | None = None
    tol: float | None = None
    weights: str = "ema"
    drop: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: str | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    calib: str | None = None
    calib_images: int = 512
    calib_method: str = "mse"
    smooth: str = "auto"
    weight_bits: int | None = None
    force_calib: bool = False
    val: str | None = None
    max_drop: float | None = None
    nms: str | None = None
    score_thr: float | None = None
    iou: float | None = None
    max_det: int | None = None
    layout: str | None = None
    settings: Any = None

    def __post_init__(self) -> None:
        convert_fields(self, NAMES, CONVERTERS)
        if self.head is not None:
            one_of("--head", self.head, HEADS)
        if self.multi_label and self.head not in (None, "probs"):
            raise UsageError(
                f"--multi-label with --head {self.head}: it is for probabilities",
                "leave --head out, or use --head probs",
            )
        one_of("--input", self.input, INPUTS)
        if self.precision is not None:
            object.__setattr__(self, "precision", canonical_precision(self.precision))
            one_of("--precision", self.precision, PRECISIONS)
        if self.min_target is not None:
            one_of("--min-target", self.min_target, MIN_TARGETS)
        one_of("--scan", self.scan, SCANS)
        self._check_calibration()
        if self.native_library is not None:
            one_of("--platform", self.native_library, PLATFORMS)
            if self.scan in NO_LIBRARY:
                raise UsageError(
                    f"--platform {self.native_library} with --scan {self.scan}: the model would not use the library",
                    "leave one of the two out",
                )
        if len({self.imgsz, *self.more_imgsz}) <= len(self.more_imgsz):
            raise UsageError("--imgsz names a size twice")
        if self.opset is not None and not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise UsageError(f"--opset {self.opset}: supported are {MIN_OPSET} to {MAX_OPSET}")
        if self.tol is not None and not 0 < self.tol < 1:
            raise UsageError(f"--tol {self.tol}: use a number between 0 and 1")
        if self.labels is not None:
            check_labels("--labels", self.labels)
        self._check_selection()
        make_preprocessing(self.imgsz or DEFAULT_IMGSZ, self.preprocessing)

    def _check_calibration(self) -> None:
        one_of("--calib-method", self.calib_method, CALIB_METHODS)
        one_of("--smooth", self.smooth, SMOOTHINGS)
        if self.precision in CALIBRATED and self.calib is None:
            raise UsageError(
                "int8 needs images to calibrate with",
                "add --calib DIR, with about 512 images like those the network will see",
            )
        given = [flag for flag, value in (("--calib", self.calib), ("--val", self.val)) if value is not None]
        if self.precision not in QUANTIZED and not given:
            chosen = [name for name in HOW_TO_CALIBRATE if getattr(self, name) != DEFAULTS[name]]
            given = [f"--{name.replace('_', '-')}" for name in chosen]
        if self.precision not in QUANTIZED and given:
            raise UsageError(
                f"{given[0]} is for int8 and w8, this export is {self.precision or 'float'}",
                f"add --int8 or --precision w8, or leave {given[0]} out",
            )
        if self.precision not in CALIBRATED and self.smooth == "on":
            raise UsageError(
                f"--smooth is for int8, this export is {self.precision or 'float'}", "add --int8, or leave --smooth out"
            )
        if self.weight_bits is not None:
            if self.weight_bits not in WEIGHT_BITS:
                raise UsageError(f"--weight-bits {self.weight_bits}: use 7 or 8")
            if self.precision not in CALIBRATED:
                raise UsageError(
                    f"--weight-bits is for int8, this export is {self.precision or 'float'}",
                    "add --int8, or leave --weight-bits out",
                )
        if self.precision == "w8" and len(given) == 2:
            raise UsageError("--calib has no use for w8 beside --val: w8 needs no calibration", "leave --calib out")
        if self.calib_images < 1:
            raise UsageError(f"--calib-images {self.calib_images}: use a number from 1")
        if self.max_drop is not None and self.val is None:
            raise UsageError("--max-drop needs labelled images to measure the drop with", "add --val DIR")
        if self.val is not None and self.head == "features":
            raise UsageError("--val with --head features: feature maps have no classes", "leave --val out")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop {self.max_drop}: use points of accuracy from 0 to 100")

    def _check_selection(self) -> None:
        given = {name: getattr(self, name) for name in SELECTION if getattr(self, name) is not None}
        try:
            SelectionSettings(**given)
        except ValueError as error:
            raise UsageError(f"--{str(error).replace('_', '-', 1)}") from error

    @property
    def selection(self) -> SelectionSettings | None:
        """Selection of a complete plan for a detector; None for other networks."""
        return None if self.nms is None else SelectionSettings(**{name: getattr(self, name) for name in SELECTION})

    @property
    def tolerance(self) -> float:
        """Largest accepted difference from the float model, as `tol`; by default that of the precision."""
        return self.tol if self.tol is not None else TOLERANCES[self.precision or PRECISIONS[0]]

    @property
    def agreement(self) -> float:
        """Least share (0..1) of detections, or of pixels, that the artifact and the float model have in common."""
        return AGREEMENTS.get(self.precision or PRECISIONS[0], 0.5)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Settings of preprocessing by name, for `make_preprocessing`; None for those that are not given."""
        return {key: getattr(self, key) for key in PREPROCESSING}

    @property
    def sizes(self) -> str:
        """Image sizes of a complete plan as text: `224x224`, or `192x192+224x224` for several."""
        return "+".join(size_text(size) for size in (self.imgsz, *self.more_imgsz) if size)

    def in_float32(self) -> ExportPlan:
        """Return the plan of the float32 export of the same network, to compare a quantised one with."""
        calibration: dict[str, Any] = {name: DEFAULTS[name] for name in HOW_TO_CALIBRATE}
        return replace(
            self, precision="fp32", calib=None, val=None, max_drop=None, smooth="off", weight_bits=None, **calibration
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for manifests and records."""
        return {**asdict(self), "batch": str(self.batch)}


DEFAULTS = {each.name: each.default for each in fields(ExportPlan)}


def canonical_precision(name: str) -> str:
    """Return the precision that `name` is an alias of, such as w8 for w8a16; any other name unchanged."""
    return PRECISION_ALIASES.get(name, name)


def parse_imgsz(given: str | int) -> tuple[int, int]:
    """Parse `224` or `HxW`. Returns (H, W) in pixels. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", str(given), re.ASCII)
    if not match:
        raise UsageError(f"--imgsz {given!r}: use 224, or HxW such as 224x288")
    return _checked_size("--imgsz", (int(match[1]), int(match[2] or match[1])))


def check_labels(what: str, labels: Sequence[str]) -> None:
    """Check that labels can be stored, one on each line of labels.txt. Raises UsageError naming the first that cannot.

    what: name of the labels in error messages.
    """
    if not labels:
        raise UsageError(f"{what} is empty", "give one class name for each output, in order")
    for index, label in enumerate(labels):
        if not label.strip() or label.splitlines() != [label]:
            raise UsageError(f"{what}: name {index} is empty or spans lines", "labels.txt holds one name on each line")
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{what}: name {index} is not valid Unicode", "save the names as UTF-8 text") from error


def read_size(what: str, value: Any) -> tuple[int, int]:
    """Convert a number, `HxW`, or two numbers (H, W) to an image size (H, W) in pixels. Raises UsageError."""
    if isinstance(value, str):
        return parse_imgsz(value)
    try:
        sides = listed(what, value, whole)
    except UsageError:
        sides = (whole(what, value),) * 2
    if len(sides) != 2:
        raise wrong(what, value, "a number, HxW, or (H, W)")
    return _checked_size(what, (sides[0], sides[1]))


def _checked_size(what: str, size: tuple[int, int]) -> tuple[int, int]:
    if not (min(size) >= 1 and max(size) <= MAX_SIDE):
        raise UsageError(f"{what} {size_text(size)}: at least 1 and at most {MAX_SIDE} pixels a side")
    return size


def _further_size(what: str, value: Any) -> tuple[int, int]:
    """Convert an item of more_imgsz. A bare number is refused: two of them could be one size (H, W)."""
    if not isinstance(value, (str, list, tuple)):
        raise wrong(what, value, "HxW or (H, W)")
    return read_size(what, value)


def _batch(what: str, value: Any) -> Batch:
    """Convert a Batch, a number, the text of --batch, or three numbers to a Batch."""
    if not isinstance(value, (str, Batch)):
        try:
            value = ":".join(map(str, listed(what, value, whole)))
        except UsageError:
            value = str(whole(what, value))
    parsed = Batch.parse(str(value))
    if isinstance(value, Batch) and value != parsed:
        raise wrong(what, value, "Batch(min, opt, max) with 1 <= min <= opt <= max, or Batch(1, 1, None)")
    return parsed


def _decision(what: str, value: Any) -> Decision:
    if not isinstance(value, Decision):
        raise wrong(what, value, "a Decision")
    return value


def _unchanged(what: str, value: Any) -> Any:
    return value


SELECTION = ("score_thr", "iou", "max_det", "nms")  # settings of a detector
PREPROCESSING = (*PREPROCESSING_CONVERTERS,)
NAMES = {"native_library": "--platform", "more_imgsz": "--imgsz", "platform": "platform", "chosen": "chosen"}
CONVERTERS: Mapping[str, Converter] = {
    "imgsz": read_size,
    "more_imgsz": lambda what, value: listed(what, value, _further_size),
    "batch": _batch,
    "chosen": _decision,
    **PREPROCESSING_CONVERTERS,
    "calib": path_text,
    "val": path_text,
    "drop": lambda what, value: (value,) if isinstance(value, str) else listed(what, value, text),
    "settings": _unchanged,  # check_plan checks them: their type belongs to the target
}
