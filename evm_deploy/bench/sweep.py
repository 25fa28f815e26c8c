"""Measurement of several bundles with several settings on one host; each measurement is written to a record file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evm_deploy._util.progress import Step
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.remote.hosts import Host
from evm_deploy.bench.text import record_path


@dataclass(frozen=True)
class Sweep:
    """Bundles, and the settings to combine.

    threads: None: chosen by the runtime. batches: None: the bundle's smallest. streams: concurrent inferences.
    settings: all other settings. out: folder for the records.
    """

    bundles: Sequence[str]
    threads: Sequence[int | None]
    batches: Sequence[int | None]
    streams: Sequence[int]
    settings: Settings
    out: Path

    def every(self) -> list[Settings]:
        """Return the settings of every combination of threads, batches and streams."""
        numbers = itertools.product(self.threads, self.batches, self.streams)
        return [replace(self.settings, threads=t, batch=b, streams=s) for t, b, s in numbers]

    def run(self, bench: Host, step: Step) -> Iterator[tuple[Record, Path]]:
        """Measure every bundle with every combination on `bench`; yield each record and its path. Raises EvmError."""
        for bundle, settings in self.pairs():
            yield self.measured(bench, bundle, settings, step)

    def pairs(self) -> Iterator[tuple[str, Settings]]:
        """Return every bundle with every combination of settings."""
        return itertools.product(self.bundles, self.every())

    def measured(self, bench: Host, bundle: str, settings: Settings, step: Step) -> tuple[Record, Path]:
        """Measure one bundle with one combination on `bench`; return its record and the path. Raises EvmError."""
        bench.prepare(bundle, settings)
        with step("measure", f"{Path(bundle).name}, {settings}"):
            record = bench(bundle, settings)
        path = record_path(self.out, record)
        record.write(path)
        return record, path
