"""Every bundle with every setting, in one place: a record file for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evm_deploy.bench.places import Bench
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.text import file_name
from evm_deploy.progress import Step


@dataclass(frozen=True)
class Sweep:
    """threads, batches: None as the runtime and the bundle choose. settings: the others. out: folder for records."""

    bundles: Sequence[str]
    threads: Sequence[int | None]
    batches: Sequence[int | None]
    settings: Settings
    out: Path

    def run(self, bench: Bench, step: Step) -> Iterator[tuple[Record, Path]]:
        """Measure; yields each record and where it was written. Raises EvmErrors."""
        for bundle in self.bundles:
            for threads in self.threads:
                for batch in self.batches:
                    what = f"{Path(bundle).name}, threads {threads or 'auto'}, batch {batch or 'auto'}"
                    settings = replace(self.settings, threads=threads, batch=batch)
                    bench.prepare(bundle, settings)
                    with step("measure", what):
                        record = bench(bundle, settings)
                    path = self.out / file_name(record)
                    record.write(path)
                    yield record, path
