"""Read a checkpoint file into the plain state dict of one network: the chosen weights, without prefixes and stray keys.

No code in the file is executed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy.errors import CheckpointError
from evm_deploy.model.checkpoint_file import Content
from evm_deploy.model.openmmlab import TrainingSettings
from evm_deploy.model.weight_sets import (
    Weights,
    WeightSet,
    choose,
    find_weights,
    is_tensor,
    kind_of,
    leaves,
    some,
)

if TYPE_CHECKING:
    from torch import Tensor

STRAY = ("total_ops", "total_params")  # buffers that the profiler thop leaves in a model
# Beside a network, by the first part of the name: heads and losses of the training alone, and counters of metrics
BESIDE = re.compile(
    r"(?:\w+_)?(?:aux|auxiliary|loss|losses|loss_fn|criterion|criteria|metrics?|accuracy|acc\d?|pos_weight"
    r"|class_weights?|n_averaged|num_updates|optimizer)(?:_\w+|\d+)?(?:\.|$)",
    re.IGNORECASE,
)
SUFFIXES = (".safetensors.index.json", ".bin.index.json", ".pth.tar", ".safetensors")
SHORT_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".tar", ".pkl")
MAX_NAME = 96  # bytes; bundles append target, precision and sizes, temporary files a number: 255 in all


@dataclass
class RawCheckpoint:
    """The state dict of one network without the prefixes of training tools, and facts about its file.

    container: path of the dict in the file that holds it. prefix: what stands in front of the names in that dict.
    weights: `ema` if the tensors are averaged weights, else `raw`. others: the other sets of weights in the file.
    dropped: keys of the file that were left out; `optimizer.*` stands for all that a dict holds. origin: file that this
    one was converted from. training: settings of the run of mmengine that wrote the file.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    container: str
    prefix: str = ""
    weights: str = "raw"
    others: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def facts(self) -> dict[str, Any]:
        """Return the facts about the file for `ModelSpec.checkpoint`."""
        return {
            "file": printable_name(self.path.name),
            "sha256": self.sha256,
            "container": self.container,
            "prefix": self.prefix,
            "weights": self.weights,
            "others": self.others,
            "dropped": sorted(self.dropped),
            **({"origin": self.origin} if self.origin else {}),
        }


def take_weights(
    content: Content, anchors: Iterable[str], weights: str = "ema", drop: Sequence[str] = ()
) -> RawCheckpoint | None:
    """Return the weights of a network in the content of a file; None if the file holds none of the family's anchors.

    anchors: `Family.anchors`. weights: `ema` takes averaged weights where the file has them, `raw` the other weights;
    the name of a set takes that one. drop: shell patterns of keys to leave out. Raises CheckpointError if the choice is
    not clear, or if a pattern fits no key.
    """
    drop = (drop,) if isinstance(drop, str) else tuple(drop)
    found = find_weights(content.path, content.value, tuple(anchors))
    if not found.sets:
        return None
    for each in found.sets if content.origin else ():
        each.kind = content.origin["weights"]
    chosen, others = choose(found, weights)
    raw = RawCheckpoint(
        content.path,
        {},
        content.sha256,
        chosen.container,
        prefix=chosen.prefix.removeprefix(chosen.owner),
        weights=chosen.kind,
        others=[each.name for each in others],
        dropped=_outside(found, [chosen, *others], chosen.owner),
        notes=[*content.notes, *found.notes],
        metadata=content.metadata,
        origin=content.origin,
        training=content.training,
    )
    if others:
        raw.notes.append(f"weights taken: {chosen}; also in the file: {some([str(each) for each in others])}")
    unknown = found.unknown_averages()
    if chosen.kind == "raw" and len(unknown) > len(chosen.leaves) // 2:
        names = f"'{unknown[0]:.120}' and {len(unknown) - 1} more tensors"
        raw.notes.append(f"{names} seem to be averaged weights, under names that fit no network: not taken")
    _keep(raw, chosen, drop)
    return raw


def _outside(found: Weights, sets: Sequence[WeightSet], owner: str) -> list[str]:
    """Return the tensors of the file that belong to no set: by key in the dict `owner`, by path outside of it."""
    inside = {leaf.name for each in sets for leaf in each.leaves.values()}
    names: dict[str, None] = {}
    for leaf in found.values:
        if is_tensor(leaf.value) and leaf.name not in inside:
            top = leaf.name.partition(".")[0]
            nested = leaf.owner.startswith(f"{top}.") and leaf.owner != owner
            names[f"{top}.*" if nested else leaf.name.removeprefix(owner)] = None
    return list(names)


