"""Selection of the class of every pixel in torch, for segmenters: from logits of a coarser map, in a form for export.

The logits of 150 classes at 512x512 pixels are 157 MB, the label map is 0.26 MB. So the logits are resized and compared
in strips of rows, one after the other, and the whole of them never exists. Resizing is two products with constant
matrices, channels last: exact on every runtime and for every size, and the comparison reads neighbouring values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evm_deploy.model.resampling import bilinear_weights

LABEL_MAP = "label_map"
STRIP_BYTES = 16 << 20  # of the resized float32 logits of an image that exist at a time
MAX_STRIPS = 64  # for inputs of many megapixels


class LabelSelection(nn.Module):
    """Class of every pixel of the network's input, from logits of smaller maps: resized bilinearly, the largest wins.

    classes: channels of the logits. maps: (h, w) of the logits. size: (H, W) of the network's input in pixels.
    threshold: for one channel, the score from which on a pixel is of class 1 and not of class 0; the score is the
    sigmoid of the logit. reads: path of the convolution that writes the logits.
    Semantics: mmseg 1.2.2, `EncoderDecoder.postprocess_result`, without the second resize.
    """

    outputs = (LABEL_MAP,)

    def __init__(
        self,
        classes: int,
        maps: tuple[int, int],
        size: tuple[int, int],
        *,
        align_corners: bool = False,
        threshold: float = 0.3,
        reads: str,
    ) -> None:
        super().__init__()
        self.classes, self.size, self.reads = classes, size, reads
        self.threshold = math.log(threshold / (1 - threshold))
        self.dtype = torch.uint8 if classes <= 256 else torch.int32
        rows, columns = (
            bilinear_weights(old, new, align_corners=align_corners) for old, new in zip(maps, size, strict=True)
        )
        self.columns = nn.Buffer(torch.from_numpy(columns), persistent=False)
        height, width = size
        count = min(-(-4 * height * width * classes // STRIP_BYTES), MAX_STRIPS, height)
        self.strips: list[tuple[int, int]] = []  # rows of the maps that each strip reads
        for i, part in enumerate(np.array_split(rows, count)):
            read = np.flatnonzero(part.any(0))
            first, end = int(read[0]), int(read[-1]) + 1
            self.strips.append((first, end))
            self.register_buffer(f"rows{i}", torch.from_numpy(part[:, first:end].copy()), persistent=False)

    def forward(self, logits: Tensor) -> tuple[Tensor]:
        """Map logits (b, classes, h, w) -> (label_map,), (b, H, W) uint8, or int32 for more than 256 classes."""
        return (torch.cat([self._labels(strip) for strip in self._resized(logits)], 1),)

    def chosen(self, maps: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Return the label map of logits (b, classes, h, w), by name."""
        with torch.inference_mode():
            (label_map,) = self(torch.from_numpy(maps))
        return {LABEL_MAP: label_map.numpy()}

    def judged(self, maps: NDArray[np.float32], outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Replace the class of every pixel in a label map by the resized logit of this class, (b, H, W) float32.

        maps: the logits (b, classes, h, w). For one channel class 0 has the logit 0, and class 1 the logit minus that
        of the threshold. A class that the network does not have gets minus infinity. The right class has the largest
        logit; where another one is as good within rounding, its logit is as large.
        """
        wanted = torch.from_numpy(outputs[LABEL_MAP].astype(np.int64))
        found, start = [], 0
        for strip in self._resized(torch.from_numpy(maps)):
            if self.classes == 1:
                strip = torch.cat([torch.zeros_like(strip), strip - self.threshold], 3)
            index = wanted[:, start : start + strip.shape[1]]
            real = (index >= 0) & (index < strip.shape[3])
            value = strip.gather(3, torch.where(real, index, 0)[..., None])[..., 0]
            found.append(torch.where(real, value, -math.inf))
            start += strip.shape[1]
        return {LABEL_MAP: torch.cat(found, 1).numpy()}

    def _resized(self, logits: Tensor) -> Iterator[Tensor]:
        """Yield the logits of each strip at the size of the input, (b, rows, W, classes)."""
        last = logits.permute(0, 2, 3, 1)
        width = self.size[1]
        for i, (first, end) in enumerate(self.strips):
            wide = torch.matmul(self.columns, last[:, first:end])  # (b, rows of the map, W, classes)
            tall = torch.matmul(self.get_buffer(f"rows{i}"), wide.reshape(-1, end - first, width * self.classes))
            yield tall.reshape(-1, tall.shape[1], width, self.classes)

    def _labels(self, strip: Tensor) -> Tensor:
        """Return the class of every pixel of a strip, (b, rows, W)."""
        if self.classes == 1:
            return (strip[..., 0] > self.threshold).to(self.dtype)
        return strip.argmax(3).to(self.dtype)
