"""Exports of one checkpoint to several targets.

Targets that trace alike share one trace. Targets with another trace run at the same time in a second process,
`python -m evm_deploy.export.many`. The second process reads a pickled Job from stdin and writes pickled answers to
stdout. It ends when stdin is closed, and so does not outlive the process that started it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

from evm_deploy._util.cores import usable_cores
from evm_deploy._util.processes import Process, end_with_stdin
from evm_deploy._util.progress import Progress, Step, silent
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.errors import EvmError, ToolchainError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.export.targets import get_target
from evm_deploy.model.network import Network

INTERRUPTED = 130  # exit code


@dataclass(frozen=True)
class TargetOutcome:
    """Result of one plan: the bundle, or the error that ended its export."""

    plan: ExportPlan
    seconds: float
    bundle: Bundle | None = None
    error: EvmError | None = None


@dataclass(frozen=True)
class Job:
    """Exports of one checkpoint that one process runs one after the other, in torch with `threads` threads."""

    checkpoint: str | Path
    plans: tuple[ExportPlan, ...]
    out: str | Path
    force: bool
    sign: str | Path | None
    zipped: bool
    threads: int


def export_all(
    source: str | Path | Network | Source,
    plans: Sequence[ExportPlan],
    out: str | Path = "dist",
    *,
    force: bool = False,
    sign: str | Path | None = None,
    zipped: bool = False,
    step: Step = silent,
    cores: int | None = None,
) -> Iterator[TargetOutcome]:
    """Export every plan. Yields the outcome of each plan as soon as its export has ended.

    A failed export does not stop the others. Plans whose targets trace alike share one trace, in this process. Plans
    with another trace, such as Core ML's, run in a second process at the same time if `source` is a checkpoint's path
    and there are two `cores` or more. The processes share the cores: threads of torch that wait for each other's cores
    take several times as long as one thread. Steps of the second process are entered from another thread, with the
    target's name before the detail. cores: by default the number of cores that this process may use.
    """
    cores = cores or usable_cores()
    source = Source.of(source)
    groups: dict[Any, list[ExportPlan]] = {}
    for plan in plans:
        groups.setdefault(get_target(plan.target).trace, []).append(plan)
    here, *elsewhere = groups.values() if source.checkpoint and cores > 1 else [list(plans)]
    threads = max(1, cores // (1 + len(elsewhere)))
    with contextlib.ExitStack() as stack:
        others = [
            stack.enter_context(
                Worker(Job(str(source.checkpoint), tuple(group), out, force, sign, zipped, threads), step)
            )
            for group in elsewhere
        ]
        for plan in here:
            with torch_threads(threads) if others else contextlib.nullcontext():
                outcome = attempted(source, plan, step, out=out, force=force, sign=sign, zipped=zipped)
            yield outcome
        for worker in others:
            yield from worker.outcomes()


def attempted(source: Source, plan: ExportPlan, step: Step, **options: Any) -> TargetOutcome:
    """Run one export with the `options` of `export`. Returns its outcome, with the EvmError if the export fails."""
    start = time.perf_counter()
    try:
        bundle = export(source, plan, step=step, **options)
    except EvmError as error:
        return TargetOutcome(plan, time.perf_counter() - start, error=error)
    return TargetOutcome(plan, time.perf_counter() - start, bundle)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Context manager in which torch computes with `count` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Worker:
    """A job in a separate process. The process ends with the `with` block, and with the process that started it."""

    def __init__(self, job: Job, step: Step) -> None:
        self.job, self.step = job, step
        self.found: list[TargetOutcome] = []
        command = [sys.executable, "-m", "evm_deploy.export.many"]
        self.process = Process(command, stdin=PIPE, stdout=PIPE)
        with contextlib.suppress(BrokenPipeError):  # the process has died: `outcomes` reports it
            self._pipe(self.process.stdin).write(pickle.dumps(job))
            self._pipe(self.process.stdin).flush()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def outcomes(self) -> list[TargetOutcome]:
        """Wait for the process and return all outcomes: a ToolchainError for plans that the process did not reach."""
        self.thread.join()
        code = self.process.wait()
        missing = self.job.plans[len(self.found) :]
        died = ToolchainError(f"the export process ended with exit code {code}", "run evm-export with one --target")
        return [*self.found, *(TargetOutcome(plan, 0.0, error=died) for plan in missing)]

    def _listen(self) -> None:
        """Enter and leave the steps that the process reports, and collect its outcomes, until the process ends."""
        answers = self._pipe(self.process.stdout)
        entered: list[contextlib.AbstractContextManager[Progress]] = []
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                kind, *rest = pickle.load(answers)
                if kind == "enter":
                    entered.append(self.step(*rest))
                    entered[-1].__enter__()
                elif kind == "leave":
                    entered.pop().__exit__(*((None,) * 3 if rest[0] else (Exception, Exception(), None)))
                else:
                    self.found.append(rest[0])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe(self.process.stdin).close()
        self.process.wait()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def main() -> int:
    """Run the job that stdin holds. Returns the exit code."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that libraries print goes to stderr: stdout holds answers only
    job: Job = pickle.load(sys.stdin.buffer)
    end_with_stdin(INTERRUPTED)

    def tell(*message: Any) -> None:
        pickle.dump(message, answers)
        answers.flush()

    @contextlib.contextmanager
    def step(name: str, detail: str) -> Iterator[Progress]:
        tell("enter", name, f"{plan.target}: {detail}")
        good = False
        try:
            yield lambda done, total: None
            good = True
        finally:
            tell("leave", good)

    source = Source(job.checkpoint)
    options = {"out": job.out, "force": job.force, "sign": job.sign, "zipped": job.zipped}
    with torch_threads(job.threads):
        for plan in job.plans:
            tell("outcome", attempted(source, plan, step, **options))
    return 0


if __name__ == "__main__":
    from evm_deploy.export import many  # pickled classes must not belong to __main__

    sys.exit(many.main())
