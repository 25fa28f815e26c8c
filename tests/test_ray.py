"""Sweeps and evaluations on a Ray cluster of two nodes: killed workers and drivers lose nothing, results are the same.

One cluster for the module, on ports of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from evm_deploy import cli
from evm_deploy.demo import digits
from evm_deploy.errors import ToolchainError
from evm_deploy.sweep.engine import TRIES, CrashError, Job, LocalEngine
from evm_deploy.sweep.evaluate import evaluate
from evm_deploy.sweep.folder import RunFolder
from evm_deploy.sweep.packed import read_rows
from tests.toolchains import need, without

need("ray", module=True)

from evm_deploy.sweep.ray_engine import RayEngine  # noqa: E402

pytestmark = pytest.mark.slow
START_S = 120.0  # for a node of the cluster to start, and for a unit to end

NODE = ("--num-cpus=1", "--object-store-memory=100000000", "--block")
SWEEP = """
checkpoints = "demo:digits"
forms = "onnx:fp32"
imgsz = [48, 64]
[data]
val = "val.npz"
[[bench]]
board = "lab"
threads = 1
limit = 0.5
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def eventually(found: Callable[[], object], *processes: subprocess.Popen[bytes]) -> None:
    """Wait until `found()` is true, as long as the processes run."""
    end = time.monotonic() + START_S
    while not found():
        assert time.monotonic() < end and all(each.poll() is None for each in processes)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """Address of a cluster: a head, and a worker with the board `lab`, which is this machine."""
    folder, port = tmp_path_factory.mktemp("cluster"), free_port()
    address = f"127.0.0.1:{port}"
    (folder / "fleet.toml").write_text('[[board]]\nname = "lab"\n')
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    own |= {"XDG_CACHE_HOME": str(folder / "cache"), "RAY_worker_niceness": "0"}
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        for name, value in own.items():
            patch.setenv(name, value)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", *NODE]
        worker = [sys.executable, "-c", "import evm_deploy.cli as c, sys; sys.exit(c.sweep_main())", "worker"]
        nodes = [subprocess.Popen([*ray, "--include-dashboard=false"], stdout=log, stderr=log)]
        try:
            eventually(lambda: listens(port), *nodes)
            flags = ["--devices", str(folder / "fleet.toml"), "--address", address]
            nodes.append(subprocess.Popen([*worker, *flags], stdout=log, stderr=log))
            eventually(lambda: (folder / "log").read_bytes().count(b"Ray runtime started") == 2, *nodes)
            yield address
        except AssertionError:
            without("ray", f"no cluster starts here: {(folder / 'log').read_text(errors='replace')[-300:]}")
        finally:
            for node in reversed(nodes):
                node.terminate()
            for node in reversed(nodes):
                node.wait(30)


def listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


def artifacts(folder: Path) -> dict[str, bytes]:
    models = (folder / "bundles").glob("*/evm_digits-*/model.onnx")
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in models}


def test_a_sweep_outlives_its_workers_and_its_driver(cluster, tmp_path, capsys):
    """A worker is killed in the middle of an export, then the driver: the same command does what is missing."""
    images, labels = digits("heldout")
    np.savez(tmp_path / "val.npz", images=images[:40], labels=labels[:40])
    (tmp_path / "s.toml").write_text(SWEEP)
    out = tmp_path / "run"
    flags = [str(tmp_path / "s.toml"), "-o", str(out), "--engine", "ray", "--address", cluster, "-q"]
    start = [sys.executable, "-c", "import evm_deploy.cli as c, sys; sys.exit(c.sweep_main())"]
    printed = tmp_path / "stdout"
    driver = subprocess.Popen([*start, *flags], stdout=printed.open("wb"))

    def exporting() -> list[int]:
        """Return the workers that write a bundle now: Ray names a worker after its job."""
        keys = [each.parent.name for each in out.glob("bundles/*/.evm_digits-*")]
        return [worker for key in keys for worker in running(f"ray::{key}")]

    eventually(exporting, driver)
    os.kill(exporting()[0], signal.SIGKILL)
    eventually(lambda: list(out.glob("units/*.json")), driver)
    driver.kill()
    driver.wait()
    kept = {each.name: each.read_bytes() for each in out.glob("units/*.json")}
    assert 0 < len(kept) < 8 and printed.read_bytes() == b""  # Ray has said that a worker died
    eventually(lambda: sweep_in(out) is not None)
    assert cli.sweep_main(flags) == 0
    shown = capsys.readouterr().out
    assert int(re.search(r"8 units: (\d) done, (\d) kept", shown)[2]) >= len(kept)
    assert all((out / "units" / name).read_bytes() == content for name, content in kept.items())
    assert len(list(out.glob("records/lab/*.json"))) == 2 and not exporting()

    (tmp_path / "fleet.toml").write_text('[[board]]\nname = "lab"\n')
    here = [str(tmp_path / "s.toml"), "-o", str(tmp_path / "here"), "-q"]
    assert cli.sweep_main([*here, "--devices", str(tmp_path / "fleet.toml")]) == 0
    assert len(artifacts(out)) == 2 and artifacts(out) == artifacts(tmp_path / "here")
    for each in (tmp_path / "here" / "rows").iterdir():
        rows, there = read_rows(each), read_rows(out / "rows" / each.name)
        assert {name: list(values) for name, values in rows.rows.items()} == {
            name: list(values) for name, values in there.rows.items()
        }
    judged = [sorted(each.read_text() for each in (folder / "judged").iterdir()) for folder in (out, tmp_path / "here")]
    assert judged[0] == judged[1] and all('"images": 40' in each for each in judged[0])


