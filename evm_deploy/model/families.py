"""The explicit list of families, and loading a checkpoint of any of them."""

from __future__ import annotations

from pathlib import Path

from evm_deploy.errors import CheckpointError
from evm_deploy.model.efficientvmamba.checkpoint import EFFICIENTVMAMBA
from evm_deploy.model.network import Family, LoadOptions, Network
from evm_deploy.model.state_dict import read_checkpoint, some

FAMILIES: tuple[Family, ...] = (EFFICIENTVMAMBA,)


def load_checkpoint(path: str | Path, *, head: str | None = None, weights: str = "ema") -> Network:
    """Load a trained network from a checkpoint file -> (float32 module in eval mode, its ModelSpec).

    `head`: `logits` (or None) and `probs` build the classifier, `features` the backbone. `weights`: `ema` prefers
    averaged weights, `raw` the others, where a file has both. The first family that claims the file loads it. Raises
    CheckpointError for a file that no family claims, or with every missing, unexpected and misshapen key.
    """
    raw = read_checkpoint(Path(path), weights)
    for family in FAMILIES:
        if family.claims(raw):
            return family.load(raw, LoadOptions(head or "logits", weights))
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"checkpoint {path} is no network of a known family ({known}): its {len(raw.tensors)} tensors are "
        f"{some(sorted(raw.tensors))}"
    )
