"""What a record must look like, to be trusted by a report: the right keys, types, and finite numbers."""

from __future__ import annotations

from evm_deploy._util.checks import (
    anything,
    count,
    either,
    keys,
    listing,
    mapping,
    nullable,
    number,
    positive,
    size,
    text,
    yes_or_no,
)
from evm_deploy.bundle.manifest import ACCURACY

LAYERS = keys(
    how=text,
    sum_ms=size,
    of_inference=size,
    scan_share=nullable(size),
    kinds=mapping(size),
    modules=listing(keys(module=text, kind=text, ms=size, calls=size)),
)
STATE = keys(
    clocks_mhz=nullable(listing(size)),
    temperatures_c=nullable(mapping(number)),
    throttled=nullable(size),
    load=nullable(size),
)
RECORD = keys(
    bundle=keys(
        **dict.fromkeys(("name", "model", "target", "precision"), text),
        imgsz=listing(count, length=2),
        manifest_sha256=nullable(text),
        artifact_bytes=size,
        accuracy=nullable(ACCURACY),
    ),
    device=keys(
        **dict.fromkeys(("at", "profile", "model", "cpu", "machine", "governor", "system", "python"), nullable(text)),
        **dict.fromkeys(("cores", "usable_cores", "memory_mb"), nullable(size)),
    ),
    runtime=keys(
        versions=mapping(text), scan=keys(value=text, reason=nullable(text)), plan=nullable(mapping(anything))
    ),
    settings=keys(
        threads=nullable(count),
        batch=count,
        streams=nullable(count),
        timed=text,
        **dict.fromkeys(("scan", "device", "cache"), nullable(text)),
        cuda_graph=nullable(yes_or_no),
        limit_s=nullable(size),
    ),
    date=text,
    load_ms=mapping(size),
    first_ms=size,
    warm_up=size,
    stable=yes_or_no,
    samples_ms=listing(size, at_least=1),
    summary_ms=keys(**dict.fromkeys(("p50", "p90", "p95", "p99", "mean", "max"), positive), std=size, min=size),
    interval_ms=listing(positive, length=2),
    device_ms=mapping(size),
    layers=either({}, LAYERS),
    energy_mj=mapping(size),
    throughput=size,
    memory_mb=mapping(size),
    before=STATE,
    after=STATE,
    warnings=listing(text),
)
