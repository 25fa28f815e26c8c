"""Tests that every target passes by being listed; what only one target has is tested in its own files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest

from evm_deploy.bench import worker
from evm_deploy.bench.record import Settings
from evm_deploy.bundle import selftest
from evm_deploy.bundle.loaded import load
from evm_deploy.commands.doctor import examine
from evm_deploy.errors import BundleError, EvmError, ParityError, UsageError
from evm_deploy.export import settings as export_settings
from evm_deploy.export import targets
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import TOLERANCES, ExportPlan
from evm_deploy.export.target import Target, check_plan, open_here
from evm_deploy.export.targets import get_target, load_targets
from evm_deploy.runtimes.base import Batch, RunOptions, Runtime, run_batched
from evm_deploy.runtimes.registry import load_runtimes
from tests.targets import scan_of
from tests.toolchains import need_target

every_target = pytest.mark.parametrize("target", load_targets().values(), ids=list(load_targets()))
PLAN = {"imgsz": (64, 64), "input": "tensor"}
BATCHES = {"dynamic": Batch(1, 1, None), "a range": Batch(1, 2, 4)}
QUICK = Settings(threads=1, limit_s=0.5)


@pytest.fixture(autouse=True)
def has_its_packages(request):
    """Skip where the target's packages are missing: the tests that build."""
    if "target" in request.fixturenames and request.node.get_closest_marker("slow"):
        need_target(request.getfixturevalue("target").name)


def plan_of(target: Target, **more) -> ExportPlan:
    """In float32, or in the most precise that the target has."""
    return ExportPlan(target.name, **{"precision": precision_of(target), "scan": scan_of(target.name), **PLAN, **more})


def precision_of(target: Target) -> str:
    return "fp32" if "fp32" in target.precisions else target.precisions[0]


def tolerance_of(target: Target, float32: float) -> float:
    """Largest accepted difference of outputs: `float32`, or the export's own limit of the other precision."""
    return float32 if precision_of(target) == "fp32" else 10 * TOLERANCES[precision_of(target)]


@pytest.fixture(autouse=True)
def on_no_device(monkeypatch):
    """Nothing is finished: the device is another machine."""
    monkeypatch.setattr("evm_deploy.export.pipeline.engine_built_here", lambda plan: False)


@pytest.fixture(scope="module")
def bundle(micro, tmp_path_factory):
    """bundle(target) -> its bundle of the smallest golden model."""
    made = {}

    def make(target: Target):
        if target.name not in made:
            made[target.name] = export(micro, plan_of(target), tmp_path_factory.mktemp(target.name))
        return made[target.name]

    return make


@contextmanager
def opened(target: Target, path: Path, artifact: str) -> Iterator[Runtime]:
    with open_here(target, path / artifact, RunOptions()) as runtime:
        yield runtime


@contextmanager
def other_decays(module, by: float) -> Iterator[None]:
    """A module whose scans forget 5 % faster, or where a target computes scans in float16, three times as fast."""
    decays = [value for name, value in module.named_parameters() if name.endswith("A_logs")]
    assert decays
    for value in decays:
        value.data += by
    try:
        yield
    finally:
        for value in decays:
            value.data -= by


@every_target
def test_both_halves_are_listed(target):
    assert load_runtimes()[target.name] is target.runtime
    assert all(get_target(alias) is target for alias in (target.name, *target.runtime.aliases))
    assert target.settings in (None, *export_settings.KINDS) and target.runtime.label


@every_target
@pytest.mark.slow
def test_the_numbers_of_the_golden_model(target, bundle):
    made, case = bundle(target), golden.model_case("micro_64")
    with opened(target, made.path, made.manifest.artifact) as runtime:
        outputs = run_batched(runtime, made.manifest.batch, case["images"])
    assert np.abs(outputs["logits"] - case["logits"]).max() < tolerance_of(target, 1e-4)
    least = target.scan_tolerance or 1e-5
    assert made.manifest.parity["ok"] and all(scan["ssm"] < least for scan in made.manifest.parity["scans"])


@every_target
@pytest.mark.slow
def test_a_broken_scan_is_rejected(target, micro, tmp_path, monkeypatch):
    """Break the scan while the target traces; the float model keeps its scan."""

    def trace(module, plan, metadata):
        with other_decays(module, 1.0 if target.scan_tolerance else 0.05):
            return target.trace(module, plan, metadata)

    spoilt = replace(target, trace=trace)
    monkeypatch.setattr(targets, "TARGETS", tuple(spoilt if each is target else each for each in targets.TARGETS))
    with pytest.raises(
        ParityError, match=r"scan layers.0.blocks.0.op (is|reads inputs|with large deltas is) off"
    ) as raised:
        export(micro, plan_of(target), tmp_path)
    assert raised.value.exit_code == 4
    name = f"micro_64-{target.name}-{precision_of(target)}-64x64.rejected"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@every_target
