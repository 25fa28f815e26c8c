"""The cache of hub graphs serves what tracing would give, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from onnx import helper
from torch.nn.utils import fusion

from evm_deploy.export import executorch
from evm_deploy.export.coreml import package, program
from evm_deploy.export.hub import graph
from evm_deploy.export.hub.graph import with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch
from evm_deploy.scan import onnx_function
from tests import cache

PLAN = ExportPlan("onnx", imgsz=(64, 64), head="logits")  # many tests trace it


class Counted:
    """A tracer that only says how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module, plan):
        self.calls += 1
        return self.calls


@pytest.fixture
def module(micro):
    network = load_checkpoint(micro)
    plan, preprocessing = complete(PLAN, network.spec)
    return with_pre_and_postprocessing(network, plan, preprocessing)


@pytest.fixture
def graphs(tmp_path):
    made = cache.Graphs(Counted())
    made.folder, made.parts = tmp_path, cache.parts()
    return made


@pytest.mark.slow
def test_a_graph_from_the_cache_is_the_traced_one(module):
    fresh = cache.GRAPHS.real(module, PLAN)
    for _ in range(2):
        kept = graph._trace(module, PLAN)
        assert kept.model.SerializeToString() == fresh.model.SerializeToString()
        assert list(kept.fusable) == list(fresh.fusable) and kept.scans == fresh.scans


@pytest.mark.slow
def test_a_program_from_the_cache_is_the_converted_one(micro, tmp_path):
    network = load_checkpoint(micro)
    plan, preprocessing = complete(ExportPlan("coreml", imgsz=(64, 64)), network.spec)
    module = with_pre_and_postprocessing(network, plan, preprocessing)
    folded = program.fold_batch_norm(program.channels_first(module, plan), program.example(plan, module.channels))
    fresh = cache.PROGRAMS.real(module, folded, plan)
    package.save(fresh.model, tmp_path / "fresh.mlpackage")
    for turn in range(2):
        kept = program._trace(module, folded, plan)
        assert kept.float_module is module and (kept.scans, kept.modules) == (fresh.scans, fresh.modules)
        package.save(kept.model, tmp_path / f"{turn}.mlpackage")
        assert content(tmp_path / f"{turn}.mlpackage") == content(tmp_path / "fresh.mlpackage")
    other = program.trace(module, plan, {"labels": "b"})
    assert other.model.user_defined_metadata["labels"] == "b" and "labels" not in kept.model.user_defined_metadata


@pytest.mark.slow
def test_a_lowered_graph_from_the_cache_is_the_lowered_one():
    pytest.importorskip("executorch")
    relu = helper.make_node("Relu", ["x"], ["y"])
    inputs, outputs = (helper.make_tensor_value_info(name, 1, [2, 3]) for name in "xy")
    model = helper.make_model(helper.make_graph([relu], "relu", [inputs], [outputs]))
    fresh = cache.TRACED["lower"](model, portable=True)
    assert [executorch.lower(model, portable=True) for _ in range(2)] == [fresh, fresh]
    digests = {cache.lower_digest(model, True), cache.lower_digest(model, False)}
    relu.op_type = "Abs"
    digests.add(cache.lower_digest(helper.make_model(helper.make_graph([relu], "relu", [inputs], [outputs])), True))
    assert len(digests) == 3


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_is_traced_once(module, graphs):
    assert [graphs.trace(module, PLAN) for _ in range(3)] == [1, 1, 1]


def with_one_weight(module):
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-6


def with_another_epsilon(module):
    next(each for each in module.modules() if isinstance(each, torch.nn.LayerNorm)).eps = 1e-3


def with_another_mean(module):
    module.shift += 0.1


def with_another_setting(module):
    next(each for each in module.modules() if type(each).__module__.startswith("evm_deploy")).setting = 1


CHANGES = [with_one_weight, with_another_epsilon, with_another_mean, with_another_setting]


@pytest.mark.parametrize("change", CHANGES)
def test_another_module_is_traced(change, module, graphs):
    graphs.trace(module, PLAN)
    change(module)
    assert graphs.trace(module, PLAN) == 2


@pytest.mark.parametrize(
    "change",
    [{"imgsz": (32, 36)}, {"batch": Batch(1, 2, 4)}, {"input": "tensor"}, {"head": "probs"}, {"opset": 18}],
    ids=lambda change: next(iter(change)),
)
def test_another_plan_is_traced(change, module, graphs):
    graphs.trace(module, PLAN)
    assert graphs.trace(module, replace(PLAN, **change)) == 2


def test_what_is_in_two_places_is_not_two_equal_ones():
    def digest(change):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        layers[1].load_state_dict(layers[0].state_dict())
        change(layers)
        return cache.digest_of(layers, PLAN)

    def one_layer(layers):
        layers[1] = layers[0]

    def one_weight(layers):
        layers[1].weight = layers[0].weight

    apart = digest(lambda layers: None)
    assert apart == digest(lambda layers: None)
    assert len({apart, digest(one_layer), digest(one_weight)}) == 3


@pytest.mark.slow
def test_metadata_are_added_to_a_kept_graph(module):
    """Metadata do not decide a graph: a single trace serves all."""
    for label in ("a", "b"):
        model = graph.trace(module, PLAN, {"labels": label, "evm_deploy": "9"}).model
        said = [(each.key, each.value) for each in model.metadata_props if not each.key.startswith("onnxsim.")]
        assert said == [("evm_deploy", "9"), ("labels", label)]
        assert (model.producer_name, model.producer_version) == ("evm-deploy", "9")


