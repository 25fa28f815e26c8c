"""Reports as text that other programs take: Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from evm_deploy.report.table import Group, facts, filled, remarks

FORMULA = ("=", "+", "-", "@")  # what a spreadsheet computes


def markdown(groups: Sequence[Group]) -> str:
    """A heading, the verdict, a table and notes for each group."""
    lines = ["# Latency report", ""]
    for group in groups:
        headings, rows = filled(group)
        lines += [f"## {escaped(group.title)}", "", f"**{escaped(group.verdict.sentence)}**", ""]
        lines += [escaped(group.device), ""] if group.device else []
        lines += [
            _row(headings),
            _row(["---", *["---:"] * (len(headings) - 1)]),
            *(_row(map(escaped, row.cells)) for row in rows),
            "",
        ]
        lines += [f"- {escaped(text)}" for text in remarks(group)]
        lines += [""] if remarks(group) else []
    return "\n".join(lines).rstrip() + "\n"


def table_csv(groups: Sequence[Group]) -> str:
    """One row for each candidate, numbers in the units that the heading names."""
    rows = [facts(each, group) for group in groups for each in group.candidates]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def as_dicts(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What `--json` prints: for each group its verdict and its candidates."""
    return [
        {
            "group": group.title,
            "device": group.device,
            "verdict": group.verdict.sentence,
            "ship": group.verdict.ship.name if group.verdict.ship else None,
            "baseline": group.verdict.baseline.name if group.verdict.baseline else None,
            "notes": remarks(group),
            "candidates": [facts(each, group) for each in group.candidates],
        }
        for group in groups
    ]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|!#~]|_(?=\W|$)|(?<=\W)_|^_)", r"\\\1", text)


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
