"""The list of supported model families, and the loading of a checkpoint of any family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evm_deploy._util.torch_settings import default_torch_settings
from evm_deploy.model.checkpoint_file import Content, read_content
from evm_deploy.model.efficientvmamba.checkpoint import EFFICIENTVMAMBA
from evm_deploy.model.efficientvmamba.detector import DETECTOR
from evm_deploy.model.efficientvmamba.rcnn_checkpoint import RCNN
from evm_deploy.model.efficientvmamba.segmenter import SEGMENTER
from evm_deploy.model.network import Family, LoadOptions, Network
from evm_deploy.model.state_dict import RawCheckpoint, no_weights, take_weights

FAMILIES: tuple[Family, ...] = (DETECTOR, RCNN, SEGMENTER, EFFICIENTVMAMBA)  # the first ones hold a backbone, too


@default_torch_settings()
def load_checkpoint(
    path: str | Path, *, head: str | None = None, weights: str = "ema", drop: Sequence[str] = ()
) -> Network:
    """Load a trained network from a checkpoint file -> (float32 module in eval mode, its ModelSpec).

    head: None builds the whole network, a classifier, detector or segmenter; `logits` and `probs` build a classifier,
    `features` builds the backbone. weights: where the file has several sets, `ema` takes the averaged weights, `raw`
    the other weights, and the name of a set that set. drop: shell patterns of keys to leave out, such as `aux_head.*`.
    The first family with weights in the file loads it. Raises CheckpointError if no family has, or if keys are missing,
    unexpected or misshapen; the message lists them.
    """
    family, raw = find_network(read_content(Path(path)), weights, drop)
    return family.load(raw, LoadOptions(head))


def find_network(content: Content, weights: str = "ema", drop: Sequence[str] = ()) -> tuple[Family, RawCheckpoint]:
    """Return the family of the network in the content of a file, and its weights. See `load_checkpoint`."""
    for family in FAMILIES:
        raw = take_weights(content, family.anchors, weights, drop)
        if raw:
            return family, raw
    raise no_weights(content, [family.name for family in FAMILIES])
