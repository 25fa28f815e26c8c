"""Dockerfiles without Docker: their steps, and a run of these on a copy of this system that is thrown away."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

WORDS = ("FROM", "ARG", "RUN", "COPY", "USER", "ENTRYPOINT")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What is written goes to memory. The namespace ends with the process, and its mounts with it.
MOUNTS = """set -e
mount -t tmpfs none {work}
mkdir {work}/written {work}/own {work}/root
mount -t overlay overlay -o lowerdir=/,upperdir={work}/written,workdir={work}/own {work}/root
mount --bind /proc {work}/root/proc
mount --bind /dev {work}/root/dev
mount --bind /sys {work}/root/sys
"""


@dataclass(frozen=True)
class Step:
    """Instruction of a Dockerfile: its word, and the rest of its lines as one."""

    word: str
    rest: str


def steps(path: Path) -> list[Step]:
    """Read a Dockerfile. Raises AssertionError for instructions that are not in WORDS."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.M))
    found = [Step(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]
    assert not [each for each in found if each.word not in WORDS], path
    return found


def entry_point(dockerfile: Sequence[Step]) -> list[str]:
    """Return the command of an image."""
    (last,) = (each.rest for each in dockerfile if each.word == "ENTRYPOINT")
    command: list[str] = json.loads(last)
    return command


def run(
    dockerfile: Sequence[Step], context: Path, work: Path, arguments: Mapping[str, str], *command: str
) -> subprocess.CompletedProcess[str]:
    """Take the steps in a copy of this system, and run the entry point there with a command. Needs root.

    context: the folder that COPY reads. arguments: of --build-arg. FROM is taken for this system: compare them before.
    """
    script, root, user = [MOUNTS.format(work=work)], work / "root", "root"

    def inside(words: Sequence[str]) -> str:
        return f"chroot --userspec={user} {root} /usr/bin/env PATH={PATH} HOME=/tmp {shlex.join(words)}"

    for step in dockerfile:
        rest = Template(step.rest).safe_substitute(arguments) if step.word == "COPY" else step.rest
        if step.word == "RUN":
            script.append(inside(["sh", "-ec", rest]))
        elif step.word == "COPY":
            source, to = rest.split()
            script.append(f"mkdir -p {root}{to} && cp -r {context / source}/. {root}{to}")
        elif step.word == "USER":
            user = rest
    script.append(inside([*entry_point(dockerfile), *command]))
    (work.parent / "steps").write_text("\n".join(script))
    unshare = ["unshare", "-m", "sh", str(work.parent / "steps")]
    return subprocess.run(unshare, capture_output=True, text=True, timeout=900)
