"""`evaluate()`: accuracy of a bundle on any number of labelled images, in shards that an engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evm_deploy._util.files import sha256
from evm_deploy._util.kept import KeptResults, kept_results
from evm_deploy._util.progress import Progress
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.manifest import FILE
from evm_deploy.calib.evaluate import Accuracy
from evm_deploy.data.images import no_progress
from evm_deploy.errors import EvmError
from evm_deploy.sweep.engine import Engine, Job, LocalEngine, Place
from evm_deploy.sweep.keys import digest, items_digest
from evm_deploy.sweep.packed import packed, unpacked
from evm_deploy.sweep.shards import Shard, ShardRows, accuracy, evaluated, labelled_for
from evm_deploy.tasks import get_task


@dataclass(frozen=True)
class Evaluated:
    """Accuracy of a bundle.

    skipped: images that could not be read. order: sentence on how classes got their index. taken: number of shards that
    an interrupted evaluation had done.
    """

    accuracy: Accuracy
    skipped: tuple[str, ...]
    order: str
    taken: int


def evaluate(
    bundle: str | Path,
    val: str,
    reference: str | Path | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress = no_progress,
) -> Evaluated:
    """Evaluate a bundle on the labelled images of `val`; the figures are the same for any engine.

    reference: bundle of the float network, for the SQNR and the agreement. engine: runs the shards, by default this
    process. Shards that are done are kept in the cache until the evaluation is complete. Raises EvmError.
    """
    found, other = open_bundle(bundle).path.resolve(), open_bundle(reference).path.resolve() if reference else None
    listed = labelled_for(found, val)
    shards = [Shard(str(found), str(other) if other else None, items) for items in listed.parts()]
    networks = [sha256(each / FILE) for each in (found, other) if each]
    with kept_results(
        {"evaluation": networks, "images": digest([items_digest(shard.items) for shard in shards])}
    ) as kept:
        parts, taken = _every(shards, kept, engine or LocalEngine(), progress)
    task = get_task(open_bundle(found).manifest.task)
    skipped = tuple(text for part in parts for text in part.skipped)
    return Evaluated(accuracy(parts, task, val), skipped, listed.order, taken)


def _every(shards: list[Shard], kept: KeptResults, engine: Engine, progress: Progress) -> tuple[list[ShardRows], int]:
    """Return the rows of every shard, and the number of those that were kept. Raises the error of the first to fail."""
    parts: dict[int, ShardRows] = {}
    total = sum(len(shard.items) for shard in shards)
    for place in range(len(shards)):
        if (rows := kept.get(f"shard {place}")) is not None:
            parts[place] = unpacked(rows)
    taken = len(parts)
    started = {}
    for place, shard in enumerate(shards):
        if place not in parts:
            job = Job(f"shard {place}", partial(do_shard, shard))
            started[job.name] = place
            engine.start(job)
    while len(parts) < len(shards):
        progress(sum(len(shards[place].items) for place in parts), total)
        job, result = engine.next()
        if isinstance(result, EvmError):
            raise result
        kept.put(job.name, packed(result))
        parts[started[job.name]] = result
    return [parts[place] for place in range(len(shards))], taken


def do_shard(shard: Shard, place: Place) -> ShardRows:
    """Evaluate a shard, as a job of an engine."""
    from evm_deploy.sweep.locks import beside_others

    with beside_others():
        return evaluated(shard, place.cores)
