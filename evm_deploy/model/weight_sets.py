"""Find the weights of a network in the content of a checkpoint file, and choose one of several sets.

Training tools save a network under names of their own, wrap it in other modules, and save averaged weights beside it.
A set of weights is found by the tensors that every network of a family has (`Family.anchors`): everything in front of
such a name, in the dicts around it and in the name itself, is the set's prefix.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Modules around another: DDP, torch.compile, FSDP, activation checkpointing, Lightning's strategies
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
WRAPPED = rf"(?:(?:{'|'.join(WRAPPERS)})\.)*"
BUFFERS = re.compile(r"(?:^|\.)(?:running_mean|running_var|num_batches_tracked)$")
# Words in names of containers and modules. The innermost word decides: ema.online_model holds raw weights.
KINDS = re.compile(
    r"(?P<ema>(?<![a-z])(?:ema|swa|avg|averag\w*?|shadow|polyak|teacher)(?![a-z])"
    r"|(?:model|net|weights|params)ema(?![a-z])|(?<![a-z])ema(?:model|net|weights|params|state|callback))"
    r"|(?P<raw>(?<![a-z])(?:online|student|current|raw)(?![a-z]))"
)
OPTIMIZER = re.compile(r"(?:^|[._])(?:optim\w*|exp_avgs?|exp_avg_sqs?|momentum_buffers?|grads?|gradients?)(?:[._]|$)")
JOINERS = ("_", "")  # in place of the dots of a name: EMAHook of mmcv, LitEma of latent diffusion
MAX_DEPTH = 12  # of dicts and lists in each other
LISTED = 6  # number of keys of each kind that an error message shows
WORDS = {"ema": "averaged", "raw": "raw"}


@dataclass(frozen=True)
class Leaf:
    """Value in the content of a file. owner: path of the dict or list that holds it; empty, or ending with a dot."""

    owner: str
    key: str
    value: Any

    @property
    def name(self) -> str:
        """Whole path in the file."""
        return self.owner + self.key


@dataclass
class WeightSet:
    """Weights of one network in a file.

    prefix: path in the file in front of every name. owner: the part of `prefix` that is the path of a dict. kind: `ema`
    for weights that are marked as averaged, else `raw`. leaves: tensors by name, without prefix and wrappers.
    """

    prefix: str
    owner: str
    kind: str
    leaves: dict[str, Leaf]

    @property
    def name(self) -> str:
        """Path of the set in the file, as `--weights` takes it."""
        return self.prefix.rstrip("._") or "file"

    @property
    def container(self) -> str:
        """Path of the dict that holds the tensors; `file` for the file itself."""
        return self.owner.rstrip(".") or "file"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without prefix and wrappers."""
        return {name: leaf.value for name, leaf in self.leaves.items()}

    def __str__(self) -> str:
        return f"'{self.name:.120}' ({WORDS[self.kind]})"


@dataclass
class Weights:
    """All values in a file, and the sets of a family's weights among them.

    left_out: averages that had not begun. notes: remarks on the sets, for users.
    """

    path: Path
    values: list[Leaf]
    sets: list[WeightSet]
    left_out: list[WeightSet] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def unknown_averages(self) -> list[str]:
        """Return the paths of tensors that are called averaged, and belong to no set."""
        known = {leaf.name for each in (*self.sets, *self.left_out) for leaf in each.leaves.values()}
        return [
            leaf.name
            for leaf in self.values
            if leaf.name not in known and kind_of(leaf.name) == "ema" and is_tensor(leaf.value)
        ]


def some(keys: list[str]) -> str:
    """Return the first LISTED names as text, and the number of the others."""
    rest = f", and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(key[:200] for key in keys[:LISTED]) + rest


def is_tensor(value: object) -> bool:
    """Test whether a value is a tensor of torch."""
    import torch

    return isinstance(value, torch.Tensor)


def leaves(content: Any) -> list[Leaf]:
    """Return every value in nested dicts and lists, in order. A dict or list that occurs twice counts once."""
    found: list[Leaf] = []
    seen: set[int] = set()

    def walk(value: Any, owner: str, depth: int) -> None:
        if id(value) in seen or depth > MAX_DEPTH:
            return
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, Mapping | list | tuple):
                walk(item, f"{owner}{key}.", depth + 1)
            else:
                found.append(Leaf(owner, str(key), item))

    walk(content if isinstance(content, Mapping | list | tuple) else [content], "", 0)
    return found


def find_weights(path: Path, content: Any, anchors: Iterable[str]) -> Weights:
    """Return every set of weights that holds one of the anchors, in the file's order.

    anchors: names of tensors, one of which every network of a family has. Raises CheckpointError if two tensors of a
    set have the same name.
    """
    values = leaves(content)
    tensors = {each.name: each for each in values if is_tensor(each.value) and not OPTIMIZER.search(each.owner)}
    sets = _plain_sets(path, tensors, anchors)
    for each in list(sets):
        sets += _renamed_sets(each, tensors, anchors)
        sets += _listed_sets(each, tensors)
    weights = Weights(path, values, sets)
    _correct_kinds(weights)
    return weights


