"""Print the tables of docs/reliability.md from the results of the other scripts.

python -m reliability.table [dist/reliability]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reliability import fuzz


def fuzzed(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of fuzz.py."""
    yield "| reader | inputs | accepted | refused | findings | found before and fixed |"
    yield "|---|---|---|---|---|---|"
    for name, each in results.items():
        mended = len(list((fuzz.REGRESSIONS / name).glob("*")))
        refused = each["inputs"] - each["accepted"] - len(each["findings"])
        yield f"| {name} | {each['inputs']} | {each['accepted']} | {refused} | {len(each['findings'])} | {mended} |"
    inputs = sum(each["inputs"] for each in results.values())
    yield f"| **all** | {inputs} | | | {sum(len(each['findings']) for each in results.values())} | |"


def operators(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of operators.py."""
    yield "| runtime | inputs | computed | refused | findings |"
    yield "|---|---|---|---|---|"
    for name, each in results.items():
        counts = (each["inputs"], each.get("computed", 0), each.get("refused", 0), len(each["findings"]))
        yield f"| {name} | {' | '.join(map(str, counts))} |"


def faults(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of faults.py."""
    yield "| fault | runs | killed | refused | succeeded | findings |"
    yield "|---|---|---|---|---|---|"
    for name, each in results.items():
        columns = (each["runs"], each["killed"], each["refused"], each["succeeded"], len(each["findings"]))
        yield f"| {name} | {' | '.join(map(str, columns))} |"
    yield f"| **all** | {sum(each['runs'] for each in results.values())} | | | | |"


def numbers(results: list[dict[str, str]]) -> Iterator[str]:
    """Yield the lines of the table of numbers.py."""
    forms = list(dict.fromkeys(each["form"] for each in results))
    found = {(each["case"], each["form"]): each["outcome"] for each in results}
    yield f"| weights | {' | '.join(forms)} |"
    yield f"|---|{'---|' * len(forms)}"
    for case in dict.fromkeys(each["case"] for each in results):
        yield f"| {case} | {' | '.join(found.get((case, form), '') for form in forms)} |"
    counts = Counter(found.values())
    yield f"| **all** | {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))} |"


def load(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of load.py."""
    yield "| job | done | results that differ | resident MB after a tenth, at the end | descriptors and folders | |"
    yield "|---|---|---|---|---|---|"
    for name, each in results.items():
        if "done" not in each:
            yield f"| {name} | | | | | FAILED: the process ended with {each['code']} |"
            continue
        early, late = each["resident_mb"]
        yield (
            f"| {name} | {each['done']} in {each['seconds']} s | {each['differ']} | {early}, {late} "
            f"| {each['held'][0]}, {each['held'][1]} | {'ok' if each['ok'] else 'FAILED'} |"
        )


def compatibility(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of compatibility.py."""
    yield "| environment | versions | |"
    yield "|---|---|---|"
    for name, each in results.items():
        outcome = "ok" if each["ok"] else f"FAILED: {each['said']}"
        yield f"| {name} | {', '.join(each.get('versions', ()))} | {outcome} |"


def main() -> int:
    """Print all tables; return the exit code."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "dist/reliability")
    for table in (fuzzed, operators, faults, numbers, load, compatibility):
        name = "fuzz" if table is fuzzed else table.__name__
        path = folder / f"{name}.json"
        print(f"\n## {name}\n")
        if path.exists():
            print(*table(json.loads(path.read_text(encoding="utf-8"))), sep="\n")
        else:
            print(f"not run: python -m reliability.{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
