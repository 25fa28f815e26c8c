"""Engine on Ray: jobs run on the machines of a cluster. Boards are custom resources of the hosts that reach them.

The done-files of a sweep say what is done, not Ray: jobs end with the command that started them, and the same command
continues.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import time
from typing import Any

from evm_deploy._util.packages import install_hint
from evm_deploy.errors import EvmError, ToolchainError, UsageError
from evm_deploy.sweep.boards import HERE, boards_here
from evm_deploy.sweep.engine import TRIES, Job, Place, attempted, crash

AUTO = "auto"
CORES = 1  # that a job takes of its host
RESOURCE = "board:"  # begins the resource of a board's name or class
CONNECT_S = 5.0  # time for the head of the cluster to answer
LOOK_S = 5.0  # between two looks for boards that have gone
START = "start one:  ray start --head"
NO_TOKEN = "give both ends the same token:  ray get-auth-token --generate  ; RAY_AUTH_MODE=disabled goes without"
PATIENCE_S = 60.0  # time that a board may be away, such as while its host starts again
#: Variables of Ray, unless the user has set them. Without the first, Ray reports its use to its makers; without the
#: second, it asks no cluster for a token; without the third, workers have the priority 15 of `nice`, and a measurement
#: waits for every other program; without the fourth, it warns of a default that will change.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
TOKEN = "RAY_AUTH_TOKEN"


class RayEngine:
    """Engine of a Ray cluster.

    address: `host:port` of its head, `auto` for the cluster on this machine, None for one of its own that ends with
    this process. Raises ToolchainError if Ray is not installed or the cluster does not answer, UsageError for an
    address that is none.
    """

    def __init__(self, address: str | None = None) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise ToolchainError("--engine ray needs Ray, which is not installed", install_hint("ray")) from error
        if address not in (None, AUTO):
            require_answer(str(address))
        own: dict[str, Any] = {} if address else {"include_dashboard": False}
        if not address:
            os.environ.setdefault(TOKEN, secrets.token_hex(32))  # else Ray leaves one in the user's home folder
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own
            where = "on this machine" if address in (None, AUTO) else f"at {address}"
            hint = NO_TOKEN if "uthenticat" in f"{error} {error.__cause__}" else START
            raise ToolchainError(f"no Ray cluster can be used {where}: {_first_line(error)}", hint) from error
        self._ray = ray
        self._running: dict[Any, Job] = {}
        self._gone: dict[str, float] = {}
        self._remote = ray.remote(max_retries=TRIES - 1, retry_exceptions=True, num_cpus=CORES)(_attempted_there)

    def require(self, board: str) -> None:
        """Raise ToolchainError unless a host of the cluster offers a board of this name or class; `here` always is."""
        if board != HERE and RESOURCE + board not in self._ray.cluster_resources():
            raise _nobody_offers(board)

    def start(self, job: Job) -> None:
        """Begin a job. Raises ToolchainError for a board that no host of the cluster offers."""
        if job.board:
            self.require(job.board)
        resources = {RESOURCE + job.board: 1} if job.board else {}
        self._running[self._remote.options(resources=resources, name=job.name).remote(job)] = job

    def next(self) -> tuple[Job, Any]:
        """Wait for any job to end. A job whose board is away for a minute fails."""
        while True:
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=LOOK_S)
            for reference in ready:
                job = self._running.pop(reference)
                return job, self._result(reference)
            lost = self._lost()
            if lost:
                self._ray.cancel(lost, force=True)
                job = self._running.pop(lost)
                return job, _nobody_offers(job.board)

    def close(self) -> None:
        """Cancel the jobs that have not ended, and disconnect."""
        with contextlib.suppress(Exception):
            for reference in self._running:
                self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    def _result(self, reference: Any) -> Any:
        """Return the result of a job, or the EvmError that it failed with."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            return crash(cause if isinstance(cause, Exception) else error)

    def _lost(self) -> Any:
        """Return the reference of a job whose board nobody has offered for PATIENCE_S, else None."""
        offered, now = self._ray.cluster_resources(), time.monotonic()
        for board in {job.board for job in self._running.values() if job.board}:
            if RESOURCE + board in offered:
                self._gone.pop(board, None)
            elif now - self._gone.setdefault(board, now) > PATIENCE_S:
                return next(each for each, job in self._running.items() if job.board == board)
        return None


def require_answer(address: str) -> None:
    """Raise ToolchainError unless something listens at `host:port`, UsageError for a text of another form."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--address {address}: use HOST:PORT, such as 10.0.0.1:6379", "or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or os.strerror(errno.ETIMEDOUT)
        raise ToolchainError(f"the Ray cluster at {address} does not answer: {reason}", START) from error


def _attempted_there(job: Job) -> Any:
    """Run a job on a worker, with the boards of its host."""
    return attempted(job, Place(boards_here(), CORES))


def _nobody_offers(board: str) -> EvmError:
    return ToolchainError(
        f"no host of the cluster offers the board {board!r}",
        "on the host that reaches it:  evm-sweep worker --devices FLEET.toml --address HEAD",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
