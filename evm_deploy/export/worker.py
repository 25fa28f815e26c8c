"""Exports in a process of their own: for code of others, and for a second export at the same time.

The process reads a pickled Job from stdin and writes pickled answers to its first stdout. It ends when stdin is closed,
and so does not outlive the process that started it. Text that its code prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from subprocess import PIPE, TimeoutExpired
from typing import IO, Any

from evm_deploy._util.own_process import set_up_own_process
from evm_deploy._util.processes import PATIENCE_S, Process, end_with_stdin
from evm_deploy._util.progress import Progress, Step
from evm_deploy._util.torch_settings import torch_threads
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.errors import EvmError, ToolchainError, UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.model.factory import Factory
from evm_deploy.model.graph_file import GraphFile
from evm_deploy.model.network import ModelSpec

INTERRUPTED = 130  # exit code
#: The process finds modules where this one does. Python would put the working directory first, with whatever is in it.
START = "import sys; sys.path[:] = {path!r}; from evm_deploy.export import worker; sys.exit(worker.main())"


class CrashError(EvmError):
    """Exception that no export should raise, in a process whose code others wrote."""

    exit_code = 1


@dataclass(frozen=True)
class TargetOutcome:
    """Result of one plan: the bundle, or the error that ended its export."""

    plan: ExportPlan
    seconds: float
    bundle: Bundle | None = None
    error: EvmError | None = None


@dataclass(frozen=True)
class Job:
    """Exports of one network that one process runs one after the other, in torch with `threads` threads.

    recipe: path of a checkpoint, Factory or GraphFile. named: whether steps have the target's name before the detail.
    A job without plans makes the network of a Factory, and answers with its spec.
    """

    recipe: str | Factory | GraphFile
    plans: tuple[ExportPlan, ...]
    out: str | Path = ""
    force: bool = False
    sign: str | Path | None = None
    zipped: bool = False
    named: bool = True
    threads: int | None = None


def attempted(source: Source, plan: ExportPlan, step: Step, **options: Any) -> TargetOutcome:
    """Run one export with the `options` of `export`. Returns its outcome, with the EvmError if the export fails."""
    start = time.perf_counter()
    try:
        bundle = export(source, plan, step=step, **options)
    except EvmError as error:
        return TargetOutcome(plan, time.perf_counter() - start, error=error)
    return TargetOutcome(plan, time.perf_counter() - start, bundle)


class Worker:
    """A job in a separate process. The process ends with the `with` block, and with the process that started it."""

    def __init__(self, job: Job, step: Step) -> None:
        self.job, self.step = job, step
        self.answers: SimpleQueue[Any] = SimpleQueue()  # outcomes, specs and errors; None at the end
        self.last_step = ""
        self.process = Process([sys.executable, "-c", START.format(path=sys.path)], stdin=PIPE, stdout=PIPE)
        with contextlib.suppress(BrokenPipeError):  # the process has died: the answers end
            self._pipe(self.process.stdin).write(pickle.dumps(job))
            self._pipe(self.process.stdin).flush()
        threading.Thread(target=self._listen, daemon=True).start()

    def outcomes(self) -> Iterator[TargetOutcome]:
        """Yield the outcome of each plan as soon as it is there: an error for plans that the process did not reach."""
        found = 0
        while (outcome := self.answers.get()) is not None:
            found += 1
            yield outcome
        for plan in self.job.plans[found:]:
            yield TargetOutcome(plan, 0.0, error=self._died())

    def spec(self) -> ModelSpec:
        """Return the spec of the job's network. Raises the EvmError that ended the making of the network."""
        answer = self.answers.get()
        if answer is None:
            raise self._died()
        if isinstance(answer, EvmError):
            raise answer
        spec: ModelSpec = answer
        return spec

    def _died(self) -> EvmError:
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if isinstance(self.job.recipe, Factory):
            during = f", in step '{self.last_step}'" if self.last_step else ""
            return UsageError(
                f"--model {self.job.recipe.where}: its code ended the process with {how}{during}",
                "PYTHONFAULTHANDLER=1 in the environment makes Python print the line of a crash",
            )
        return ToolchainError(f"the export process ended with {how}", "run evm-export with one --target")

    def _listen(self) -> None:
        """Enter and leave the steps that the process reports, and collect its answers, until the process ends."""
        answers = self._pipe(self.process.stdout)
        entered: list[tuple[contextlib.AbstractContextManager[Progress], Progress]] = []

        def leave(good: bool) -> None:
            entered.pop()[0].__exit__(*((None,) * 3 if good else (Exception, Exception(), None)))

        try:
            while True:
                kind, *rest = pickle.load(answers)
                if kind == "enter":
                    self.last_step = rest[0]
                    step = self.step(*rest)
                    entered.append((step, step.__enter__()))
                elif kind == "advance":
                    entered[-1][1](*rest)
                elif kind == "leave":
                    leave(*rest)
                else:
                    self.answers.put(*rest)
        except (EOFError, pickle.UnpicklingError):
            while entered:
                leave(False)
        finally:
            self.answers.put(None)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:  # the process ends by itself; the end of its stdin would run its exit functions a second time
            with contextlib.suppress(TimeoutExpired):
                self.process.wait(PATIENCE_S)
        with contextlib.suppress(BrokenPipeError):
            self._pipe(self.process.stdin).close()
        self.process.wait()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def main() -> int:
    """Run the job that stdin holds. Returns the exit code."""
    set_up_own_process()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job: Job = pickle.load(sys.stdin.buffer)
    end_with_stdin(INTERRUPTED)

    def tell(*message: Any) -> None:
        pickle.dump(message, answers)
        answers.flush()

    @contextlib.contextmanager
    def step(name: str, detail: str) -> Iterator[Progress]:
        tell("enter", name, f"{plan.target}: {detail}" if job.named else detail)
        good = False
        try:
            yield lambda done, total: tell("advance", done, total)
            good = True
        finally:
            tell("leave", good)

    source = Source(job.recipe)
    if not job.plans:
        tell("answer", _spec(source))
    options = {"out": job.out, "force": job.force, "sign": job.sign, "zipped": job.zipped}
    with torch_threads(job.threads):
        for plan in job.plans:
            tell("answer", _outcome(source, plan, step, **options))
    return 0


def _spec(source: Source) -> ModelSpec | EvmError:
    from evm_deploy.model.foreign.door import network_of

    assert isinstance(source.recipe, Factory)
    try:
        return network_of(source.recipe).spec
    except EvmError as error:
        return error


def _outcome(source: Source, plan: ExportPlan, step: Step, **options: Any) -> TargetOutcome:
    """Return the outcome of an export. Exceptions that the code of a Factory raises become one, too."""
    if not isinstance(source.recipe, Factory):
        return attempted(source, plan, step, **options)
    from evm_deploy.model.foreign.look import OTHERS, reason

    try:
        return attempted(source, plan, step, **options)
    except OTHERS as error:
        hint = "mend it; if the place is not in your code, report this with the output of evm-doctor"
        return TargetOutcome(
            plan, 0.0, error=CrashError(f"--model {source.name}: the export fails: {reason(error)}", hint)
        )
