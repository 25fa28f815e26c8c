"""Shared parts of the commands: common flags, progress lines, error messages, exit codes.

Results go to stdout. Progress and messages go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from evm_deploy import __version__
from evm_deploy._util.kept import what_is_left
from evm_deploy._util.own_process import set_up_own_process
from evm_deploy._util.processes import leave
from evm_deploy._util.progress import Progress, silent
from evm_deploy._util.text import escape_controls
from evm_deploy.errors import EvmError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
BAR_WIDTH = 30
PLAIN_WIDTH = 200  # columns of output when stdout is not a terminal
SHOW_CURSOR = "\x1b[?25h"
EXIT_CODES = """exit codes:
  0 ok   1 crash   2 usage or bad input   3 toolchain missing   4 parity failed
  5 accuracy gate failed   6 latency budget failed   130 interrupted
  of several targets, bundles, forms, boards or images: the largest code"""


class Steps:
    """Progress display on stderr: one line per finished step, such as `trace  opset 20, batch 1   ok 7.1 s`.

    A terminal also shows a spinner while a step runs. The spinner becomes a bar when the step reports its progress, or
    when `progress` has reported the progress of the whole command.
    """

    def __init__(self, quiet: bool, live: bool = True) -> None:
        """Set the display up. live: show spinner and bar; only possible when steps run one at a time."""
        self.quiet, self.live = quiet, live
        self._whole: tuple[int, int] | None = None

    def progress(self, done: int, total: int) -> None:
        """Report the progress of the whole command; the bar of the next steps shows it."""
        self._whole = (done, total)

    @contextlib.contextmanager
    def __call__(self, name: str, detail: str) -> Iterator[Progress]:
        if self.quiet:
            with silent(name, detail) as advance:
                yield advance
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        label = escape_controls(f"{name:<10} {detail}", keep="")
        padded = escape(f"{label:<56}")
        start = time.perf_counter()

        def bar(done: int, total: int) -> Table:
            grid = Table.grid(padding=(0, 1))
            grid.add_row(escape(label), ProgressBar(total, done, width=BAR_WIDTH), f"{done}/{total}")
            return grid

        def show(done: int, total: int) -> None:
            live.update(bar(done, total))

        live = console.status(bar(*self._whole) if self._whole else escape(label))

        try:
            with live if self.live and console.is_terminal and not os.environ.get("CI") else contextlib.nullcontext():
                yield show
        except BaseException:
            console.print(f"{padded} [red]failed[/red] {time.perf_counter() - start:.1f} s")
            raise
        console.print(f"{padded} [green]ok[/green] {time.perf_counter() - start:.1f} s")


def stdout_console() -> Console:
    """Return a rich console on stdout that prints markup as plain text and breaks no lines in a pipe or file."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors have the same form as every EvmError, and that refuses empty arguments.

    An empty argument is mostly a shell variable that is not set: a path of it would be the working directory, and a key
    of it no key. All positional arguments are paths: those after `--` that begin with a hyphen get `./` in front,
    because `parse_intermixed_args` takes them for flags.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`, by default those of the process. Exits with code 2 for an empty argument."""
        given = list(sys.argv[1:] if args is None else args)
        for place, argument in enumerate(given):
            flag, _, value = argument.partition("=")
            if not argument:
                before = given[place - 1] if place and given[place - 1].startswith("-") else f"argument {place + 1}"
                self.error(f"{before}: the value is empty; is a shell variable not set?")
            if flag.startswith("--") and flag != argument and not value:
                self.error(f"{flag}: the value is empty; is a shell variable not set?")
        return super().parse_known_args(given, namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args` with flags between positional arguments; after `--` there are none."""
        given = list(sys.argv[1:] if args is None else args)
        if "--" in given:
            place = given.index("--")
            given[place:] = [f"./{each}" if each.startswith("-") else each for each in given[place + 1 :]]
        return super().parse_intermixed_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Print `message`, flags like a misspelt one, and a pointer to --help on stderr; exit with code 2."""
        flags = self._option_string_actions
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        near = [name for word in unknown if word not in flags for name in get_close_matches(word, flags, 1)]
        meant = f"  did you mean {', '.join(near)}?\n" if message.startswith("unrecognized") and near else ""
        print(f"{self.prog}: {escape_controls(message)}\n{meant}  see  {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def common_flags(parser: argparse._ActionsContainer) -> None:
    """Add --json, --verbose, --quiet and --version to a parser or an argument group."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("-q", "--quiet", action="store_true", help="print no progress on stderr")
    parser.add_argument("--version", action="version", version=f"evm-deploy {__version__}")


class Output:
    """Text stream whose reader may go away, and which may be full: what a command finds does not depend on either.

    After the first failed write all output is dropped. lost: the error of that write, None if its reader went away.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    @property
    def exit_code(self) -> int:
        """Exit code of a command that has found nothing wrong: 2 if its results could not be written."""
        return EvmError.exit_code if self.lost else 0

    def write(self, text: str) -> int:
        """Write `text`. Returns its length, also if the stream cannot be written."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[..., object], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            self.lost = None if isinstance(error, BrokenPipeError) else error
            with contextlib.suppress(OSError):  # a stream in memory has no file
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded_output() -> Iterator[Output]:
    """Context manager: stdout and stderr take every character, and no reader or full disk ends the command.

    Yields the guarded stdout. Characters that the encoding of a stream lacks become `?`. A stream that was closed
    before the start is replaced by one that drops all, because files opened later would get its number.
    """
    before = (sys.stdout, sys.stderr)
    settings = [(stream, stream.encoding, stream.errors) for stream in before if hasattr(stream, "reconfigure")]
    for stream, _, _ in settings:
        stream.reconfigure(errors="replace")
    out, err = (Output(stream or open(os.devnull, "w")) for stream in before)  # noqa: PTH123, SIM115
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        if out.lost:
            print(f"the results cannot be written to stdout: {out.lost.strerror}", file=sys.stderr)
        err.flush()
        for stream, encoding, errors in settings:
            stream.reconfigure(encoding=encoding, errors=errors)
        sys.stdout, sys.stderr = before


def print_document(text: str) -> None:
    """Print a document to stdout in UTF-8, as in a file, whatever the encoding of the terminal is."""
    sys.stdout.flush()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
    print(text, end="")


@contextlib.contextmanager
def _interruptible(prog: str) -> Iterator[None]:
    """Context manager: on Ctrl-C, SIGTERM and SIGHUP, end child processes, delete unfinished files and end at once.

    The handler raises no exception, because libraries swallow exceptions raised inside their imports, abort on
    exceptions inside their callbacks, or report them as errors of their own. A signal that is ignored, as by nohup,
    stays ignored.
    """

    def stop(signum: int, frame: Any) -> NoReturn:
        for which in before:
            signal.signal(which, signal.SIG_DFL)  # a second Ctrl-C ends the process without this clean-up
        cursor = SHOW_CURSOR if os.isatty(2) else ""
        leave(INTERRUPTED, f"{cursor}{prog}: interrupted; {what_is_left()}\n")

    before = _signals()
    with _handled(before, stop):
        yield


@contextlib.contextmanager
def ended_by_signal() -> Iterator[threading.Event]:
    """Context manager: the first Ctrl-C, SIGTERM or SIGHUP sets the event; a second one ends the command as always.

    For work without an end of its own, whose results are complete whenever it ends.
    """
    asked, before = threading.Event(), _signals()

    def ask(signum: int, frame: Any) -> None:
        asked.set()
        for which, handler in before.items():
            signal.signal(which, handler)

    with _handled(before, ask):
        yield asked


def _signals() -> dict[int, Any]:
    """Return the handlers of Ctrl-C, SIGTERM and SIGHUP, without ignored ones. Only the main thread has signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return {which: signal.getsignal(which) for which in signals if signal.getsignal(which) != signal.SIG_IGN}


@contextlib.contextmanager
def _handled(before: dict[int, Any], handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Context manager: handle the signals of `before` by `handler`, and afterwards as before."""
    for which in before:
        signal.signal(which, handler)
    try:
        yield
    finally:
        for which, old in before.items():
            signal.signal(which, old)


def run_command(prog: str, body: Callable[[], int], args: argparse.Namespace) -> int:
    """Run the body of a command and return its exit code. Every exception becomes one message on stderr.

    args: with args.verbose, Python's traceback is printed below the message.
    """
    set_up_own_process()
    try:
        with _interruptible(prog):
            return body()
    except Exception as error:
        code, said = _explained(error, args.verbose)
        print(escape_controls(f"{prog}: {said}"), file=sys.stderr)
        if args.verbose:
            traceback.print_exc()
        return code


def _explained(error: Exception, verbose: bool) -> tuple[int, str]:
    """Return exit code and message of an exception."""
    if isinstance(error, EvmError):
        return error.exit_code, str(error)
    if isinstance(error, OSError):
        return EvmError.exit_code, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    more = "" if verbose else "\n  run again with -v and report the traceback"
    return 1, f"internal error: {type(error).__name__}: {error}{more}"
