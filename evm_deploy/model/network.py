"""A network to export and the plain facts about it: what every step after loading works with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from evm_deploy.model.state_dict import RawCheckpoint


@dataclass(frozen=True)
class ModelSpec:
    """Plain facts about a network: all that export, calibration, manifests and reports need to know of it.

    name: of its bundles. family: the kind of network, as people write it; variant: its size in the family, or empty.
    task: name of a Task in `tasks`. outputs: names, in the order in which the module gives them. num_classes: of a
    classifier, else 0. checkpoint: file, sha256, container and weights that it came from. min_pixels: least image side.
    blocks: paths of the modules that fall back to float as a whole. keep_float: paths of modules whose layers are never
    quantised; weight_only: the same, but their weights become int8. The layers that write a scan's delta, B and C stay
    in float in every network. defaults: imgsz, crop_pct, mean, std, labels saved with the weights. details: facts of
    the family's own.
    """

    name: str
    family: str
    task: str
    outputs: tuple[str, ...]
    checkpoint: dict[str, Any]
    parameters: int
    num_classes: int = 0
    variant: str = ""
    min_pixels: int = 1
    blocks: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    weight_only: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class Network(NamedTuple):
    """A float32 module in eval mode, normalised images (b, 3, H, W) in, one tensor or a tuple out; and its facts."""

    module: nn.Module
    spec: ModelSpec

    @classmethod
    def of(
        cls, module: nn.Module, *, outputs: Sequence[str], name: str = "", task: str = "raw", **facts: Any
    ) -> Network:
        """A network of any module. facts: further fields of ModelSpec; `blocks` are by default `default_blocks`.

        outputs: names of what the module gives, in order. name: of its bundles, by default the class in lower case.
        """
        family = type(module).__name__
        spec = ModelSpec(
            name=name or family.lower(),
            family=family,
            task=task,
            outputs=tuple(outputs),
            checkpoint={"file": "", "sha256": weights_sha256(module), "container": "module", "dropped": []},
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            **{"blocks": tuple(default_blocks(module)), **facts},
        )
        return cls(module.eval().requires_grad_(False), spec)


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded. head: logits, probs or features. weights: `ema` prefers averaged ones, or `raw`."""

    head: str = "logits"
    weights: str = "ema"


@dataclass(frozen=True)
class Family:
    """A kind of network that comes as a checkpoint file.

    `claims(raw)`: the task that the file holds, or None where it is of another family. `load(raw, options)` raises
    CheckpointError for what is damaged, or misses a part of the network.
    """

    name: str
    claims: Callable[[RawCheckpoint], str | None]
    load: Callable[[RawCheckpoint, LoadOptions], Network]


def default_blocks(module: nn.Module) -> Iterator[str]:
    """Paths of the children of the innermost ModuleLists and Sequentials in them: layers.0.blocks.1, layers.3."""
    from torch import nn

    lists = [path for path, each in module.named_modules() if isinstance(each, nn.ModuleList)]
    for path in lists:
        children = (f"{path}.{name}" for name, _ in module.get_submodule(path).named_children())
        yield from (child for child in children if not any(each.startswith(child + ".") for each in lists))


def weights_sha256(module: nn.Module) -> str:
    """Hex digest of a module's parameters and buffers, names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
