"""Folding of BatchNorm into the convolution before it, in a torch module.

coremltools folds BatchNorm too, but renames the weights, and quantisation cannot find the module of a renamed weight.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

from evm_deploy.errors import UsageError
from evm_deploy.model.batch_norm import folded_modules

if TYPE_CHECKING:
    from torch import Tensor, nn


def fold_batch_norm(module: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of `module`, in eval mode, with each BatchNorm folded into the convolution before it.

    Nothing else may read the convolution's output. A trace with `example` finds these pairs, whichever modules hold
    them. A convolution or a norm that runs more than once stays as it is. Raises UsageError for a module that cannot
    be copied.
    """
    from torch import nn

    from evm_deploy.model.foreign.look import reason

    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    norms = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    try:
        folded = copy.deepcopy(module).eval()
    except Exception as error:  # of any attribute of a network of others
        raise UsageError(
            f"the network cannot be copied, as Core ML needs it: {reason(error)}",
            "keep what copy.deepcopy refuses outside of its modules",
        ) from error
    for conv_path, norm_path in _pairs(folded, example):
        conv, norm = folded.get_submodule(conv_path), folded.get_submodule(norm_path)
        if isinstance(conv, convolutions) and isinstance(norm, norms) and norm.running_mean is not None:
            weight, bias = folded_modules(conv, norm)
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            folded.set_submodule(norm_path, nn.Identity())
    return folded


def module_path(node: Any) -> str:
    """Return the innermost module of a traced node: `__module.a/__module.a.model/__module.a.model.0` -> `a.model.0`."""
    return str(node.scopeName().rpartition("/")[2].removeprefix("__module."))


def _pairs(module: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Return the paths of each convolution and norm to fold: both run once, and only the norm reads the convolution."""
    import torch

    with torch.no_grad():
        graph = torch.jit.trace(module, example, check_trace=False).inlined_graph  # type: ignore[no-untyped-call]
    convolutions, norms = (graph.findAllNodes(kind) for kind in ("aten::_convolution", "aten::batch_norm"))
    runs = Counter(module_path(node) for node in (*convolutions, *norms))
    found = []
    for node in convolutions:
        readers = [use.user for use in node.output().uses()]
        if len(readers) == 1 and readers[0].kind() == "aten::batch_norm":
            found.append((module_path(node), module_path(readers[0])))
    return [pair for pair in found if all(runs[path] == 1 for path in pair)]
