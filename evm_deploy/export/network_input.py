"""Check the channels of a network's input against an export's plan, and tell what was assumed about the input."""

from __future__ import annotations

from evm_deploy._util.text import count_text, size_text
from evm_deploy.data.preprocessing import CROP, Preprocessing
from evm_deploy.data.reading import MODES, listed_channels
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import PREPROCESSING, ExportPlan
from evm_deploy.export.targets import get_target
from evm_deploy.model.network import ModelSpec


def check_channels(plan: ExportPlan, spec: ModelSpec) -> None:
    """Raise UsageError for a setting that needs images, if no image has the network's number of channels."""
    count = count_text(spec.channels, "input channel")
    taken = get_target(plan.target).image_channels
    if plan.input == "image" and spec.channels in MODES and spec.channels not in taken:
        raise UsageError(
            f"--input image: target '{plan.target}' has images of {' or '.join(map(str, taken))} channels, the network "
            f"has {count}",
            "add --input tensor: the app gives normalised tensors",
        )
    if spec.channels in MODES:
        return
    why = f"the network has {count}, images have {listed_channels()}"
    if plan.input == "image":
        raise UsageError(f"--input image: {why}", "add --input tensor: the app gives normalised tensors")
    for flag, value in (("--calib", plan.calib), ("--val", plan.val)):
        if value is not None:
            raise UsageError(f"{flag}: {why}", "export it in fp32 or fp16: calibration and evaluation read images")


def assumed(plan: ExportPlan, spec: ModelSpec, preprocessing: Preprocessing) -> list[str]:
    """Return a note on the settings that neither the plan nor the checkpoint gives, with the values taken for them.

    plan: as the user gave it, not completed. No parity check can see a wrong value here: the float model gets the same.
    """
    known = {key for key in ("imgsz", *PREPROCESSING) if getattr(plan, key) is not None or key in spec.defaults}
    count = count_text(spec.channels, "channel")
    repeated = "" if spec.channels == 3 else f" (ImageNet's for RGB, repeated for {count})"
    values = {
        "imgsz": f"size {size_text(preprocessing.size)}",
        "mean": f"mean {','.join(map(str, preprocessing.mean))}{repeated}",
        "std": f"std {','.join(map(str, preprocessing.std))}{repeated}",
        "resize": f"resize {preprocessing.resize}",
        "crop_pct": f"crop {preprocessing.crop_pct}",
        "interpolation": f"interpolation {preprocessing.interpolation}",
    }
    if preprocessing.resize != CROP:
        known.add("crop_pct")
    elif "crop_pct" in known:  # the share tells that there is a crop
        known.add("resize")
    texts = [text for key, text in values.items() if key not in known]
    return [f"assumed, because neither the checkpoint nor a flag says: {', '.join(texts)}"] if texts else []
