"""Supervisor of the runs on a board (`--host`): sent as text and run by `python3 -c`; needs Python 3.7 alone.

stdin: lines of JSON, {"file": path, "size": n} followed by n bytes, or {"run": [arguments], "seconds": s}. Empty lines
are keep-alive signs. stdout: MARK and [major, minor] of Python, then one line of JSON for each run.

The supervisor makes one folder and starts the processes of the runs. It kills these processes and removes the folder
in three cases: stdin ends, because the connection has ended; no line came for SILENCE_S seconds, because the other
machine is gone; or a signal arrives. The stdin of a run is a pipe from the supervisor, so a run notices even a
supervisor that was killed (bench/remote/agent.py).
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
    """Folder on the board, and the run in progress."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="evm-bench-")
        self.running: Optional[subprocess.Popen] = None  # type: ignore[type-arg]  # noqa: UP045
        self.heard = time.monotonic()

    def serve(self) -> None:
        """Receive files and start runs as the lines of stdin ask, until stdin ends."""
        for line in iter(sys.stdin.buffer.readline, b""):
            self.heard = time.monotonic()
            order = json.loads(line.decode() or "{}") if line.strip() else {}
            if "file" in order:
                self.receive(order["file"], order["size"])
            elif "run" in order:
                self.start(order["run"], order["seconds"])

    def receive(self, name: str, size: int) -> None:
        """Read `size` bytes from stdin into the file `name` of the folder."""
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
        """Run this Python with `arguments`, in a new process group, with a pipe from this process as stdin."""
        tied, tie = os.pipe()
        self.running = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            # ONNX Runtime for example leaves a file .ses in TMPDIR; the group is that of _util/processes.py
            env={**os.environ, "TMPDIR": self.folder, "EVM_PROCESS_GROUP": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=tied,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(tied)
        threading.Thread(target=self.answer, args=(self.running, seconds, tie), daemon=True).start()

    def answer(self, run: Any, seconds: float, tie: int) -> None:
        """Wait for a run, at most `seconds`, and write its exit code and output to stdout."""
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
        """End this process when nothing was read for SILENCE_S seconds."""
        while time.monotonic() - self.heard < SILENCE_S:
            time.sleep(1)
        self.end()

    def kill(self) -> None:
        """Kill the process group of the run, if there is one, and wait for its end."""
        if self.running:
            try:
                os.killpg(self.running.pid, signal.SIGKILL)
            except OSError:
                pass
            else:
                self.running.wait()

    def end(self, *signal_and_frame: Any) -> None:
        """Kill the run, remove the folder and end this process. Also the handler of signals."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(0)


def say(what: Dict[str, Any]) -> None:  # noqa: UP006
    """Write one line of JSON to stdout."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the supervisor until stdin ends, the other machine is silent, or a signal arrives."""
    supervisor = Supervisor()
    for which in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(which, supervisor.end)
    threading.Thread(target=supervisor.watch, daemon=True).start()
    try:
        print(MARK, list(sys.version_info[:2]), flush=True)
        supervisor.serve()
    except Exception as error:  # such as a full disk; the other machine shows the message
        say({"code": None, "stdout": "", "stderr": "%s: %s" % (type(error).__name__, error), "late": False})  # noqa: UP031
    finally:
        supervisor.end()


if __name__ == "__main__":
    main()
