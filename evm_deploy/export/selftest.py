"""The self-test in every bundle: inputs with the float model's outputs, scans with the float64 loop's, one picture.

`selftest/probes.safetensors`   <input> and the outputs expected for it
`selftest/scans.safetensors`    per scan of the model: u, delta, A, B, C, skip, bias, y; `large_delta.*` beside them
`selftest/scan*`                one scan by itself, to run them with, in the target's format
`selftest/picture.png`          a picture of another size, and `picture.pixels`, what preprocessing makes of it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.bundle.bundle import Bundle
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import BundleError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import Artifact, ScanShape, Target, Traced
from evm_deploy.export.verify import Scan, large_delta_probe, run_batched, ssm_error
from evm_deploy.runtimes.base import RunOptions, Runtime
from evm_deploy.scan.reference import selective_scan

FOLDER = "selftest"
PROBE_FILE, SCAN_FILE = "probes.safetensors", "scans.safetensors"
AXES = {"u": "bKLD", "delta": "bKLD", "A": "KDN", "B": "bKLN", "C": "bKLN", "skip": "KD", "bias": "KD"}
STEPS = 17  # of each scan: enough for the recurrence to matter, no multiple of any block
PROBES = 3


@dataclass(frozen=True)
class Check:
    """One line of a self-test: error against limit."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


def probe_inputs(plan: ExportPlan, preprocessing: Preprocessing, count: int = PROBES) -> NDArray[Any]:
    """Seeded synthetic pictures as the artifact reads them: (n, H, W, 3) uint8, or (n, 3, H, W) float32."""
    height, width = preprocessing.size
    pixels = np.stack([picture(height, width, seed) for seed in range(count)])
    return pixels if plan.input == "image" else preprocessing.normalise(pixels)


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Waves, a disc and noise over the whole range of uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack(
        [np.sin(x * rng.uniform(3, 40) + y * rng.uniform(3, 40) + rng.uniform(0, 6)) for _ in range(3)], -1
    )
    disc = ((x - rng.uniform(0.2, 0.8)) ** 2 + (y - rng.uniform(0.2, 0.8)) ** 2 < rng.uniform(0.02, 0.1))[..., None]
    image = 128 + 90 * waves + disc * rng.uniform(-120, 120, 3) + 12 * rng.standard_normal((height, width, 3))
    return np.asarray(image.clip(0, 255), np.uint8)


def write(
    folder: Path,
    target: Target,
    artifact: Artifact,
    traced: Traced,
    plan: ExportPlan,
    preprocessing: Preprocessing,
    probes: NDArray[Any],
    expected: dict[str, NDArray[Any]],
    scans: list[Scan],
) -> None:
    """Write the self-test of an export into `folder`/selftest."""
    from PIL import Image
    from safetensors.numpy import save_file

    here = folder / FOLDER
    here.mkdir()
    shot = picture(preprocessing.size[0] + 37, 2 * preprocessing.size[1] + 11, seed=99)
    Image.fromarray(shot).save(here / "picture.png")
    tensors = {plan.input: probes, **expected, "picture.pixels": preprocessing.pixels(shot)}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, here / PROBE_FILE)
    rng = np.random.default_rng(1)
    cases = {site.name: _head_of(scan) for site, scan in zip(traced.scans, scans, strict=True)}
    if cases:
        cases["large_delta"] = large_delta_probe(next(iter(cases.values())), rng)
    for probe, names in by_probe(target, cases).items():
        target.write_scan_probe(traced, artifact, here / probe, shape_of(cases[names[0]]))
    arrays = {}
    for name, scan in cases.items():
        y = selective_scan(**scan).astype(np.float32)
        arrays.update({f"{name}:{key}": np.ascontiguousarray(value) for key, value in {**scan, "y": y}.items()})
    save_file(arrays, here / SCAN_FILE)