def _keep(raw: RawCheckpoint, chosen: WeightSet, drop: Sequence[str]) -> None:
    """Put the tensors into `raw` that are neither stray nor fit a pattern. Raises CheckpointError for idle patterns."""
    if all(leaf.value.numel() == 0 for leaf in chosen.leaves.values()):
        raise CheckpointError(
            f"checkpoint {raw.path}: the tensors of {chosen} are empty, as DeepSpeed's ZeRO stage 3 saves them",
            "join the weights with the script zero_to_fp32.py in the checkpoint's folder, and give its result",
        )
    idle = set(drop)
    for name, leaf in chosen.leaves.items():
        fitting = [each for each in drop if any(fnmatchcase(key, each) for key in (name, leaf.key, leaf.name))]
        idle.difference_update(fitting)
        if fitting or name.rpartition(".")[2] in STRAY:
            raw.dropped.append(leaf.key)
        else:
            _refuse_odd_storage(raw.path, name, leaf.value)
            raw.tensors[name] = leaf.value
    idle -= {each for each in idle if any(fnmatchcase(key, each) for key in raw.dropped)}
    if idle:
        raise CheckpointError(
            f"checkpoint {raw.path}: --drop {min(idle)!r} fits no key; the keys are {some(sorted(chosen.leaves))}",
            "patterns are those of a shell, for whole keys: --drop 'aux_head.*'",
        )


def _refuse_odd_storage(path: Path, key: str, tensor: Tensor) -> None:
    """Raise CheckpointError for a sparse, quantised or complex tensor, or a view larger than its storage."""
    import torch

    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
    if not plain:
        raise CheckpointError(
            f"checkpoint {path}: {key} is {tensor.dtype}, {tensor.layout}; expected a dense float tensor"
        )
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CheckpointError(f"checkpoint {path}: {key} claims more values than the file holds")


def drop_beside(raw: RawCheckpoint, expected: Collection[str]) -> None:
    """Move tensors to `raw.dropped` that are not expected and that only the training needs: losses, auxiliary heads."""
    for name in [name for name in raw.tensors if name not in expected]:
        if BESIDE.match(name) or kind_of(name.partition(".")[0]) == "ema":
            raw.dropped.append(name)
            del raw.tensors[name]


def no_weights(content: Content, families: Iterable[str]) -> CheckpointError:
    """Return the error for a file that holds no network of the known families."""
    path, value = content.path, content.value
    named = [leaf.name for leaf in leaves(value) if is_tensor(leaf.value)]
    if named:
        return CheckpointError(
            f"checkpoint {path} holds no network of a known family ({', '.join(families)}): its {len(named)} tensors "
            f"are {some(sorted(named))}",
            "save it with FULL_STATE_DICT" if any(each.endswith("flat_param") for each in named) else "",
        )
    if isinstance(value, dict):
        keys = ", ".join(f"{key!s:.80}" for key in sorted(map(str, value))[:8])
        return CheckpointError(
            f"checkpoint {path} holds no state dict: there is no tensor in it; its keys: {keys}",
            "save model.state_dict() instead",
        )
    return CheckpointError(
        f"checkpoint {path} holds a {type(value).__name__}, not a state dict", "save model.state_dict() instead"
    )


def rename(raw: RawCheckpoint, patterns: Sequence[tuple[re.Pattern[str], str]]) -> RawCheckpoint:
    """Return the checkpoint with its keys renamed: the replacement of every pattern is applied, in order.

    Raises CheckpointError if two keys get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in raw.tensors.items():
        name = key
        for pattern, replacement in patterns:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise CheckpointError(f"checkpoint {raw.path}: two keys stand for '{name}', one of them is '{key}'")
        renamed[name] = tensor
    return replace(raw, tensors=renamed)


def network_name(raw: RawCheckpoint) -> str:
    """Return the name of a checkpoint's network. A name other than the file's is a note of the checkpoint."""
    name = short_name(raw.path.name)
    if name != stem(raw.path.name):
        raw.notes.append(f"the file's name is too long, or not UTF-8: the network is called {name}")
    return name


def short_name(file: str) -> str:
    """Return the name of a checkpoint file without its suffix, in UTF-8, at most MAX_NAME bytes."""
    return printable_name(stem(file)).encode("utf-8")[:MAX_NAME].decode("utf-8", "ignore")


def stem(name: str) -> str:
    """Return the name of a checkpoint file without its suffix, and without the number of a shard."""
    lower = name.lower()
    suffix = next((each for each in (*SUFFIXES, *SHORT_SUFFIXES) if lower.endswith(each) and lower != each), "")
    return re.sub(r"(?<=.)-\d{5}-of-\d{5}$", "", name[: len(name) - len(suffix)])


def printable_name(name: str) -> str:
    """Return a file name with `_` in place of bytes that are not UTF-8."""
    return re.sub("[\ud800-\udfff]", "_", name)