def _plain_sets(path: Path, tensors: Mapping[str, Leaf], anchors: Iterable[str]) -> list[WeightSet]:
    """Return the sets whose names are whole behind a prefix, apart from wrappers between their parts."""
    tails = (rf"\.{WRAPPED}".join(map(re.escape, anchor.split("."))) for anchor in anchors)
    pattern = re.compile(rf"(?P<prefix>(?:.*\.)?)(?:{'|'.join(tails)})", re.DOTALL)
    sets: dict[str, WeightSet] = {}
    nested: set[str] = set()  # prefixes of sets whose names are spread over several dicts: {"patch_embed": {"0": ..
    for leaf in tensors.values():
        if match := pattern.fullmatch(leaf.name):
            prefix = match["prefix"]
            nested |= set() if prefix.startswith(leaf.owner) else {prefix}
            owner = prefix if prefix in nested else leaf.owner
            sets.setdefault(prefix, WeightSet(prefix, owner, kind_of(prefix), {}))
    nearest_first = sorted(sets.values(), key=lambda each: -len(each.prefix))
    for leaf in tensors.values():
        for each in nearest_first:
            if leaf.name.startswith(each.prefix) and (leaf.owner == each.owner or each.prefix in nested):
                name = plain_name(leaf.name.removeprefix(each.prefix))
                if name in each.leaves and each.leaves[name].value is not leaf.value:
                    raise CheckpointError(
                        f"checkpoint {path}: two keys stand for '{name:.120}', one of them is '{leaf.name:.120}'"
                    )
                each.leaves[name] = leaf
                break
    return list(sets.values())


def _renamed_sets(known: WeightSet, tensors: Mapping[str, Leaf], anchors: Iterable[str]) -> Iterator[WeightSet]:
    """Yield sets with the names of a known set in which something else than a dot joins the parts.

    Such tensors are buffers of a module, whose names cannot have dots. Those of mmcv's EMAHook, with `ema_` in front,
    hold the raw weights: the hook swaps them with the parameters before a checkpoint is saved.
    """
    anchor = next((each for each in anchors if each in known.leaves), "")
    for joiner in JOINERS:
        tail = anchor.replace(".", joiner)
        for name in [name for name in tensors if anchor and name.endswith(tail)]:
            prefix = name.removesuffix(tail)
            own = {each: leaf for each, leaf in known.leaves.items() if not leaf.name.startswith(prefix)}
            found = {each: tensors.get(prefix + each.replace(".", joiner)) for each in own}
            kept = {each: leaf for each, leaf in found.items() if leaf}
            if any(not BUFFERS.search(each) for each in found.keys() - kept.keys()):
                continue
            swapped = joiner == "_" and re.search(r"(?:^|\.)ema_", prefix)
            if swapped:
                known.kind = "ema"
            known.leaves = own
            yield WeightSet(prefix, tensors[name].owner, "raw" if swapped else kind_of(prefix), kept)


def _listed_sets(known: WeightSet, tensors: Mapping[str, Leaf]) -> Iterator[WeightSet]:
    """Yield averaged weights that are a list, without names, in the order of the parameters around a known set."""
    around = [leaf for leaf in tensors.values() if leaf.owner == known.owner and not BUFFERS.search(leaf.key)]
    names = {leaf.name: name for name, leaf in known.leaves.items()}
    for owner, listed in averaged_lists(tensors.values()).items():
        if [leaf.value.shape for leaf in listed] == [leaf.value.shape for leaf in around]:
            pairs = zip(around, listed, strict=True)
            yield WeightSet(owner, owner, "ema", {names[a.name]: b for a, b in pairs if a.name in names})


def averaged_lists(tensors: Iterable[Leaf]) -> dict[str, list[Leaf]]:
    """Return the lists of tensors whose path says that they are averaged, such as ema.shadow_params, by path."""
    found: dict[str, list[Leaf]] = {}
    for leaf in tensors:
        if leaf.key.isdecimal() and kind_of(leaf.owner) == "ema":
            found.setdefault(leaf.owner, []).append(leaf)
    return {owner: listed for owner, listed in found.items() if len(listed) > 1}


