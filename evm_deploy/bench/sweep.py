"""Every bundle with every setting, in one place: a record file for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evm_deploy._util.progress import Step
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.remote.hosts import Host
from evm_deploy.bench.text import file_name


@dataclass(frozen=True)
class Sweep:
    """threads, batches: None as the runtime and the bundle choose. streams: inferences at the same time. settings: the
    others. out: folder for records.
    """

    bundles: Sequence[str]
    threads: Sequence[int | None]
    batches: Sequence[int | None]
    streams: Sequence[int]
    settings: Settings
    out: Path

    def every(self) -> list[Settings]:
        """Every combination."""
        numbers = itertools.product(self.threads, self.batches, self.streams)
        return [replace(self.settings, threads=t, batch=b, streams=s) for t, b, s in numbers]

    def run(self, bench: Host, step: Step) -> Iterator[tuple[Record, Path]]:
        """Measure; yields each record and where it was written. Raises EvmErrors."""
        for bundle, settings in itertools.product(self.bundles, self.every()):
            bench.prepare(bundle, settings)
            with step("measure", f"{Path(bundle).name}, {settings}"):
                record = bench(bundle, settings)
            path = self.out / file_name(record)
            record.write(path)
            yield record, path
