"""The board's end of `--host`: sent as text and run by `python3 -c`, so it needs Python 3.7 and nothing else.

stdin: lines of JSON, {"file": path, "size": n} with n bytes behind it, or {"run": [arguments], "seconds": s}; empty
lines are signs of life. stdout: MARK and [major, minor] of Python, then one line of JSON for each run.

All that is made is one folder and the processes of a run. Both go when stdin ends, which it does with the connection,
when nothing was heard for SILENCE_S seconds, which is when the other machine is gone without a word, or on a signal. A
run reads a pipe that ends with this process, so that it notices even if this one is killed (bench/remote/agent.py).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Dict, List, Optional  # noqa: UP035  Python 3.7

MARK = "evm-bench supervisor"
SILENCE_S = 30.0
BLOCK = 1 << 16
SHOWN = 4000  # characters of a run's stderr


class Supervisor:
    """The folder, and the run that is going on in it."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="evm-bench-")
        self.running: Optional[subprocess.Popen] = None  # type: ignore[type-arg]  # noqa: UP045
        self.heard = time.monotonic()

    def serve(self) -> None:
        """Do what stdin says until it ends."""
        for line in iter(sys.stdin.buffer.readline, b""):
            self.heard = time.monotonic()
            order = json.loads(line.decode() or "{}") if line.strip() else {}
            if "file" in order:
                self.receive(order["file"], order["size"])
            elif "run" in order:
                self.start(order["run"], order["seconds"])

    def receive(self, name: str, size: int) -> None:
        path = os.path.join(self.folder, name)  # noqa: PTH118
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            while size:
                block = sys.stdin.buffer.read(min(size, BLOCK))
                if not block:
                    self.end()
                self.heard = time.monotonic()
                file.write(block)
                size -= len(block)

    def start(self, arguments: List[str], seconds: float) -> None:  # noqa: UP006
        """Run this Python on the arguments, in a process group of its own, tied to this process by its stdin."""
        tied, tie = os.pipe()
        self.running = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**os.environ, "TMPDIR": self.folder},  # ONNX Runtime, for one, leaves a file .ses there
            stdin=tied,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(tied)
        threading.Thread(target=self.answer, args=(self.running, seconds, tie), daemon=True).start()

    def answer(self, run: Any, seconds: float, tie: int) -> None:
        """Wait for a run, at most `seconds`, and say how it ended."""
        late = False
        try:
            out, err = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
            self.kill()
            out, err = run.communicate()
        os.close(tie)
        code, said = run.returncode, err.decode("utf-8", "replace")[-SHOWN:]
        try:
            say({"code": code, "stdout": out.decode("utf-8", "replace"), "stderr": said, "late": late})
        except OSError:
            self.end()

    def watch(self) -> None:
        while time.monotonic() - self.heard < SILENCE_S:
            time.sleep(1)
        self.end()

    def kill(self) -> None:
        if self.running:
            try:
                os.killpg(self.running.pid, signal.SIGKILL)
            except OSError:
                pass
            else:
                self.running.wait()

    def end(self, *signal_and_frame: Any) -> None:
        """Kill what runs, remove the folder, end this process."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(0)


def say(what: Dict[str, Any]) -> None:  # noqa: UP006
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    supervisor = Supervisor()
    for which in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(which, supervisor.end)
    threading.Thread(target=supervisor.watch, daemon=True).start()
    try:
        print(MARK, list(sys.version_info[:2]), flush=True)
        supervisor.serve()
    except Exception as error:  # such as a full disk: the other end reads why
        say({"code": None, "stdout": "", "stderr": "%s: %s" % (type(error).__name__, error), "late": False})  # noqa: UP031
    finally:
        supervisor.end()


if __name__ == "__main__":
    main()
