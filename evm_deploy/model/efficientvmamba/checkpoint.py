"""Load an EfficientVMamba checkpoint: infer the architecture from tensor shapes, load the state dict strictly."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy.errors import CheckpointError
from evm_deploy.model.network import Family, LoadOptions, ModelSpec, Network
from evm_deploy.model.state_dict import RawCheckpoint, drop_beside, network_name, rename
from evm_deploy.model.weight_sets import LISTED, some

if TYPE_CHECKING:
    from torch import Tensor, nn

    from evm_deploy.model.efficientvmamba.network import Architecture

STAGES = 4
MAX_CHANNELS = 1024  # of the input
MIN_PIXELS = 4  # one patch of the embedding
ANCHORS = ("patch_embed.0.weight", "patch_embed.proj.weight")  # the current name and an older one
# The patch embedding reads pixels, does 0.7 % of the work and has few weights. Mean and std are folded into them later.
KEEP_FLOAT = ("patch_embed.0",)
WEIGHT_ONLY = ("classifier.head",)  # the head's pooled input has too few values to calibrate a range
RENAMES = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^norm\."), "classifier.norm."),
    (re.compile(r"^head\."), "classifier.head."),
)


def load(raw: RawCheckpoint, options: LoadOptions) -> Network:
    """Load an EfficientVMamba of any width and depth: the classifier or, for head `features`, the backbone.

    A classification checkpoint has no `outnorm*` weights. For head `features` these norms get weight 1 and bias 0, as
    in the authors' backbone, and the spec gets a note. Raises CheckpointError with every missing, unexpected and
    misshapen key, and with the name of a related network: these have the same anchors. Source: spec, sections 7 to 9.
    """
    import torch

    from evm_deploy.model.efficientvmamba.network import EfficientVMamba, EfficientVMambaBackbone

    path, raw = raw.path, rename(raw, RENAMES)
    arch = infer_architecture(path, raw.tensors)
    features = options.head == "features"
    if not features and not arch.num_classes:
        raise CheckpointError(
            f"checkpoint {path} has no classifier head", "export its feature maps with --head features"
        )
    with torch.device("meta"):
        model: nn.Module = (
            EfficientVMambaBackbone(arch, normalised_stages(raw.tensors)) if features else EfficientVMamba(arch)
        )
    _fit_to_head(raw, model.state_dict(), features)
    fill(model, raw)
    return Network(model, _spec(raw, arch, model, options))


def normalised_stages(tensors: Collection[str]) -> tuple[int, ...]:
    """Return the numbers of the stages whose maps the checkpoint normalises (`outnorm*`); all four if it has none."""
    found = tuple(i for i in range(STAGES) if any(key.startswith(f"outnorm{i}.") for key in tensors))
    return found or tuple(range(STAGES))


def fill(model: nn.Module, raw: RawCheckpoint) -> None:
    """Load the weights of a checkpoint into a module on the meta device, strictly, and put it into eval mode.

    Tensors that only the training needs are dropped. Raises CheckpointError with every missing, unexpected and
    misshapen key.
    """
    expected = model.state_dict()
    drop_beside(raw, expected)
    _check_strictly(raw.path, raw.tensors, expected)
    model.load_state_dict(_to_float32(raw.path, raw), strict=True, assign=True)
    model.eval().requires_grad_(False)


EFFICIENTVMAMBA = Family("EfficientVMamba", ANCHORS, load)


def _spec(raw: RawCheckpoint, arch: Architecture, model: nn.Module, options: LoadOptions) -> ModelSpec:
    features = options.head == "features"
    return ModelSpec(
        name=network_name(raw),
        family=EFFICIENTVMAMBA.name,
        variant=arch.variant,
        task="features" if features else "classification",
        outputs=tuple(f"feature{i}" for i in normalised_stages(raw.tensors)) if features else ("logits",),
        num_classes=0 if features else arch.num_classes,
        channels=arch.channels,
        parameters=sum(p.numel() for p in model.parameters()),
        checkpoint=raw.facts(),
        min_pixels=MIN_PIXELS,
        blocks=tuple(block_paths(model)),
        keep_float=KEEP_FLOAT,
        weight_only=WEIGHT_ONLY,
        notes=tuple(raw.notes),
        defaults=raw.metadata,
        details={"architecture": asdict(arch)},
    )


def block_paths(model: nn.Module) -> Iterator[str]:
    """Yield block paths: layers.0.blocks.0 .. and layers.0.downsample of scan stages, layers.2.0 .. of the others."""
    for path, stage in model.get_submodule("layers").named_children():
        for name, child in stage.named_children():
            inner = [f"{name}.{each}" for each, _ in child.named_children()] if name == "blocks" else [name]
            yield from (f"layers.{path}.{each}" for each in inner)


def infer_architecture(path: Path, tensors: dict[str, Tensor]) -> Architecture:
    """Infer widths, depths, number of input channels and classes, d_state and dt_rank from keys and shapes.

    Raises CheckpointError if the tensors belong to a related network or if blocks are missing.
    """
    from evm_deploy.model.efficientvmamba.network import Architecture

    _refuse_relatives(path, tensors)
    stem = tuple(tensors["patch_embed.0.weight"].shape)
    if len(stem) != 4 or stem[2:] != (4, 4) or stem[0] < 8 or not 1 <= stem[1] <= MAX_CHANNELS:
        raise CheckpointError(
            f"checkpoint {path}: patch_embed.0.weight has shape {list(stem)}, supported: [dim >= 8, channels, 4, 4]"
        )
    dim = stem[0]
    depths = (
        _count(path, tensors, r"layers\.0\.blocks\.(\d+)\.", 0),
        _count(path, tensors, r"layers\.1\.blocks\.(\d+)\.", 0),
        _count(path, tensors, r"layers\.2\.(\d+)\.conv_pw\.0\.weight$", 1),
        _count(path, tensors, r"layers\.3\.(\d+)\.conv_pw\.0\.weight$", 1),
    )

    def last_dim(key: str, default: int) -> int:
        return int(tensors[key].shape[-1]) if key in tensors and tensors[key].dim() else default

    head = tensors.get("classifier.head.weight")
    first = "layers.0.blocks.0.op." if depths[0] else "layers.1.blocks.0.op."
    return Architecture(
        dim=dim,
        depths=depths,
        channels=stem[1],
        num_classes=int(head.shape[0]) if head is not None and head.dim() else 0,
        d_state=last_dim(first + "A_logs", 16),
        dt_ranks=(
            last_dim("layers.0.blocks.0.op.dt_projs_weight", math.ceil(dim / 16)),
            last_dim("layers.1.blocks.0.op.dt_projs_weight", math.ceil(2 * dim / 16)),
        ),
    )


def _refuse_relatives(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError, with the network's name, if the tensors are of a related network."""
    signs = (
        (r"layers\.2\.blocks\.", "plain VMamba (scan blocks in stage 2)"),
        (r"layers\.\d\.blocks\.\d+\.(norm2|mlp)\.", "a variant with an MLP in its blocks"),
        (r"\.op\.(in_rank|x_proj_bias)$", "a VMamba variant with other projections"),
        (r"layers\.0\.downsample\.1\.weight$", "the unreleased variant with convolutional downsampling"),
    )
    for pattern, what in signs:
        if any(re.search(pattern, key) for key in tensors):
            raise CheckpointError(f"checkpoint {path} is {what}, not EfficientVMamba")


