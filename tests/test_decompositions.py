"""Decomposition without a second trace: the nodes and bytes of a second trace, which others still take."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram

from evm_deploy.export.hub import decompositions, graph
from evm_deploy.export.hub.decompositions import copied_decompositions, decompose
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model import Network
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch
from tests import detectors, segmenters
from tests.toy import toy_network


class Forms(nn.Module):
    """Every operator that is replaced without a trace, in its several forms."""

    def __init__(self):
        super().__init__()
        self.norm, self.plain = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, 2, bias=False, dilation=2)

    def forward(self, x):
        y = self.plain(self.norm(x.to(torch.float64).to(torch.float32))).to(torch.float32)
        first, second, last = F.dropout(y, 0.5, training=False).chunk(3, dim=-1)  # 8 = 3 + 3 + 2
        moved = y.permute(0, 2, 3, 1)
        views = [y.reshape(2, -1), moved[:, :, :4].reshape(2, -1, 4), moved.reshape(2, 8, -1), y[:, :2].reshape(4, -1)]
        flat = [y.flatten(1), moved.flatten(1, 2), y.flatten(3)]
        memory = [moved.contiguous(), y.contiguous(), y.contiguous(memory_format=torch.channels_last)]
        kept = (y > 0) & (y < 1)
        scaled = y @ torch.from_numpy(np.ones((2, 8), np.float32)).T
        others = [y.split(2, 1)[1], y.square(), y.unflatten(1, (2, -1)), moved.unflatten(-1, (2, 2))]
        ups = [self.up(y) * torch.tensor([1.0, 2.0, 3.0])[:, None, None], self.grouped(y)]
        return *views, *flat, *memory, first + second, last, kept, scaled, y.detach() + 1, *others, *ups


class Sizes(nn.Module):
    """Shapes that hold the number of images, which is not known."""

    def forward(self, x):
        n, moved = x.shape[0], x.permute(0, 2, 3, 1)
        products = (n + 1 - 1) * 8 // 2, 2 * n
        parts = [x.unflatten(1, (2, -1)), moved.unflatten(3, (2, 2))]
        views = [x.reshape(n, -1), moved[:, :, :4].reshape(n, -1, 4), moved.reshape(n, 8, -1), x.reshape(4 * n, -1)]
        copies = [moved.reshape(products[0], -1, 4), moved.reshape(-1, products[1]).T]
        flat = [x.flatten(1), moved.flatten(1, 2), x.flatten(3), moved.contiguous(), x.chunk(3, dim=-1)[2]]
        return *views, *copies, *flat, *parts


class Calls(nn.Module):
    """A function as a network, with layers for it."""

    def __init__(self, function):
        super().__init__()
        self.function, self.norm = function, nn.BatchNorm2d(4, track_running_stats=False)
        self.total = nn.Buffer(torch.zeros(4, 1, 1))

    def forward(self, x):
        return self.function(self, x)


def without_gradients(network, x):
    with torch.no_grad():
        return x + 1


ASSERTION = torch.ops.aten._assert_tensor_metadata.default
SIZE = "a size that no node computes"
CALLED = {
    "in place": lambda network, x: F.relu_(x * 2),
    "a buffer is changed": lambda network, x: network.total.add_(1) + x,
    "statistics of the batch": lambda network, x: network.norm(x),
    "no ONNX function": lambda network, x: F.adaptive_avg_pool1d(x.flatten(2), 4),
    "a composite view that is not known": lambda network, x: x.movedim(1, -1),
    "a program inside": without_gradients,
    SIZE: lambda network, x: x.flatten(0, 1),
    "a size that depends on values": lambda network, x: x.nonzero().reshape(-1, 2, 2).to(torch.float32) + x.mean(),
    "a copy is asked for": lambda network, x: x.to(torch.float32, copy=True),
}


OPERATORS = {"forms": (Forms, 21), "sizes": (Sizes, 13)}  # and how many outputs they have


@pytest.fixture
def retraces(monkeypatch):
    """Programs that torch has traced again."""
    programs, retrace = [], ExportedProgram.run_decompositions

    def run_decompositions(program, table=None):
        programs.append(program)
        return retrace(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", run_decompositions)
    return programs


@pytest.fixture
def module_of(checkpoint, tmp_path):
    """module_of(name, **settings) -> the module that an export traces, and its complete plan."""

    def make(name, **settings):
        if name in CALLED:
            network = Network.of(Calls(CALLED[name]), outputs=("y",), channels=4)
        elif name == "toy":
            network = toy_network()
        elif name in OPERATORS:
            module, count = OPERATORS[name]
            network = Network.of(module(), outputs=[f"y{i}" for i in range(count)], channels=4)
        else:
            saved = {"retina_micro": detectors.saved, "upernet_micro": segmenters.saved}.get(name)
            network = load_checkpoint(saved(tmp_path, name) if saved else checkpoint(name))
        plan, preprocessing = complete(ExportPlan("onnx", **{"imgsz": (64, 64), **settings}), network.spec)
        return graph.with_pre_and_postprocessing(network, plan, preprocessing), plan

    return make


def nodes(program):
    """Everything that the exporter reads of a program. Assertions are left out, as it does.

    Where the number of images is not known, nodes have numbers in place of names: the tracer's names count its own
    calculations with sizes, too.
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function" and node.target is not ASSERTION]
    numbers = {node.name: f"n{i}" if program.range_constraints else node.name for i, node in enumerate(calls)}

    def named(value):
        return re.sub(r"\w+", lambda word: numbers.get(word[0], word[0]), str(value))

    read = [
        (numbers[node.name], node.target, named(node.args), named(node.kwargs), node.meta["nn_module_stack"])
        for node in calls
    ]
    return read, [(spec.kind, named(spec.arg.name), spec.target) for spec in program.graph_signature.output_specs]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("forms", {"input": "tensor", "imgsz": (8, 8), "batch": Batch(2, 2, 2)}),
        ("sizes", {"input": "tensor", "imgsz": (8, 8), "batch": Batch(1, 1, None)}),
        ("toy", {}),
        ("toy", {"batch": Batch(1, 2, 4)}),
        ("micro_64", {}),
        pytest.param("micro_64", {"batch": Batch(1, 1, None)}, marks=pytest.mark.slow),
        pytest.param(
            *("micro_64", {"input": "tensor", "head": "probs", "batch": Batch(2, 2, 2), "imgsz": (64, 96)}),
            marks=pytest.mark.slow,
        ),
        pytest.param("retina_micro", {}, marks=pytest.mark.slow),
        pytest.param("upernet_micro", {}, marks=pytest.mark.slow),
    ],
)
def test_the_nodes_are_those_of_a_second_trace(name, settings, module_of, monkeypatch):
    retrace, compared = ExportedProgram.run_decompositions, []

    def both(program, table):
        expected = nodes(retrace(program, table))
        assert nodes(program) != expected
        assert decompose(program, table) and nodes(program) == expected
        compared.append(program)
        return True

    monkeypatch.setattr(decompositions, "decompose", both)
    graph._export(*module_of(name, **settings))
    assert len(compared) == 1


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *((name, Batch(1, 1, 1)) for name in CALLED if name != SIZE),
        *((name, Batch(1, 1, None)) for name in (SIZE, "in place", "no ONNX function")),
    ],
)
def test_other_programs_are_left_to_torch_as_they_are(name, batch, module_of, monkeypatch):
    seen = []

    def watched(program, table):
        before = str(program)
        seen.append(decompose(program, table))
        assert str(program) == before
        return seen[-1]

    monkeypatch.setattr(decompositions, "decompose", watched)
    graph._export(*module_of(name, input="tensor", batch=batch))
    assert seen == [False]