def kind_of(prefix: str) -> str:
    """Return `ema` if a path says that the weights in it are averaged, else `raw`."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", prefix).lower()
    last = next(reversed([match.lastgroup for match in KINDS.finditer(text)]), None)
    return last or "raw"


def plain_name(name: str) -> str:
    """Return the name of a tensor without the wrappers between its parts."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _correct_kinds(weights: Weights) -> None:
    """Correct the kinds of sets for tools whose names do not say what they hold.

    AveragedModel of torch has the buffer `n_averaged` beside its `module`. EMAHook of mmengine and WeightAveraging of
    Lightning move the averaged weights to `state_dict`, so that deployment finds them, and the raw ones to another key.
    Averages that had not begun are left out: they hold the weights before training.
    """
    values = {leaf.name: leaf.value for leaf in weights.values}
    owners = {each.container for each in weights.sets}
    mmengine = "ema_state_dict" in owners and ("ema_state_dict.steps" in values or "meta.mmengine_version" in values)
    lightning = "current_model_state" in owners
    for each in list(weights.sets):
        counters = [path + "n_averaged" for path in _above(each.prefix)]
        if each.container == "ema_state_dict" and mmengine:
            each.kind = "raw"
        elif each.container == "state_dict" and (mmengine or lightning) and kind_of(each.prefix) == "raw":
            each.kind = "ema"
            counters.append("averaging_state.n_averaged")
        elif any(path + "n_averaged" in values for path in _above(each.prefix) if f"{path}module." in each.prefix):
            each.kind = "ema"
        if each.kind == "ema" and len(weights.sets) > 1 and any(_is_zero(values.get(name)) for name in counters):
            weights.sets.remove(each)
            weights.left_out.append(each)
            weights.notes.append(f"{each} left out: its n_averaged is 0, so averaging had not begun")


def _above(prefix: str) -> list[str]:
    """Return the paths of the dicts and modules around a prefix: a., a.b. and the empty path for a.b.c."""
    return ["", *(prefix[: dot.end()] for dot in re.finditer(r"\.", prefix[:-1]))]


def _is_zero(value: Any) -> bool:
    """Test whether a counter, as a number or a tensor, is zero."""
    if is_tensor(value):
        return value.numel() == 1 and not value.is_sparse and bool(value.item() == 0)
    return isinstance(value, int | float) and value == 0


def _equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    import torch

    def whole(tensor: Tensor) -> bool:  # neither sparse nor a view larger than its storage
        return (
            tensor.layout == torch.strided
            and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        )

    return ours.keys() == theirs.keys() and all(
        a is b or (a.dtype == b.dtype and a.shape == b.shape and whole(a) and whole(b) and torch.equal(a, b))
        for a, b in ((tensor, theirs[name]) for name, tensor in ours.items())
    )


def choose(weights: Weights, wanted: str) -> tuple[WeightSet, list[WeightSet]]:
    """Return the set of weights to load, and the other sets.

    wanted: `ema` takes the averaged weights, or the only weights; `raw` the weights that are not averaged; else the
    name of a set. Buffers that an average lacks come from the raw weights. Raises CheckpointError if no set or several
    sets fit, or if averaged and raw weights have different shapes.
    """
    sets, path = weights.sets, weights.path
    listed = "; ".join(map(str, sets[:LISTED])) + (f"; and {len(sets) - LISTED} more" if len(sets) > LISTED else "")
    flag = f"--weights {shlex.quote(sets[0].name)}"
    hint = f"choose one by its name:  {flag}  or write it to a file of its own:  evm-export convert CKPT {flag}"
    if wanted not in tuple(WORDS):
        fit = [each for each in sets if each.name == wanted]
        if not fit:
            raise CheckpointError(f"checkpoint {path} has no weights '{wanted!s:.80}'; it has: {listed}", hint)
    else:
        fit = [each for each in sets if each.kind == wanted] or (sets if wanted == "ema" else [])
        if not fit:
            raise CheckpointError(
                f"checkpoint {path} has no raw weights, all are averaged: {listed}", "leave --weights raw out"
            )
        if any(not _equal(fit[0].tensors, each.tensors) for each in fit[1:]):
            kind = f"{len(fit)} sets of {WORDS[fit[0].kind]} weights"
            raise CheckpointError(f"checkpoint {path} has {kind}, and does not say which are meant: {listed}", hint)
    chosen = fit[0]
    others = [each for each in sets if each is not chosen]
    _complete(weights, chosen, others, wanted, hint)
    return chosen, others


def _complete(weights: Weights, chosen: WeightSet, others: list[WeightSet], wanted: str, hint: str) -> None:
    """Compare a set with those of the other kind beside it, and take the buffers that it lacks from them."""
    beside = [each for each in others if each.kind != chosen.kind]
    alike = [each for each in beside if not _misshapen(chosen.tensors, each.tensors)]
    if beside and not alike and wanted == chosen.kind == "ema":
        odd = _misshapen(chosen.tensors, beside[0].tensors)
        raise CheckpointError(
            f"checkpoint {weights.path}: {chosen} is no average of {beside[0]}: {odd[0]:.120} has another shape", hint
        )
    for other in alike:
        lacking = [name for name in other.leaves if name not in chosen.leaves and BUFFERS.search(name)]
        if lacking:
            chosen.leaves |= {name: other.leaves[name] for name in lacking}
            weights.notes.append(f"{chosen} has no buffers such as {lacking[0]}: {len(lacking)} come from {other}")


def _misshapen(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in ours.items() if name in theirs and tensor.shape != theirs[name].shape]