def run(bundle: Bundle, target: Target, runtime: Runtime, options: RunOptions) -> list[Check]:
    """Run the bundle's self-test: preprocessing, outputs in `runtime`, scans as `options` say. Raises BundleError if it
    has none.
    """
    plan, here = bundle.manifest.export_plan(), bundle.path / FOLDER
    tensors, cases = _read(bundle, PROBE_FILE), _read_scans(bundle)
    pixels = bundle.manifest.preprocess().pixels(here / "picture.png")
    off = np.abs(pixels.astype(np.int16) - _like(pixels, bundle, tensors, "picture.pixels")).max()
    tolerance = target.selftest_tolerances.get(bundle.manifest.precision, plan.tolerance)
    checks = [Check("preprocessing (of 255)", float(off), 1.0)]
    images = tensors.get(plan.input, np.empty(0))
    if not images.size or not images.ndim:
        raise _damaged(bundle, f"{PROBE_FILE} has no {plan.input}")
    for name, have in run_batched(runtime, plan, images).items():
        want = _like(have, bundle, tensors, name)
        scale = max(1.0, float(np.abs(want).max()))
        difference = float(np.abs(have - want).max()) if np.isfinite(have).all() else float("inf")
        checks.append(Check(name, difference, tolerance * scale))
    for probe, found in by_probe(target, cases).items():
        with target.open(here / probe, options) as scan_runtime:
            for name in found:
                y = scan_runtime.run(cases[name]).get("y")
                if y is None or y.shape != cases[name]["u"].shape:
                    raise _damaged(bundle, f"{probe} gives no y")
                checks.append(Check(f"scan {name}", *ssm_error(y, cases[name])))
    return checks


def _read(bundle: Bundle, file: str) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, NDArray[Any]] = load_file(bundle.path / FOLDER / file)
        return tensors
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:  # types that numpy lacks, too
        raise _damaged(bundle, f"{file} cannot be read: {error}") from error


def _like(have: NDArray[Any], bundle: Bundle, tensors: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """The tensor `name`, if it is shaped as `have`."""
    want = tensors.get(name)
    if want is None or want.shape != have.shape or want.dtype.kind not in "fiu":
        raise _damaged(bundle, f"{PROBE_FILE} has no {name} of {have.dtype}{list(have.shape)}")
    return want


def _read_scans(bundle: Bundle) -> dict[str, Scan]:
    cases: dict[str, Scan] = {}
    for key, value in sorted(_read(bundle, SCAN_FILE).items()):
        name, _, tensor = key.partition(":")
        if tensor != "y":
            cases.setdefault(name, {})[tensor] = value
    for name, scan in cases.items():
        if not _is_scan(scan):
            raise _damaged(bundle, f"{SCAN_FILE}: the tensors of {name!r} are not those of a scan")
    return cases


def _is_scan(scan: Scan) -> bool:
    """Whether its tensors have the names, ranks and sizes that belong together."""
    if {tensor: value.ndim for tensor, value in scan.items()} != {tensor: len(axes) for tensor, axes in AXES.items()}:
        return False
    sizes = {axis: size for tensor, axes in AXES.items() for axis, size in zip(axes, scan[tensor].shape, strict=True)}
    shapes = {tensor: tuple(sizes[axis] for axis in axes) for tensor, axes in AXES.items()}
    return all(v.shape == shapes[k] and v.size and v.dtype == np.float32 for k, v in scan.items())


def _damaged(bundle: Bundle, reason: str) -> BundleError:
    return BundleError(f"bundle {bundle.path} has no readable self-test: {FOLDER}/{reason}", "export it again")


def by_probe(target: Target, cases: dict[str, Scan]) -> dict[str, list[str]]:
    """File name of a scan by itself -> the cases that it runs."""
    found: dict[str, list[str]] = {}
    for name, scan in cases.items():
        found.setdefault(target.scan_probe.format(**shape_of(scan)._asdict()), []).append(name)
    return found


def shape_of(scan: Scan) -> ScanShape:
    K, L, D = scan["u"].shape[1:]
    return ScanShape(K, L, D, scan["A"].shape[2])


def _head_of(scan: Scan) -> Scan:
    """The first image and steps of a recorded scan."""
    cut = {key: scan[key][:1, :, :STEPS] for key in ("u", "delta", "B", "C")}
    return {**scan, **cut}