@pytest.mark.retraces
@pytest.mark.parametrize(
    ("name", "settings", "again"),
    [
        pytest.param("micro_64", {}, 0, marks=pytest.mark.slow),
        ("toy", {}, 0),
        pytest.param("micro_64", {"batch": Batch(1, 2, 4)}, 0, marks=pytest.mark.slow),
        ("sizes", {"input": "tensor", "imgsz": (8, 8), "batch": Batch(1, 1, None)}, 0),
        (SIZE, {"input": "tensor", "batch": Batch(1, 1, None)}, 1),
        ("in place", {}, 1),
        ("no ONNX function", {}, 1),
    ],
)
def test_the_graph_has_the_same_bytes_in_either_way(name, settings, again, module_of, retraces, monkeypatch):
    module, plan = module_of(name, **settings)
    first = graph._trace(module, plan)
    assert len(retraces) == again
    monkeypatch.setattr(decompositions, "decompose", lambda program, table: False)
    second = graph._trace(module, plan)
    assert len(retraces) == again + 1
    assert first.sha256 == second.sha256


def test_afterwards_torch_has_its_own_method():
    own = ExportedProgram.run_decompositions
    with pytest.raises(ZeroDivisionError), copied_decompositions():
        assert ExportedProgram.run_decompositions is not own
        1 / 0  # noqa: B018
    assert ExportedProgram.run_decompositions is own


def test_a_decomposition_that_asks_for_torchs_defaults_is_torchs(retraces):
    program = torch.export.export(Forms().eval(), (torch.ones(2, 4, 8, 8),))
    with copied_decompositions():
        result = program.run_decompositions()
    assert result is not program and retraces == [program]
