"""Shared parts of the commands: common flags, progress lines, error messages, exit codes.

Results go to stdout. Progress and messages go to stderr.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from evm_deploy import __version__
from evm_deploy._util.progress import Progress, silent
from evm_deploy._util.text import escape_controls
from evm_deploy.errors import EvmError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
BAR_WIDTH = 30
PLAIN_WIDTH = 200  # columns of output when stdout is not a terminal
SHOW_CURSOR = b"\x1b[?25h"
EXIT_CODES = """exit codes:
  0 ok   1 crash   2 usage or bad input   3 toolchain missing   4 parity failed
  5 accuracy gate failed   6 latency budget failed   130 interrupted"""


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
    """Argument parser whose errors have the same form as every EvmError."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and a pointer to --help on stderr, and exit with code 2."""
        print(f"{self.prog}: {escape_controls(message)}\n  see  {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def common_flags(parser: argparse._ActionsContainer) -> None:
    """Add --json, --verbose, --quiet and --version to a parser or an argument group."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("-q", "--quiet", action="store_true", help="print no progress on stderr")
    parser.add_argument("--version", action="version", version=f"evm-deploy {__version__}")


@contextlib.contextmanager
def _interruptible(prog: str) -> Iterator[None]:
    """Context manager: on Ctrl-C and SIGTERM, delete unfinished files, show the cursor and end the process at once.

    The handler raises no exception, because libraries swallow exceptions raised inside their imports, abort on
    exceptions inside their callbacks, or report them as errors of their own. Unfinished files are registered with
    atexit (`aside` in _util/files.py).
    """

    def stop(signum: int, frame: Any) -> NoReturn:
        signal.signal(signum, signal.SIG_DFL)  # a second Ctrl-C ends the process without this clean-up
        atexit._run_exitfuncs()
        if sys.stderr.isatty():
            os.write(2, SHOW_CURSOR)
        os.write(2, f"{prog}: interrupted; nothing was left behind\n".encode())
        os._exit(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {which: signal.signal(which, stop) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def run_command(prog: str, body: Callable[[], int], verbose: bool = False) -> int:
    """Run the body of a command and return its exit code. Every exception becomes one message on stderr.

    verbose: raise exceptions again, so that Python prints their traceback.
    """
    try:
        with _interruptible(prog):
            code = body()
        sys.stdout.flush()
        return code
    except EvmError as error:
        print(escape_controls(f"{prog}: {error}"), file=sys.stderr)
        if verbose:
            raise
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(escape_controls(f"{prog}: {where}{error.strerror or error}"), file=sys.stderr)
        if verbose:
            raise
        return EvmError.exit_code
    except Exception as error:
        if verbose:
            raise
        said = escape_controls(f"{prog}: internal error: {type(error).__name__}: {error}")
        print(f"{said}\n  run again with -v and report the traceback", file=sys.stderr)
        return 1
