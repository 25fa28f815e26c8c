"""BatchNorm as part of the convolution before it, in a torch module.

coremltools folds it too, but gives the new weights names of its own, by which quantisation finds no module.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

from evm_deploy.model.batch_norm import folded_modules

if TYPE_CHECKING:
    from torch import Tensor, nn


def fold_batch_norm(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `module`, in eval mode, in which every convolution that a BatchNorm alone reads has it inside.

    Which those are is read from a trace with `example`, whatever the module that holds them. A convolution or a norm
    that runs more than once stays as it is.
    """
    from torch import nn

    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    norms = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    folded = copy.deepcopy(module).eval()
    for conv_path, norm_path in _pairs(folded, example):
        conv, norm = folded.get_submodule(conv_path), folded.get_submodule(norm_path)
        if isinstance(conv, convolutions) and isinstance(norm, norms) and norm.running_mean is not None:
            weight, bias = folded_modules(conv, norm)
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            folded.set_submodule(norm_path, nn.Identity())
    return folded


def module_path(node: Any) -> str:
    """The innermost module of a node of a trace: `__module.a/__module.a.model/__module.a.model.0` -> `a.model.0`."""
    return str(node.scopeName().rpartition("/")[2].removeprefix("__module."))


def _pairs(module: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Paths of the modules that run once and are in a row: a convolution, and a norm that is all that reads it."""
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
