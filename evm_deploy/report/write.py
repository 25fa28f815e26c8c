"""Reports as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from evm_deploy.report.table import Group, facts, filled, remarks

FORMULA = ("=", "+", "-", "@")  # first characters of a cell that a spreadsheet would compute


def markdown(groups: Sequence[Group]) -> str:
    """Return a Markdown report with a heading, the verdict, a table and notes for each group."""
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
    """Return a CSV table with one row for each candidate; each heading names the unit of its column."""
    rows = [facts(each, group) for group in groups for each in group.candidates]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def as_dicts(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return plain data of each group, its verdict and its candidates, as `--json` prints it."""
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
    """Escape `text` so that Markdown shows it unchanged."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|!#~]|_(?=\W|$)|(?<=\W)_|^_)", r"\\\1", text)


def _row(cells: Any) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _no_formula(value: Any) -> Any:
    """Put an apostrophe in front of text that a spreadsheet would compute."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
