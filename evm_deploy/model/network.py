"""The network to export, the facts about it (ModelSpec), and the interface of a model family."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from evm_deploy._util.text import count_text
from evm_deploy._util.values import listed, text
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from evm_deploy.model.state_dict import RawCheckpoint


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a network that export, calibration, manifests and reports use.

    name: name of the network's bundles. family: the kind of network, as people write it. variant: the size within the
    family, or empty. task: name of a Task in `tasks`. outputs: names of the module's outputs, in order. num_classes:
    number of classes of a classifier, else 0. channels: channels of the input. checkpoint: file, sha256, and which
    weights in it were loaded. min_pixels: smallest side of an image. blocks: paths of the modules that can stay in
    float as a whole. keep_float: paths of the modules whose layers are never quantised. weight_only: paths of the
    modules whose weights become int8 while their inputs stay in float. In every network the layers that write a scan's
    delta, B and C stay in float; float_around_scans: so do the layers that write its u and read its y. regions: whether
    a second stage crops regions from feature maps (RoIAlign), as in Mask R-CNN. defaults: imgsz, resize, crop_pct,
    interpolation, mean, std and labels saved with the weights. details: further facts of the family.
    """

    name: str
    family: str
    task: str
    outputs: tuple[str, ...]
    checkpoint: dict[str, Any]
    parameters: int
    num_classes: int = 0
    channels: int = 3
    variant: str = ""
    min_pixels: int = 1
    blocks: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    weight_only: tuple[str, ...] = ()
    float_around_scans: bool = False
    regions: bool = False
    notes: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class Network(NamedTuple):
    """A float32 module in eval mode and the facts about it.

    The module takes normalised images (b, channels, H, W) and returns tensors: one, or tuples, lists and dicts of
    tensors.
    """

    module: nn.Module
    spec: ModelSpec

    @classmethod
    def of(
        cls,
        module: nn.Module,
        example: Tensor | None = None,
        *,
        outputs: Sequence[str] | None = None,
        name: str = "",
        task: str = "raw",
        run: bool = False,
        **facts: Any,
    ) -> Network:
        """Return a Network made of any torch module; the module is put into eval mode, without gradients.

        example: an input (b, channels, H, W). Its size becomes the default of --imgsz. outputs: names of the module's
        outputs, in order. name: name of the bundles, by default the class name in lower case. facts: further fields of
        ModelSpec; `blocks` is by default `default_blocks(module)`, `float_around_scans` True. Preprocessing, channels
        and labels are those of the module's `pretrained_cfg` or `default_cfg`, if it has one (`foreign.saved`).

        With an example, without outputs, and with `run`, the module is run (`foreign.look.look_at`): on the example, by
        default noise of the module's own size, else of 224x224. Outputs are then named by the keys of a dict, `logits`
        for a single one of rank 2, and else by number. Raises UsageError for a module that cannot be exported, with the
        reason, such as parameters that are not float32 on the CPU.
        """
        outputs = None if outputs is None else listed("outputs", outputs, text)
        from evm_deploy.model.foreign.saved import saved_in

        _check_float32(module)
        _check_example(example, facts.get("channels"))
        saved = saved_in(module, facts.get("channels") if example is None else example.shape[1])
        channels = saved.channels
        found: dict[str, Any] = {"defaults": saved.defaults, "channels": channels}
        notes = [*([_EVAL_NOTE] if module.training else []), *saved.notes]
        module.eval().requires_grad_(False)
        if example is not None or outputs is None or run:
            tried = _noise(saved.defaults, channels) if example is None else example
            outputs, seen = _looked_at(module, tried, outputs, task)
            notes += seen.pop("notes")
            found.update(seen)
        if example is not None:
            found["defaults"] = {**saved.defaults, "imgsz": "{}x{}".format(*example.shape[2:])}
        facts = {**found, **facts, "notes": (*notes, *facts.get("notes", ()))}
        family = type(module).__name__
        spec = ModelSpec(
            name=name or family.lower(),
            family=family,
            task=task,
            outputs=tuple(outputs),
            checkpoint={"file": "", "sha256": weights_sha256(module), "container": "module", "dropped": []},
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            **{"blocks": tuple(default_blocks(module)), "float_around_scans": True, **facts},
        )
        return cls(module, spec)