def running(name: str) -> list[int]:
    """Return the processes whose command line begins so."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if file.read_bytes().startswith(name.encode()):
                found.append(int(file.parent.name))
    return found


def sweep_in(out: Path) -> object:
    """Return the lock of a sweep's folder, None while another process has it."""
    try:
        with RunFolder(out).locked():
            return out
    except Exception:
        return None


def test_an_evaluation_is_the_same_to_the_last_digit(cluster, demo_bundle):
    engine = RayEngine(cluster)
    try:
        there = evaluate(demo_bundle.path, "demo", demo_bundle.path, engine=engine)
    finally:
        engine.close()
    here = evaluate(demo_bundle.path, "demo", demo_bundle.path, engine=LocalEngine())
    assert here == there and here.accuracy.images == 599 and here.accuracy.sqnr_db > 100


def test_jobs_that_fail_say_why(cluster, tmp_path):
    def dying(place):
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    def refused(place):
        raise ToolchainError(f"no {place.boards.members[0].name}", "look")

    def full(place):
        raise OSError(errno.ENOSPC, "No space left on device", "/shared/rows")

    engine = RayEngine(cluster)
    try:
        with pytest.raises(ToolchainError, match="no host of the cluster offers the board 'pi5'"):
            engine.start(Job("a", refused, "pi5"))
        for job in (Job("dying", dying), Job("refused", refused, "lab"), Job("full", full)):
            engine.start(job)
        ended = {job.name: error for job, error in (engine.next(), engine.next(), engine.next())}
    finally:
        engine.close()
    assert "/shared/rows cannot be written: No space left on device\n  free space" in str(ended["full"])
    assert isinstance(ended["dying"], CrashError) and (tmp_path / "tries").read_text() == "x" * TRIES
    assert (str(ended["refused"]), type(ended["refused"])) == ("no lab\n  look", ToolchainError)


def test_a_board_that_vanishes_is_an_error_of_its_job(cluster, monkeypatch):
    """When it has been away for a while; other jobs go on."""
    monkeypatch.setattr("evm_deploy.sweep.ray_engine.PATIENCE_S", 0.2)
    monkeypatch.setattr("evm_deploy.sweep.ray_engine.LOOK_S", 0.1)
    engine = RayEngine(cluster)
    try:
        engine.start(Job("measured", lambda place: time.sleep(START_S), "lab"))
        without_lab = {name: 1 for name in engine._ray.cluster_resources() if "lab" not in name}
        monkeypatch.setattr(engine._ray, "cluster_resources", lambda: without_lab)
        job, error = engine.next()
        assert job.name == "measured" and "no host of the cluster offers the board 'lab'" in str(error)
        engine.start(Job("other", lambda place: 7))
        assert engine.next()[1] == 7
    finally:
        engine.close()


def test_a_search_runs_on_the_cluster(cluster, tmp_path, capsys):
    images, labels = digits("heldout")
    np.savez(tmp_path / "val.npz", images=images[:40], labels=labels[:40])
    named = ["demo:digits", "--budget", "p50<10s", "--val", str(tmp_path / "val.npz"), "-o", str(tmp_path / "run")]
    flags = ["--imgsz", "48", "--threads", "1", "--trials", "1", "--limit", "0.5", "--engine", "ray", "-q", "--json"]
    assert cli.tune_main([*named, *flags, "--address", cluster, "--device", "nowhere"]) == 3
    assert "no host of the cluster offers the board 'nowhere'" in capsys.readouterr().err
    assert cli.tune_main([*named, *flags, "--address", cluster, "--device", "lab"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == 0 and found["board"] == "lab"
    assert len(list((tmp_path / "run" / "records" / "lab").iterdir())) == 1


def test_an_address_that_does_not_answer(capsys):
    flags = ["bundle", "--val", "demo", "--engine", "ray"]
    assert cli.eval_main([*flags, "--address", f"127.0.0.1:{free_port()}"]) == 3
    assert "does not answer: Connection refused\n  start one:" in capsys.readouterr().err
    assert cli.eval_main([*flags, "--address", "head"]) == 2
    assert "--address head: use HOST:PORT" in capsys.readouterr().err
