"""Exports in several threads of one process, as of a web service, beside a host that logs and prints."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import tqdm

from evm_deploy._util.silence import _IGNORED, one_at_a_time, silence_libraries
from evm_deploy.errors import ToolchainError
from evm_deploy.export.coreml import program
from evm_deploy.export.hub import graph
from evm_deploy.export.hub.graph import with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete, export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.verify import run_reference
from evm_deploy.model.families import load_checkpoint
from evm_deploy.scan import onnx_function

ARTIFACTS = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin"), "coreml": ("model.mlpackage",)}


class HostProgram:
    """A thread that logs and prints until its `with` block ends; `said`: how often.

    It does not warn: torch ignores the warnings of all threads for a tenth of the time that it exports.
    """

    def __init__(self):
        self.said, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self.talk)

    def talk(self):
        logger = logging.getLogger("host")
        while not self.stop.is_set():
            logger.info("host logs %d", self.said)
            print(f"host prints {self.said}")
            self.said += 1
            time.sleep(0.02)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()


def in_place():
    """Return everything that `silence_libraries` changes for the whole process."""
    muting = [entry for entry in warnings.filters if entry is _IGNORED]
    return logging.Logger.handle, logging.root.manager.disable, muting, sys.stdout, tqdm.tqdm.__init__


def chatter():
    logging.getLogger("converter").warning("converter logs")
    print("converter prints")
    warnings.warn("converter warns", stacklevel=1)
    for _ in tqdm.tqdm(range(2), desc="converter draws"):
        pass


def artifacts(bundle):
    """The bytes of what a target made, by file."""
    found = [bundle.path / name for name in ARTIFACTS[bundle.manifest.target]]
    files = [file for path in found for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return {str(file.relative_to(bundle.path)): file.read_bytes() for file in files if file.is_file()}


def at_once(*functions):
    """Run them at the same time, each in a thread of its own -> what they return."""
    barrier = threading.Barrier(len(functions))

    def started(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [each.result() for each in [pool.submit(started, function) for function in functions]]


@pytest.fixture(scope="module")
def alone(micro, tmp_path_factory):
    """alone(target) -> the artifacts of an export with nothing beside it."""
    made = {}

    def make(target):
        if target not in made:
            made[target] = artifacts(export(micro, ExportPlan(target, imgsz=(64, 64)), tmp_path_factory.mktemp(target)))
        return made[target]

    return make


@pytest.mark.parametrize("targets", [("onnx", "coreml"), ("coreml", "coreml"), ("onnx", "openvino")])
@pytest.mark.slow
def test_two_exports_at_once(targets, alone, micro, tmp_path, caplog, capsys):
    for target in targets:
        pytest.importorskip({"coreml": "coremltools", "openvino": "openvino"}.get(target, target))
    want = [alone(target) for target in targets]
    before = in_place()

    def exported(number, target):
        return lambda: export(micro, ExportPlan(target, imgsz=(64, 64)), tmp_path / str(number))

    capsys.readouterr()
    with caplog.at_level(logging.INFO), HostProgram() as host:
        bundles = at_once(*(exported(i, target) for i, target in enumerate(targets)))
    assert [artifacts(bundle) for bundle in bundles] == want
    assert all(bundle.manifest.parity["ok"] for bundle in bundles)
    assert host.said > 10
    printed = capsys.readouterr().out
    assert printed.count("host prints") == host.said
    assert [record.message for record in caplog.records if record.name == "host"][-1] == f"host logs {host.said - 1}"
    assert sum(record.name == "host" for record in caplog.records) == host.said
    assert in_place() == before


def test_only_the_thread_inside_is_muted(caplog, capsys):
    inside, done = threading.Event(), threading.Event()

    def convert():
        with silence_libraries(), silence_libraries():
            chatter()
            with silence_libraries(logging.ERROR):
                logging.getLogger("converter").error("raised, too")
            logging.getLogger("converter").error("an error")
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=convert)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        thread.start()
        inside.wait(10)
        assert [record.message for record in caplog.records] == ["an error"]
        assert not warned and capsys.readouterr() == ("", "")
        chatter()
        done.set()
        thread.join()
    assert [record.message for record in caplog.records] == ["an error", "converter logs"]
    assert [str(each.message) for each in warned] == ["converter warns"]
    seen = capsys.readouterr()
    assert seen.out == "converter prints\n" and "converter draws" in seen.err


def test_a_stream_that_another_thread_puts_in_stays():
    before, theirs = sys.stdout, io.StringIO()
    with contextlib.suppress(KeyError), silence_libraries():
        sys.stdout = theirs
        raise KeyError
    try:
        assert sys.stdout is theirs
    finally:
        sys.stdout = before


def test_an_error_inside_leaves_nothing_in_place(monkeypatch, micro, tmp_path):
    before = in_place()
    with pytest.raises(ZeroDivisionError), silence_libraries(), silence_libraries():
        assert in_place() != before
        raise ZeroDivisionError
    assert in_place() == before

    def broken(*_, **__):
        raise ToolchainError("broken")

    monkeypatch.setattr(torch.onnx, "export", broken)
    monkeypatch.setattr(program, "exact_pipeline", broken)
    for target in ("onnx", "coreml"):
        with pytest.raises(ToolchainError, match="broken"):
            export(micro, ExportPlan(target, imgsz=(64, 64)), tmp_path)
    assert in_place() == before
    with pytest.raises(LookupError):
        program._scan_paths.get()

    def entered():
        with silence_libraries():
            return True

    assert at_once(entered, entered) == [True, True]


@pytest.mark.slow
def test_the_reference_runs_beside_a_trace(micro):
    """torch's tracer takes over calls of modules in every thread: one that runs meanwhile fails, or is traced along."""
    network = load_checkpoint(micro)
    plan, preprocessing = complete(ExportPlan("onnx", imgsz=(32, 32), opset=20), network.spec)
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8).numpy()
    reference, traced = (
        with_pre_and_postprocessing(each, plan, preprocessing) for each in (network, load_checkpoint(micro))
    )
    want = run_reference(reference, pixels).outputs["logits"]
    stop = threading.Event()

    def references():
        runs = 0
        while not stop.is_set() or not runs:
            assert (run_reference(reference, pixels).outputs["logits"] == want).all()
            runs += 1
        return runs

    def traces():
        try:
            return [graph.trace(traced, plan, {}).model.SerializeToString(deterministic=True) for _ in range(2)]
        finally:
            stop.set()

    runs, (first, second) = at_once(references, traces)
    assert runs and first == second


def test_what_is_registered_for_the_process_is_registered_once():
    at_once(*[onnx_function.register_schema] * 4)
    assert not one_at_a_time._is_owned()