@pytest.mark.slow
def test_tracing_reads_no_more_of_a_plan_than_the_key_has(module):
    class Watched:
        def __init__(self) -> None:
            self.read = set()

        def __getattr__(self, name):
            if name in known:
                self.read.add(name)
            return getattr(PLAN, name)

    known, plan, key = {field.name for field in fields(ExportPlan)}, Watched(), Watched()
    cache.GRAPHS.real(module, plan)
    graph.trace_key(key)
    assert plan.read and plan.read <= key.read


def function(*args):
    return onnx_function.selective_scan_function(*args)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (onnx_function, "selective_scan_function"),
        (graph, "_export"),
        (graph, "DEFAULT_OPSET"),
        (fusion, "fuse_conv_bn_eval"),
    ],
    ids=lambda part: part if isinstance(part, str) else "in",
)
def test_while_something_is_patched_nothing_is_kept(where, name, module, graphs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(where, name, function)
        assert [graphs.trace(module, PLAN) for _ in range(2)] == [1, 2]
    assert [graphs.trace(module, PLAN) for _ in range(2)] == [3, 3]


def test_a_patched_method_is_noticed_too(module, graphs, monkeypatch):
    network = sys.modules["evm_deploy.model.efficientvmamba.network"]
    block = next(value for value in vars(network).values() if isinstance(value, type) and hasattr(value, "fused_op"))
    monkeypatch.setattr(block, "forward", lambda self, x: x)
    assert [graphs.trace(module, PLAN) for _ in range(2)] == [1, 2]


# ------------------------------------------------------------------------------------------------- graphs of a form


@pytest.fixture
def exports(module, monkeypatch):
    """The calls of torch's export, after one of a module of this form."""
    calls, real = [], cache.REAL_EXPORT
    graph._trace(module, PLAN)
    monkeypatch.setattr(cache, "REAL_EXPORT", lambda *a, **k: calls.append(a) or real(*a, **k))
    return calls


def with_other_weights(module):
    with torch.no_grad():
        for each in (*module.parameters(), *module.buffers()):
            if each.is_floating_point():
                each *= 1 + 0.1 * torch.rand_like(each)


@pytest.mark.slow
def test_a_graph_of_the_same_form_gets_its_own_weights(module, exports, monkeypatch):
    with_other_weights(module)
    kept = graph._trace(module, PLAN)
    assert not exports
    monkeypatch.setattr(cache.Graphs, "folder", None)
    fresh = graph._trace(module, PLAN)
    assert len(exports) == 1
    assert kept.model.SerializeToString() == fresh.model.SerializeToString()
    assert list(kept.fusable) == list(fresh.fusable) and kept.scans == fresh.scans


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name", "traced"), [(onnx_function, "selective_scan_function", 0), (graph, "name_after_modules", 1)]
)
def test_a_patch_of_what_comes_after_torchs_export_is_obeyed(where, name, traced, module, exports, monkeypatch):
    real, called = getattr(where, name), []
    monkeypatch.setattr(where, name, lambda *a, **k: called.append(a) or real(*a, **k))
    graph._trace(module, PLAN)
    assert called and len(exports) == traced


def with_a_hook(module):
    module.register_forward_pre_hook(lambda module, inputs: None)


def with_a_function(module):
    module.model.chosen = lambda x: x


def test_a_form_is_all_but_the_values_of_weights(module):
    form = cache.form_of(module, PLAN)
    with_other_weights(module)
    assert form and cache.form_of(module, PLAN) == form
    assert cache.form_of(module, replace(PLAN, imgsz=(32, 36))) != form
    for change in (with_another_epsilon, with_another_setting):
        before = cache.form_of(module, PLAN)
        change(module)
        assert cache.form_of(module, PLAN) not in (None, before)


@pytest.mark.parametrize("change", [with_a_hook, with_a_function])
def test_a_module_that_is_not_all_known_has_no_form(change, module):
    change(module)
    assert cache.form_of(module, PLAN) is None


@pytest.mark.parametrize(
    ("value", "known"),
    [
        ((1, 2.5, "a", None, {"b": [True]}), True),
        ({"a": [Batch(1, 1, 1), object()]}, False),
        (Batch(1, 2, 4), True),
        (object(), False),
        ([lambda: 0], False),
        (torch.zeros(2), False),
    ],
)
def test_what_a_text_tells_all_of(value, known):
    assert cache.plain(value) is known


@pytest.mark.retraces
def test_a_marked_test_traces():
    assert cache.GRAPHS.forgetful


def test_others_do_not():
    assert not cache.GRAPHS.forgetful


@pytest.mark.slow
def test_one_process_fills_a_folder(tmp_path):
    """Two at once: the second waits and takes what the first has made."""
    code = """
import sys, time
from pathlib import Path
from tests.once import once
once(Path(sys.argv[1]), lambda folder: (time.sleep(0.5), (folder / sys.argv[2]).touch()))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "folder")]
    both = [subprocess.Popen([*command, name], cwd=cache.ROOT) for name in ("a", "b")]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_what_was_not_made_is_made_again(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise OSError

    with pytest.raises(OSError):
        cache.once(tmp_path / "x", fail)
    assert list(cache.once(tmp_path / "x", lambda folder: (folder / "whole").touch()).iterdir()) == [
        tmp_path / "x" / "whole"
    ]
