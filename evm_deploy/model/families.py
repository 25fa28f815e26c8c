"""The list of supported model families, and the loading of a checkpoint of any family."""

from __future__ import annotations

from pathlib import Path

from evm_deploy._util.torch_settings import default_torch_settings
from evm_deploy.errors import CheckpointError
from evm_deploy.model.efficientvmamba.checkpoint import EFFICIENTVMAMBA
from evm_deploy.model.network import Family, LoadOptions, Network
from evm_deploy.model.state_dict import read_checkpoint, some

FAMILIES: tuple[Family, ...] = (EFFICIENTVMAMBA,)


@default_torch_settings()
def load_checkpoint(path: str | Path, *, head: str | None = None, weights: str = "ema") -> Network:
    """Load a trained network from a checkpoint file -> (float32 module in eval mode, its ModelSpec).

    head: `logits` (or None) and `probs` build the classifier, `features` builds the backbone. weights: where the file
    has both kinds, `ema` takes the averaged weights and `raw` the other weights. The first family that claims the file
    loads it. Raises CheckpointError if no family claims the file, or if keys are missing, unexpected or misshapen; the
    message lists them.
    """
    raw = read_checkpoint(Path(path), weights)
    for family in FAMILIES:
        if family.claims(raw):
            return family.load(raw, LoadOptions(head or "logits", weights))
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"checkpoint {path} holds no network of a known family ({known}): its {len(raw.tensors)} tensors are "
        f"{some(sorted(raw.tensors))}"
    )