@pytest.mark.slow
def test_the_selftest_passes_and_notices(target, bundle, monkeypatch):
    made = bundle(target)
    with opened(target, made.path, made.manifest.artifact) as runtime:
        checks = selftest.run(made, target.runtime, runtime, RunOptions())
        assert {check.name for check in checks} >= {"logits", "scan layers.0.blocks.0.op", "scan large_delta"}
        assert all(check.ok for check in checks)
        right = runtime.run
        monkeypatch.setattr(runtime, "run", lambda feeds: {name: 1.1 * value for name, value in right(feeds).items()})
        assert not all(check.ok for check in selftest.run(made, target.runtime, runtime, RunOptions()))


@pytest.mark.slow
@every_target
def test_it_is_loaded_or_says_why_not(target, bundle):
    made = bundle(target)
    if made.manifest.built:
        with load(made.path) as model:
            assert model.target is target.runtime and all(check.ok for check in model.selftest())
    else:
        with pytest.raises(BundleError, match="on the device:  evm-export --finish"):
            load(made.path)


@every_target
@pytest.mark.parametrize("batch", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.slow
def test_a_dynamic_batch_is_taken_or_refused(target, batch, micro, tmp_path):
    plan = plan_of(target, batch=batch)
    try:
        check_plan(target, plan)
    except UsageError as error:
        assert "batch" in str(error) and error.hint.startswith("use ")
        return
    made = export(micro, plan, tmp_path)
    images = golden.model_case("micro_64")["images"]
    three = np.concatenate([images[:1]] * 2 + [images[-1:]])
    with opened(target, made.path, made.manifest.artifact) as runtime:
        (name,) = runtime.inputs
        together = runtime.run({name: three})["logits"]
        alone = [runtime.run({name: image[None]})["logits"] for image in three]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)


@every_target
@pytest.mark.parametrize(
    ("asked", "has"),
    [
        ({"precision": "w8"}, lambda target: target.precisions),
        ({"precision": "int8-fp16", "calib": "demo"}, lambda target: target.precisions),
        ({"scan": "aot"}, lambda target: target.scans),
        ({"min_target": "iOS18"}, lambda target: target.min_targets),
        ({"native_library": "linux-aarch64"}, lambda target: target.platforms),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_there_is_not_is_refused_with_what_there_is(target, asked, has):
    if next(iter(asked.values())) in has(target):
        return
    with pytest.raises(UsageError, match=f"target '{target.name}' has no .*it has: {', '.join(has(target)) or 'none'}"):
        check_plan(target, ExportPlan(target.name, **asked))


@every_target
def test_settings_of_another_target_are_refused(target):
    with pytest.raises(UsageError, match=f"target '{target.name}' has no Settings"):
        check_plan(target, ExportPlan(target.name, settings=QUICK))
    plan = check_plan(target, ExportPlan(target.name))
    assert plan.settings == (target.settings() if target.settings else None)
    assert check_plan(target, plan) == plan


@pytest.mark.slow
@every_target
def test_the_readme_names_the_artifact(target, bundle):
    made = bundle(target)
    text = (made.path / "README.md").read_text(encoding="utf-8")
    assert made.manifest.artifact in text and made.manifest.name in text


@pytest.mark.slow
@every_target
def test_it_is_measured_where_it_runs(target, bundle):
    made = bundle(target)
    if not (made.manifest.built and target.runtime.availability().can_run):
        with pytest.raises(EvmError):
            worker.work(made.path, replace(QUICK, threads=None))
        return
    record = worker.work(made.path, QUICK)
    assert record.bundle["target"] == target.name and record.samples_ms
    assert set(record.runtime["versions"]) == {need.package for need in target.runtime.needs}
    assert bool(record.layers) == bool(target.runtime.profiler)
    if target.runtime.profiler:
        assert record.layers["how"].startswith(target.runtime.profiler.name) and record.layers["modules"]


def test_the_doctor_knows_every_target():
    found = examine()["targets"]
    assert list(found) == list(load_targets())
    for name, target in load_targets().items():
        here = target.runtime.availability()
        assert (found[name]["build"], found[name]["run"]) == (target.environment().can_build, here.can_run)
        assert bool(found[name]["hint"]) == (not (target.environment().can_build and here.can_run))