def _count(path: Path, tensors: Iterable[str], pattern: str, first: int) -> int:
    found = {int(match[1]) for key in tensors if (match := re.match(pattern, key))}
    if found != set(range(first, first + len(found))):
        raise CheckpointError(f"checkpoint {path}: blocks {sorted(found)[:LISTED]} of {pattern[:10]!r} have gaps")
    return len(found)


def _fit_to_head(raw: RawCheckpoint, expected: dict[str, Tensor], features: bool) -> None:
    """Drop the tensors of the other head; add unit norms where head `features` needs them and the file has none."""
    import torch

    other = "classifier." if features else "outnorm"
    for key in [key for key in raw.tensors if key.startswith(other)]:
        raw.dropped.append(key)
        del raw.tensors[key]
    norms = [key for key in expected if key.startswith("outnorm")]
    if norms and not any(key in raw.tensors for key in norms):
        raw.notes.append("no outnorm0..3 in the checkpoint: features are normalised with weight 1, bias 0")
        for key in norms:
            fill = torch.ones if key.endswith("weight") else torch.zeros
            raw.tensors[key] = fill(expected[key].shape)


def _check_strictly(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    misshapen = [
        f"{key} is {list(tensors[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {kind}: {some(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {path} does not fit the network that its shapes describe: " + "; ".join(problems),
            _remedy(missing + misshapen, unexpected, {key.partition(".")[0] for key in expected}),
        )


def _remedy(lacking: list[str], unexpected: list[str], parts: set[str]) -> str:
    """Return the hint for a state dict that does not fit. parts: first parts of the network's own names."""
    if not unexpected:
        return "the file holds a part of the network: look for the whole checkpoint"
    if lacking or any(key.partition(".")[0] in parts for key in unexpected):
        return "it is another architecture, or a part of one: its outputs could not be right"
    part, dot, _ = unexpected[0].partition(".")
    pattern = shlex.quote(part + ".*" * bool(dot))
    return f"leave out what the network does not need to predict, such as a second head:  --drop {pattern}"


def _to_float32(path: Path, raw: RawCheckpoint) -> dict[str, Tensor]:
    import torch

    state = {}
    converted = {str(t.dtype).removeprefix("torch.") for t in raw.tensors.values() if t.is_floating_point()}
    converted -= {"float32"}
    if converted:
        raw.notes.append(f"weights stored as {', '.join(sorted(converted))}, converted to float32")
    for key, tensor in raw.tensors.items():
        counter = key.endswith("num_batches_tracked")
        value = tensor.to(torch.int64 if counter else torch.float32).contiguous()
        if not counter and (odd := _odd_values(key, value)):
            raise CheckpointError(
                f"checkpoint {path}: {key} {odd}", "the training run diverged; use a checkpoint from before that"
            )
        state[key] = value
    return state


def _odd_values(key: str, value: Tensor) -> str:
    """Describe values of a weight that would make every output NaN; an empty string if there are none."""
    import torch

    if not torch.isfinite(value).all():
        return "holds NaN or Inf"
    if key.endswith(".running_var") and (value < 0).any():
        return "holds negative variances"
    if key.endswith(".A_logs") and not torch.isfinite(value.exp()).all():
        return f"reaches {value.max():.4g}, whose exp is Inf"
    return ""
