"""Read a detector or segmenter of OpenMMLab on an EfficientVMamba backbone: what the loaders of both have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from evm_deploy.errors import CheckpointError
from evm_deploy.model.efficientvmamba import checkpoint
from evm_deploy.model.efficientvmamba.checkpoint import block_paths
from evm_deploy.model.network import LoadOptions, ModelSpec, Network
from evm_deploy.model.openmmlab import TrainingSettings
from evm_deploy.model.state_dict import RawCheckpoint, network_name, rename

if TYPE_CHECKING:
    from torch import Tensor, nn

    from evm_deploy.model.efficientvmamba.network import Architecture

BACKBONE = "backbone."
PAD_TO = 32
FEATURES_HINT = "export the feature maps of its backbone with --head features"


@dataclass
class SourcedSettings:
    """Reader of settings that remembers where each came from. found: name -> {value, from}."""

    training: TrainingSettings

    def __post_init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def value(self, name: str, path: str, kind: Any, default: Any) -> Any:
        """Return the value at `path` of the configuration, else the default."""
        value = self.training.get(path, kind)
        return self.take(name, default if value is None else value, "default" if value is None else f"meta.cfg {path}")

    def take(self, name: str, value: Any, source: str) -> Any:
        """Record a value with its source, and return it."""
        self.found[name] = {"value": value, "from": source}
        return value


def load_downstream(
    raw: RawCheckpoint,
    options: LoadOptions,
    kind: str,
    head: str,
    load: Callable[[RawCheckpoint], Network],
) -> Network:
    """Load the backbone alone for head `features`, else the whole network with `load`.

    kind: noun for the network in messages. head: the network's own value of --head. Raises CheckpointError for another
    head, and for a backbone that is not EfficientVMamba.
    """
    if options.head == "features":
        return checkpoint.load(backbone_of(raw), options)
    if options.head not in (None, head):
        raise CheckpointError(
            f"checkpoint {raw.path} holds a {kind}, which has no head '{options.head}'",
            "leave --head out, or export the feature maps of its backbone with --head features",
        )
    inner = rename(backbone_of(raw), checkpoint.RENAMES).tensors
    if "patch_embed.0.weight" not in inner:
        raise CheckpointError(
            f"checkpoint {raw.path} holds a {kind} whose backbone is not EfficientVMamba",
            "export a network of your own with --model",
        )
    rest = {key: value for key, value in raw.tensors.items() if not key.startswith(BACKBONE)}
    return load(replace(raw, tensors={**{BACKBONE + key: value for key, value in inner.items()}, **rest}))


def inner_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the backbone under their names in it."""
    return {key.removeprefix(BACKBONE): value for key, value in tensors.items() if key.startswith(BACKBONE)}


def backbone_of(raw: RawCheckpoint) -> RawCheckpoint:
    """Return the checkpoint of the backbone alone."""
    other = [key for key in raw.tensors if not key.startswith(BACKBONE)]
    return replace(
        raw, tensors=inner_tensors(raw.tensors), prefix=raw.prefix + BACKBONE, dropped=[*raw.dropped, *other]
    )


def backbone_architecture(raw: RawCheckpoint) -> Architecture:
    """Infer the sizes of the backbone, which has no classifier. Raises CheckpointError."""
    return replace(checkpoint.infer_architecture(raw.path, inner_tensors(raw.tensors)), num_classes=0)


def shape_of(raw: RawCheckpoint, key: str, network: str, rank: int = 4) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises CheckpointError, naming the network, if it is missing or of another rank."""
    if key not in raw.tensors or raw.tensors[key].dim() != rank:
        found = f"is {list(raw.tensors[key].shape)}" if key in raw.tensors else "is missing"
        raise CheckpointError(
            f"checkpoint {raw.path}: {key} {found}, a {network} has it with {rank} axes",
            "the file holds a part of the network, or another one",
        )
    return tuple(raw.tensors[key].shape)


def count_of(raw: RawCheckpoint, prefix: str, suffix: str = "conv.weight") -> int:
    """Return the number of modules of a list: `prefix`0.`suffix` and so on. Raises CheckpointError for gaps."""
    pattern = rf"{re.escape(prefix)}(\d+)\.{re.escape(suffix)}"
    found = {int(match[1]) for key in raw.tensors if (match := re.fullmatch(pattern, key))}
    if found != set(range(len(found))):
        raise CheckpointError(f"checkpoint {raw.path}: numbers {sorted(found)[:6]} of {prefix}* have gaps")
    return len(found)


def refuse(raw: RawCheckpoint, odd: Mapping[str, bool]) -> None:
    """Raise CheckpointError listing the settings, by their texts, that are true in `odd`: they are not supported.

    Images in the order BGR are refused for every network.
    """
    every = {"images in the order BGR": raw.training.get("model.data_preprocessor.bgr_to_rgb", bool) is False, **odd}
    found = [what for what, is_so in every.items() if is_so]
    if found:
        raise CheckpointError(
            f"checkpoint {raw.path}: its configuration asks for {' and '.join(found)}, which is not supported",
            FEATURES_HINT,
        )


def drop_unused(raw: RawCheckpoint, stages: tuple[int, ...]) -> None:
    """Drop the backbone's classifier, and norms of maps that nothing reads."""
    norms = tuple(f"{BACKBONE}outnorm{i}." for i in range(checkpoint.STAGES) if i not in stages)
    for key in [key for key in raw.tensors if key.startswith((f"{BACKBONE}classifier.", *norms))]:
        raw.dropped.append(key)
        del raw.tensors[key]


def preprocessing_defaults(training: TrainingSettings) -> dict[str, Any]:
    """Return preprocessing and labels of the training run: of the file, else as mmdet and mmseg do it by default.

    An image is resized to fit into `scale` (long, short side), and padded to a multiple of PAD_TO.
    """
    found: dict[str, Any] = {"labels": list(training.classes)} if training.classes else {}
    steps = training.get("test_pipeline", list) or []
    resizes = [step for step in steps if isinstance(step, Mapping) and step.get("type") == "Resize"]
    resize = TrainingSettings(resizes[0]) if len(resizes) == 1 else TrainingSettings()
    found |= {"resize": "stretch" if resize.get("keep_ratio") is False else "pad", "interpolation": "bilinear-opencv"}
    scale = resize.numbers("scale", 2)
    if scale and min(scale) >= 1:
        sides = (min(scale), max(scale)) if found["resize"] == "pad" else scale[::-1]
        found["imgsz"] = "x".join(str(-(-int(side) // PAD_TO) * PAD_TO) for side in sides)
    for name in ("mean", "std"):
        values = training.numbers(f"model.data_preprocessor.{name}", 3)
        if values:
            found[name] = tuple(value / 255 for value in values)
    return found


def spec_of(raw: RawCheckpoint, arch: Architecture, model: nn.Module, **facts: Any) -> ModelSpec:
    """Return the facts about a loaded network. facts: fields of ModelSpec; `blocks` are those beside the backbone."""
    blocks = (*(BACKBONE + path for path in block_paths(model.get_submodule("backbone"))), *facts.pop("blocks"))
    return ModelSpec(
        name=network_name(raw),
        variant=arch.variant,
        parameters=sum(p.numel() for p in model.parameters()),
        checkpoint=raw.facts(),
        min_pixels=checkpoint.MIN_PIXELS,
        blocks=blocks,
        notes=tuple(raw.notes),
        details={"architecture": asdict(arch), **facts.pop("details")},
        **facts,
    )