_EVAL_NOTE = "the module was in training mode: it was exported in eval mode"
_NO_SCAN_NOTE = "the network has no scan that evm-deploy knows: standard operations only"


def _noise(defaults: Mapping[str, Any], channels: int) -> Tensor:
    """Return noise (1, channels, H, W) of the size in `defaults`, else of 224x224."""
    import torch

    height, _, width = defaults.get("imgsz", "224x224").partition("x")
    return torch.rand(1, channels, int(height), int(width), generator=torch.Generator().manual_seed(0))


def _check_example(example: Tensor | None, channels: int | None) -> None:
    """Raise UsageError for an example that is no batch of images, or has another number of channels."""
    if example is None:
        return
    if example.dim() != 4 or 0 in example.shape or not example.is_floating_point():
        raise UsageError(
            f"the example input is {example.dtype} {list(example.shape)}: networks of images take float (b, channels, "
            "H, W)",
            "wrap a module of other inputs in one that takes an image",
        )
    if channels not in (None, example.shape[1]):
        raise UsageError(
            f"the example input {list(example.shape)} has {count_text(example.shape[1], 'channel')}, not {channels}"
        )


def _looked_at(
    module: nn.Module, example: Tensor, outputs: Sequence[str] | None, task: str
) -> tuple[Sequence[str], dict[str, Any]]:
    """Run the module. Returns the names of its outputs, and fields of ModelSpec."""
    from evm_deploy.model.foreign.look import look_at

    look = look_at(module, example)
    tensors = [*look.outputs.values()]
    if outputs is None:
        single = [*look.outputs] == ["output"] and tensors[0].dim() == 2
        outputs = ["logits"] if single else [*look.outputs]
    if len(outputs) != len(tensors):
        raise UsageError(
            f"the network has {len(tensors)} outputs ({', '.join(look.outputs)}), but {len(outputs)} names were given",
            "give one name for each output",
        )
    notes = [] if look.scans or look.chunked else [_NO_SCAN_NOTE]
    if look.chunked:
        notes.append(f"Mamba-2 scans: {look.chunked}, in standard operations, chunk by chunk, without a native kernel")
    notes += [
        f"{place} reads the value of a tensor: an artifact keeps the value of a test input" for place in look.reads
    ]
    classes = {"num_classes": int(tensors[0].shape[-1])} if task == "classification" else {}
    return outputs, {"notes": notes, **classes}


def _check_float32(module: nn.Module) -> None:
    import torch

    for key, value in (*module.named_parameters(), *module.named_buffers()):
        wrong_type = value.is_floating_point() and value.dtype != torch.float32
        if wrong_type or value.device.type != "cpu":
            raise UsageError(
                f"{key} of the module is {str(value.dtype).removeprefix('torch.')} on {value.device}; a Network is "
                "float32 on the CPU",
                "pass module.float().cpu()",
            )


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading a checkpoint.

    head: value of --head; None for the whole network.
    """

    head: str | None = None


@dataclass(frozen=True)
class Family:
    """A kind of network that is loaded from a checkpoint file.

    anchors: names of tensors, one of which every checkpoint of the family has: `model.weight_sets` finds weights by
    them. `load(raw, options)` raises CheckpointError if the checkpoint is damaged or lacks a part of the network.
    """

    name: str
    anchors: tuple[str, ...]
    load: Callable[[RawCheckpoint, LoadOptions], Network]


def default_blocks(module: nn.Module) -> Iterator[str]:
    """Yield the paths of the children of the innermost lists of blocks: layers.0.blocks.1, layers.3.

    A list is a ModuleList, or a Sequential of which a child has children. A child that contains a further list is
    replaced by the children of that list.
    """
    from torch import nn

    def is_list(each: nn.Module) -> bool:
        nested = isinstance(each, nn.Sequential) and any(any(child.children()) for child in each.children())
        return nested or isinstance(each, nn.ModuleList)

    lists = [path for path, each in module.named_modules() if is_list(each)]
    for path in lists:
        children = (f"{path}.{name}".lstrip(".") for name, _ in module.get_submodule(path).named_children())
        yield from (child for child in children if not any(f"{each}.".startswith(f"{child}.") for each in lists))


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 hex digest of a module's parameters and buffers: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
