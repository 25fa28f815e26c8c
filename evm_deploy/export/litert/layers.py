"""Rules for convolutions, pooling, resizing, norms and activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.export.litert.layout import Order, last, permuted
from evm_deploy.export.litert.moves import cut
from evm_deploy.export.litert.rounding import Operation
from evm_deploy.export.litert.translate import Node, Rule, Translation, Value

CHANNELS_LAST = (0, 2, 3, 1)
LINE_LAST = (0, 2, 1)  # (b, C, L) -> (b, L, C)


class Window:
    """Attributes of a convolution or pooling over two axes: kernel, strides, dilations, pads and groups.

    One axis becomes two with a height of 1. Raises the node's error for three axes.
    """

    def __init__(self, node: Node, kernel: Sequence[int]) -> None:
        x = node.input(0)
        if x.rank not in (3, 4):
            raise node.refused(f"{x.rank - 2} spatial axes; it has one or two")
        rank = x.rank - 2
        self.line = rank == 1
        one = [1] * (2 - rank)
        self.kernel = [*one, *kernel]
        self.strides = [*one, *node.get("strides", [1] * rank)]
        self.dilations = [*one, *node.get("dilations", [1] * rank)]
        self.group = node.get("group", 1)
        pads = [*node.get("pads", [0] * 2 * rank)]
        auto = node.get("auto_pad", "NOTSET")
        if auto not in ("NOTSET", "VALID", "SAME_UPPER"):
            raise node.refused(f"auto_pad {auto}")
        self.sizes = [*one, *x.shape[2:]]
        self.windows = [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]
        none = [0] * (2 - rank)
        self.pads = [*none, *pads[:rank], *none, *pads[rank:]]
        if auto == "SAME_UPPER":
            self.pads = self.same
        self.padded = any(self.pads)

    @property
    def same(self) -> list[int]:
        """Pads of TensorFlow's SAME: all begins, then all ends."""
        totals = [
            max(0, (-(-size // stride) - 1) * stride + window - size)
            for size, window, stride in zip(self.sizes, self.windows, self.strides, strict=True)
        ]
        return [*(total // 2 for total in totals), *(total - total // 2 for total in totals)]

    def read(self, t: Translation, x: Value) -> int:
        """Return the input as (b, H, W, C)."""
        if not self.line:
            return t.arranged(x, CHANNELS_LAST)
        b, channels, length = x.shape
        return t.reshape(t.arranged(x, LINE_LAST), (b, 1, length, channels))

    def written(self, t: Translation, node: Node, tensor: int) -> tuple[int, Order]:
        """Return the output of the node from (b, H, W, C), and the order of its axes."""
        if not self.line:
            return tensor, CHANNELS_LAST
        b, channels, length = t.shapes[node.outputs[0]][0]
        return t.reshape(tensor, (b, length, channels)), LINE_LAST

    def pad(self, t: Translation, tensor: int, value: float | None = None, *, counted: bool = False) -> tuple[int, Any]:
        """Return the tensor to compute on, padded if TFLite's own padding is another, and TFLite's padding.

        value: of the padding, None for 0. counted: whether the padding counts in an average, unlike TFLite's.
        """
        kinds = t.file.schema.Padding
        if not self.padded or (self.pads == self.same and not counted):
            return tensor, kinds.SAME if self.padded else kinds.VALID
        table = [[0, 0], [self.pads[0], self.pads[2]], [self.pads[1], self.pads[3]], [0, 0]]
        shape = [size + sum(both) for size, both in zip(t.file.shapes[tensor], table, strict=True)]
        inputs = [tensor, t.constant(np.array(table, np.int32))]
        if value is None:
            return t.add("PAD", inputs, shape), kinds.VALID
        return t.add("PADV2", [*inputs, t.constant(np.array([value], np.float32))], shape), kinds.VALID

    def result(self, t: Translation, node: Node) -> tuple[int, ...]:
        """Return the shape of the output as (b, H, W, C)."""
        shape = t.shapes[node.outputs[0]][0]
        b, channels, *sizes = shape
        return (b, *([1] if self.line else []), *sizes, channels)

    @property
    def steps(self) -> dict[str, Any]:
        """TFLite's options for strides."""
        return {"strideH": self.strides[0], "strideW": self.strides[1]}


def conv(t: Translation, node: Node) -> None:
    """Translate Conv over one or two axes: grouped, depthwise, dilated, padded."""
    weight = node.constant(1)
    assert weight is not None
    window, operation = Window(node, weight.shape[2:]), Operation(t, node, constants=(1, 2), relu=True)
    outputs, each = weight.shape[:2]
    tensor, padding = window.pad(t, window.read(t, operation.values[0]))
    options: dict[str, Any] = {
        "padding": padding,
        **window.steps,
        "dilationHFactor": window.dilations[0],
        "dilationWFactor": window.dilations[1],
    }
    height, width = window.kernel
    spatial = range(2, weight.ndim)
    if each == 1 and window.group > 1:
        code, options["depthMultiplier"] = "DEPTHWISE_CONV_2D", outputs // window.group
        kernel = operation.weight((1, *spatial, 0), (1, height, width, outputs), 3)
    else:
        code, kernel = "CONV_2D", operation.weight((0, *spatial, 1), (outputs, height, width, each), 0)
    made = operation.add(code, [tensor, kernel, operation.bias(outputs)], window.result(t, node), **options)
    operation.write(*window.written(t, node, made))


def conv_transpose(t: Translation, node: Node) -> None:
    """Translate ConvTranspose of one group: without padding, then the border cut off."""
    weight = node.constant(1)
    assert weight is not None
    window = Window(node, weight.shape[2:])
    if window.group != 1 or max(window.dilations) > 1:
        raise node.refused("groups or dilations")
    operation = Operation(t, node, exact=True)
    tensor, shape = window.read(t, node.input(0)), window.result(t, node)
    whole = [(size - 1) * s + k for size, s, k in zip(window.sizes, window.strides, window.kernel, strict=True)]
    grown = [max(w, p + s) for w, p, s in zip(whole, window.pads[:2], shape[1:3], strict=True)]
    if grown != whole:
        raise node.refused("output_padding beyond the kernel")
    full = (shape[0], *whole, shape[3])
    inputs = [
        t.constant(full),
        operation.weight((1, *range(2, weight.ndim), 0), (shape[3], *window.kernel, weight.shape[0]), 0),
        tensor,
        operation.bias(shape[3]),
    ]
    made = t.add("TRANSPOSE_CONV", inputs, full, "float32", padding=t.file.schema.Padding.VALID, **window.steps)
    for axis in (1, 2):
        made = cut(t, made, axis, window.pads[axis - 1], shape[axis])
    operation.write(*window.written(t, node, made))


def pool(code: str) -> Rule:
    """Return the rule for MaxPool or AveragePool over one or two axes."""

    def rule(t: Translation, node: Node) -> None:
        window = Window(node, node.get("kernel_shape"))
        if max(window.dilations) > 1 or len(node.outputs) > 1:
            raise node.refused("dilations or indices")
        counted = code == "AVERAGE_POOL_2D" and bool(node.get("count_include_pad", 0))
        tensor, kinds = window.read(t, node.input(0)), t.file.schema.Padding
        if code == "AVERAGE_POOL_2D" and window.padded and not counted and window.pads != window.same:
            raise node.refused("an average that leaves out such padding")
        value = float(np.finfo(np.float32).min) if code == "MAX_POOL_2D" else None
        tensor, padding = window.pad(t, tensor, value, counted=counted)
        shape = window.result(t, node)
        if padding == kinds.VALID:
            fits = [
                (n - k) // s + 1
                for n, k, s in zip(t.file.shapes[tensor][1:3], window.kernel, window.strides, strict=True)
            ]
            if fits != [*shape[1:3]]:
                raise node.refused("ceil_mode")
        sizes: dict[str, Any] = {"filterHeight": window.kernel[0], "filterWidth": window.kernel[1]}
        made = t.add(code, [tensor], shape, name=node.outputs[0], padding=padding, **window.steps, **sizes)
        t.write(node, *window.written(t, node, made))

    return rule


def global_average(t: Translation, node: Node) -> None:
    """Translate GlobalAveragePool: the mean over all axes but the first two."""
    operation = Operation(t, node)
    (x,) = operation.values
    places = [place for place, axis in enumerate(x.order) if axis > 1]
    shape = permuted(t.shapes[node.outputs[0]][0], x.order)
    operation.write(operation.add("MEAN", [x.tensor, t.constant(places)], shape, keepDims=True), x.order)


def resize(t: Translation, node: Node) -> None:
    """Translate Resize of two axes: bilinear, or to the nearest pixel of a whole factor."""
    x, shape = node.input(0), t.shapes[node.outputs[0]][0]
    mode, places = node.get("mode", "nearest"), node.get("coordinate_transformation_mode", "half_pixel")
    if x.rank != 4 or x.shape[:2] != shape[:2] or node.get("antialias", 0):
        raise node.refused("not over height and width, or antialiased")
    options = {"alignCorners": places == "align_corners", "halfPixelCenters": "half_pixel" in places}
    if places not in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        raise node.refused(f"coordinate_transformation_mode {places}")
    if mode == "nearest":
        rounding = node.get("nearest_mode", "round_prefer_floor")
        whole = all(new % old == 0 for old, new in zip(x.shape[2:], shape[2:], strict=True))
        if not (places == "asymmetric" and rounding == "floor") and not (whole and places != "align_corners"):
            raise node.refused(f"nearest pixel by {places} and {rounding}")
        if whole and places == "asymmetric" and rounding != "floor":
            raise node.refused(f"nearest pixel by {places} and {rounding}")
        code, options["halfPixelCenters"] = "RESIZE_NEAREST_NEIGHBOR", False
    elif mode == "linear":
        code = "RESIZE_BILINEAR"
    else:
        raise node.refused(f"mode {mode}")
    t.emit(node, code, [t.arranged(x, CHANNELS_LAST), t.constant([*shape[2:]])], CHANNELS_LAST, **options)


def layer_norm(t: Translation, node: Node) -> None:
    """Translate LayerNormalization and RMSNormalization over the last axis: mean, variance, scale and shift."""
    x = node.input(0)
    if node.get("axis", -1) % x.rank != x.rank - 1 or len(node.outputs) > 1:
        raise node.refused("more than the last axis, or further outputs")
    order = last(x.order, x.rank - 1)
    tensor = t.arranged(x, order)
    if node.op == "LayerNormalization":
        tensor = t.add("SUB", [tensor, mean(t, tensor)], t.file.shapes[tensor])
    scaled = normalised(t, tensor, node.get("epsilon", 1e-5))
    affine(t, node, scaled, order, node.constant(1), node.constant(2))


def mean(t: Translation, tensor: int, axes: Sequence[int] = (-1,)) -> int:
    """Return the mean of a tensor over these axes, which stay with size 1."""
    shape = [*t.file.shapes[tensor]]
    places = [axis % len(shape) for axis in axes]
    for axis in places:
        shape[axis] = 1
    return t.add("MEAN", [tensor, t.constant(places)], shape, keepDims=True)


def normalised(t: Translation, centred: int, epsilon: float, axes: Sequence[int] = (-1,)) -> int:
    """Return a tensor divided by the root of its mean square and epsilon."""
    shape = t.file.shapes[centred]
    square = mean(t, t.add("MUL", [centred, centred], shape), axes)
    small = t.file.shapes[square]
    root = t.add("RSQRT", [t.add("ADD", [square, t.constant(float(epsilon))], small)], small)
    return t.add("MUL", [centred, root], shape)


def affine(
    t: Translation, node: Node, tensor: int, order: tuple[int, ...], scale: Any, shift: NDArray[Any] | None
) -> None:
    """Write the output of a norm: its tensor times `scale` plus `shift`, both for the last axis of the tensor."""
    shape = t.file.shapes[tensor]
    tensor = t.add("MUL", [tensor, t.constant(scale)], shape, name="" if shift is not None else node.outputs[0])
    if shift is not None:
        tensor = t.add("ADD", [tensor, t.constant(shift)], shape, name=node.outputs[0])
    t.write(node, tensor, order)


def group_norm(t: Translation, node: Node) -> None:
    """Translate GroupNormalization and InstanceNormalization, with channels last."""
    x, scale, shift = node.input(0), node.constant(1), node.constant(2)
    assert scale is not None
    groups = node.get("num_groups", x.shape[1])
    order = (0, *range(2, x.rank), 1)
    b, channels, *sizes = x.shape
    tensor = t.reshape(t.arranged(x, order), (b, int(np.prod(sizes)), groups, channels // groups))
    tensor = t.add("SUB", [tensor, mean(t, tensor, (1, 3))], t.file.shapes[tensor])
    tensor = t.reshape(normalised(t, tensor, node.get("epsilon", 1e-5), (1, 3)), permuted(x.shape, order))
    if len(scale) != channels:  # GroupNormalization before opset 21: one value for each group
        scale, shift = (None if v is None else np.repeat(v, channels // groups) for v in (scale, shift))
    affine(t, node, tensor, order, scale, shift)


def batch_norm(t: Translation, node: Node) -> None:
    """Translate BatchNormalization that could not be folded: a scale and a shift for each channel."""
    x = node.input(0)
    scale, shift, centre, variance = (np.asarray(node.constant(i), np.float64) for i in range(1, 5))
    factor = scale / np.sqrt(variance + node.get("epsilon", 1e-5))
    order = last(x.order, 1)
    values = [each.astype(np.float32) for each in (factor, shift - centre * factor)]
    affine(t, node, t.arranged(x, order), order, *values)


def gelu(t: Translation, node: Node) -> None:
    """Translate Gelu, exact or by tanh."""
    x = node.input(0)
    t.emit(node, "GELU", [x.tensor], x.order, approximate=node.get("approximate", "none") == "tanh")


def leaky(t: Translation, node: Node) -> None:
    """Translate LeakyRelu."""
    x = node.input(0)
    t.emit(node, "LEAKY_RELU", [x.tensor], x.order, alpha=node.get("alpha", 0.01))


def hard_swish(t: Translation, node: Node) -> None:
    """Translate HardSwish."""
    x = node.input(0)
    t.emit(node, "HARD_SWISH", [x.tensor], x.order)


def hard_sigmoid(t: Translation, node: Node) -> None:
    """Translate HardSigmoid: max(0, min(1, alpha x + beta))."""
    x = node.input(0)
    shape = t.file.shapes[x.tensor]
    scaled = t.add("MUL", [x.tensor, t.constant(float(node.get("alpha", 0.2)))], shape)
    moved = t.add("ADD", [scaled, t.constant(float(node.get("beta", 0.5)))], shape)
    low = t.add("MINIMUM", [moved, t.constant(1.0)], shape)
    t.emit(node, "RELU", [low], x.order)


RULES: dict[str, Rule] = {
    "AveragePool": pool("AVERAGE_POOL_2D"),
    "BatchNormalization": batch_norm,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gelu": gelu,
    "GlobalAveragePool": global_average,
    "GroupNormalization": group_norm,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "InstanceNormalization": group_norm,
    "LayerNormalization": layer_norm,
    "LeakyRelu": leaky,
    "MaxPool": pool("MAX_POOL_2D"),
    "RMSNormalization": layer_norm,
    "Resize": resize,
}
