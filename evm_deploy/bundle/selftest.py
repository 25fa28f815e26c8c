"""Self-test of a bundle: compare outputs with the float model, scans with a float64 loop, and the preprocessing.

`selftest/probes.safetensors`   inputs, expected outputs, and `picture.pixels`: expected pixels of picture.png
`selftest/scans.safetensors`    per scan of the model: u, delta, A, B, C, skip, bias, y; also a case `large_delta`
`selftest/scan*`                model with a single scan, in the target's format, that runs these cases
`selftest/picture.png`          image of another size than the input, to test the preprocessing; none for a network of
                                tensors that are no images (2 channels, or more than 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evm_deploy.bundle.bundle import Bundle
from evm_deploy.data.reading import MODES
from evm_deploy.errors import BundleError
from evm_deploy.runtimes.base import RunOptions, Runtime, run_batched
from evm_deploy.runtimes.info import RuntimeInfo
from evm_deploy.scan.reference import Scan, ssm_error
from evm_deploy.tasks import get_task
from evm_deploy.tasks.task import Outputs

FOLDER = "selftest"
INPUT_FILE, SCAN_FILE, IMAGE_FILE = "probes.safetensors", "scans.safetensors", "picture.png"


class ScanShape(NamedTuple):
    """Sizes of a scan: K directions, L steps, D channels, N states."""

    K: int
    L: int
    D: int
    N: int


AXES = {"u": "bKLD", "delta": "bKLD", "A": "KDN", "B": "bKLN", "C": "bKLN", "skip": "KD", "bias": "KD"}


@dataclass(frozen=True)
class Check:
    """Result of one check of a self-test: error and limit."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """True if the error is within the limit."""
        return self.error <= self.limit


def run(bundle: Bundle, target: RuntimeInfo, runtime: Runtime, options: RunOptions) -> list[Check]:
    """Run the self-test of a bundle: preprocessing, outputs of `runtime`, and scans opened with `options`.

    The limits come from the manifest (`selftest`). Raises BundleError if the bundle has no readable self-test.
    """
    manifest, here = bundle.manifest, bundle.path / FOLDER
    tensors, cases = _read(bundle, INPUT_FILE), _read_scans(bundle)
    checks, preprocessing = [], manifest.preprocess()
    if preprocessing.channels in MODES:
        pixels = preprocessing.pixels(here / IMAGE_FILE)
        off = np.abs(pixels.astype(np.int16) - _like(pixels, bundle, tensors, "picture.pixels")).max()
        checks.append(Check("preprocessing (of 255)", float(off), manifest.limit("preprocessing")))
    images = tensors.get(manifest.input, np.empty(0))
    if not images.size or not images.ndim:
        raise _damaged(bundle, INPUT_FILE, f"has no tensor {manifest.input}")
    actual: Outputs = run_batched(runtime, manifest.batch, images)
    expected: Outputs = {name: _like(have, bundle, tensors, name) for name, have in actual.items()}
    align = get_task(manifest.task).align
    if align:
        least = min(manifest.limit("outputs", name) for name in actual)
        expected, actual, share = align(expected, actual, least)
        checks.append(Check("not in common", 1 - share, manifest.limit("apart", otherwise=0.0)))
    for name, have in actual.items():
        error = np.abs(have - expected[name]).max(initial=0.0)
        difference = float(error) if np.isfinite(have).all() else float("inf")
        checks.append(Check(name, difference, manifest.limit("outputs", name)))
    for probe, found in by_scan_case(target.scan_case, cases).items():
        with target.open(here / probe, options) as scan_runtime:
            for name in found:
                y = scan_runtime.run(cases[name]).get("y")
                if y is None or y.shape != cases[name]["u"].shape:
                    raise _damaged(bundle, probe, "gives no output y of the shape of u")
                error, limit = ssm_error(y, cases[name])
                checks.append(Check(f"scan {name}", error, manifest.limit("scans", name, limit)))
    return checks


def _read(bundle: Bundle, file: str) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, NDArray[Any]] = load_file(bundle.path / FOLDER / file)
        return tensors
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:  # also dtypes that numpy lacks
        raise _damaged(bundle, file, f"cannot be read: {error}") from error


def _like(have: NDArray[Any], bundle: Bundle, tensors: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """Return the expected tensor `name`. Raises BundleError unless its shape is that of `have`."""
    want = tensors.get(name)
    if want is None or want.shape != have.shape or want.dtype.kind not in "fiu":
        raise _damaged(bundle, INPUT_FILE, f"has no {name} of {have.dtype}{list(have.shape)}")
    return want


def _read_scans(bundle: Bundle) -> dict[str, Scan]:
    cases: dict[str, Scan] = {}
    for key, value in sorted(_read(bundle, SCAN_FILE).items()):
        name, _, tensor = key.partition(":")
        if tensor != "y":
            cases.setdefault(name, {})[tensor] = value
    for name, scan in cases.items():
        if not _is_scan(scan):
            raise _damaged(bundle, SCAN_FILE, f"has no valid scan {name!r}")
    return cases


def _is_scan(scan: Scan) -> bool:
    """Test whether the tensors of a scan are complete float32 arrays with consistent ranks and sizes."""
    if {tensor: value.ndim for tensor, value in scan.items()} != {tensor: len(axes) for tensor, axes in AXES.items()}:
        return False
    sizes = {axis: size for tensor, axes in AXES.items() for axis, size in zip(axes, scan[tensor].shape, strict=True)}
    shapes = {tensor: tuple(sizes[axis] for axis in axes) for tensor, axes in AXES.items()}
    return all(v.shape == shapes[k] and v.size and v.dtype == np.float32 for k, v in scan.items())


def _damaged(bundle: Bundle, file: str, reason: str) -> BundleError:
    where = f"{FOLDER}/{file}"
    message = f"bundle {bundle.path} has no readable self-test: {where} {reason}"
    return BundleError(message, "export it again", code="selftest.damaged", where=where)


def by_scan_case(file: str, cases: dict[str, Scan]) -> dict[str, list[str]]:
    """Group the scan cases by the file that runs them: file name, from the pattern `file`, -> names of the cases."""
    found: dict[str, list[str]] = {}
    for name, scan in cases.items():
        found.setdefault(file.format(**shape_of(scan)._asdict()), []).append(name)
    return found


def shape_of(scan: Scan) -> ScanShape:
    """Return the sizes K, L, D, N of a scan."""
    K, L, D = scan["u"].shape[1:]
    return ScanShape(K, L, D, scan["A"].shape[2])
