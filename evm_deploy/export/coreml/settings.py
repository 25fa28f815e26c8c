"""Settings of a Core ML export."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy._util.settings import Settings, setting


@dataclass(frozen=True)
class CoreMlSettings(Settings):
    """Settings of a Core ML export.

    vision: also write a detector as `vision.mlpackage`, a pipeline with a NonMaximumSuppression model, which Vision
    (VNCoreMLRequest) and the preview of Xcode understand.
    """

    vision: bool = setting(
        False,
        "--vision",
        help="Core ML: also write vision.mlpackage, the detector as Vision and Xcode's preview take it; it gives each "
        "anchor its best class alone, so that its detections differ from those of model.mlpackage",
    )
