"""Writer of a bundle's self-test. `bundle.selftest` describes its files and runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.bundle.selftest import FOLDER, IMAGE_FILE, INPUT_FILE, SCAN_FILE, by_scan_case, shape_of
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.reading import MODES
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import Artifact, Target, Traced
from evm_deploy.export.verify import FloatRun
from evm_deploy.scan.reference import Scan, large_delta_case, selective_scan, ssm_error, with_softplus

TEST_INPUTS = 3
MAX_LIMIT = 1e15  # largest number of a manifest


def make_test_inputs(plan: ExportPlan, preprocessing: Preprocessing, count: int = TEST_INPUTS) -> NDArray[Any]:
    """Return seeded synthetic images as the artifact reads them: (n, H, W, C) uint8, or (n, C, H, W) float32."""
    height, width = preprocessing.size
    pixels = np.stack([synthetic_image(height, width, seed, preprocessing.channels) for seed in range(count)])
    return pixels if plan.input == "image" else preprocessing.normalise(pixels)


def synthetic_image(height: int, width: int, seed: int, channels: int = 3) -> NDArray[np.uint8]:
    """Return a seeded image (height, width, channels) of waves, a disc and noise, over the whole range of uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack(
        [np.sin(x * rng.uniform(3, 40) + y * rng.uniform(3, 40) + rng.uniform(0, 6)) for _ in range(channels)], -1
    )
    disc = ((x - rng.uniform(0.2, 0.8)) ** 2 + (y - rng.uniform(0.2, 0.8)) ** 2 < rng.uniform(0.02, 0.1))[..., None]
    contrast = rng.uniform(-120, 120, channels)
    noise = 12 * rng.standard_normal((height, width, channels))
    image = 128 + 90 * waves + disc * contrast + noise
    return np.asarray(image.clip(0, 255), np.uint8)


def write(
    folder: Path,
    target: Target,
    artifact: Artifact,
    traced: Traced,
    plan: ExportPlan,
    preprocessing: Preprocessing,
    reference: FloatRun,
) -> dict[str, Any]:
    """Write the self-test of an export into `folder`/selftest. Returns its limits, for the manifest.

    The limit of an output is the precision's tolerance times the output's largest value, or times 1 if that is larger.
    The limit of a scan's SSM part comes from `scan.reference.ssm_error`. Every scan case has softplus: a scan without
    softplus is tested at the same dt.
    """
    from PIL import Image
    from safetensors.numpy import save_file

    here = folder / FOLDER
    here.mkdir()
    expected, scans = reference.outputs, reference.scans
    tensors = {plan.input: reference.test_inputs, **expected}
    if preprocessing.channels in MODES:
        colours = max(3, preprocessing.channels)  # a grey network's app reads colours too
        shot = synthetic_image(preprocessing.size[0] + 37, 2 * preprocessing.size[1] + 11, 99, colours)
        Image.fromarray(shot).save(here / IMAGE_FILE)
        tensors["picture.pixels"] = preprocessing.pixels(shot)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, here / INPUT_FILE)
    rng = np.random.default_rng(1)
    cases = {site.name: with_softplus(_head_of(scan)) for site, scan in zip(traced.scans, scans, strict=True)}
    if cases:
        cases["large_delta"] = large_delta_case(next(iter(cases.values())), rng)
    for probe, names in by_scan_case(target.runtime.scan_case, cases).items():
        target.write_scan_case(traced, artifact, here / probe, shape_of(cases[names[0]]))
    tolerance = target.selftest_tolerances.get(str(plan.precision), plan.tolerance)
    outputs = {name: tolerance * max(1.0, float(np.abs(value).max())) for name, value in expected.items()}
    limits: dict[str, Any] = {"preprocessing": 1.0, "outputs": outputs, "scans": {}}
    if plan.selection or reference.judge:
        limits["apart"] = 1 - plan.agreement
    arrays = {}
    for name, scan in cases.items():
        y = selective_scan(**scan).astype(np.float32)
        limit = max(target.scan_tolerance, ssm_error(y, scan)[1])
        limits["scans"][name] = min(limit, MAX_LIMIT)  # endless for an SSM part of zeros
        arrays.update({f"{name}:{key}": np.ascontiguousarray(value) for key, value in {**scan, "y": y}.items()})
    save_file(arrays, here / SCAN_FILE)
    return limits


def _head_of(scan: Scan) -> Scan:
    """Return the first image and the first STEPS steps of a recorded scan."""
    cut = {key: scan[key][:1, :, :STEPS] for key in ("u", "delta", "B", "C")}
    return {**scan, **cut}


STEPS = 17  # kept of each scan: enough for the recurrence to matter, and no multiple of a block of steps
