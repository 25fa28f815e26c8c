"""`python -m evm_deploy.demo BUNDLE`: judge a bundle of a demo on held-out images, digits or scenes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from evm_deploy.bundle.loaded import LoadedBundle

SCENES = 100
LEAST = 0.7  # main figure, 0..1, of a detector or segmenter of scenes


def main() -> int:
    """Print the accuracy on held-out images. Returns 0 for a bundle as accurate as it must be, else 4."""
    from evm_deploy.bundle.loaded import load
    from evm_deploy.errors import EvmError
    from evm_deploy.tasks.classification import CLASSIFICATION

    parser = argparse.ArgumentParser("python -m evm_deploy.demo", description="Judge a bundle on held-out images.")
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle of demo:digits, demo:detector or demo:segmenter")
    try:
        with load(parser.parse_args().bundle) as bundle:
            return judge_digits(bundle) if bundle.task is CLASSIFICATION else judge_scenes(bundle)
    except EvmError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code


def judge_digits(bundle: LoadedBundle) -> int:
    """Classify the digits with torch and with the bundle. Returns 0 if over 99.5 % of the classes agree, else 4."""
    import torch

    from evm_deploy.demo import CHECKPOINT, digits, write_images
    from evm_deploy.model.families import load_checkpoint

    images, labels = digits("heldout")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), "heldout")
        paths = sorted(Path(folder).glob("*/*.png"), key=lambda path: path.stem)
        found = np.array([top[0].index for top in bundle.predict(paths, top=1)])
        pixels = np.stack([bundle.preprocessing.pixels(path) for path in paths])
        for path, index in zip(paths[:5], found, strict=False):
            print(f"{path.parent.name}/{path.name}  ->  {bundle.labels[index] if bundle.labels else index}")
    model, _ = load_checkpoint(CHECKPOINT)
    with torch.inference_mode():
        float_found = model(torch.from_numpy(bundle.preprocessing.normalise(pixels))).argmax(1).numpy()
    print(
        f"held-out digits: {len(images)} images   float torch {100 * (float_found == labels).mean():.2f} %   "
        f"bundle {100 * (found == labels).mean():.2f} %   same class {100 * (found == float_found).mean():.2f} %"
    )
    return 0 if (found == float_found).mean() > 0.995 else 4


def judge_scenes(bundle: LoadedBundle) -> int:
    """Compare detections or label maps of scenes with the truth. Returns 0 if the main figure is over LEAST, else 4."""
    from evm_deploy.calib.evaluate import joined
    from evm_deploy.data.reading import read_image
    from evm_deploy.demo.scenes import write_scenes
    from evm_deploy.runtimes.base import run_batched
    from evm_deploy.tasks.segmentation import SEGMENTATION
    from evm_deploy.tasks.task import Reading

    score, classes, rows = bundle.task.score, bundle.manifest.model["num_classes"], []
    if not score:
        raise SystemExit(f"{bundle.bundle.path} gives {bundle.task.gives}: it is the bundle of no demo")
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), SCENES)
        source = Path(folder) if bundle.task is SEGMENTATION else Path(folder, "instances.json")
        for item in score.read(source, bundle.labels, classes)[0]:
            image = read_image(item.source)
            outputs = run_batched(bundle, bundle.manifest.batch, bundle.preprocessing.pixels(image)[None])
            places = [bundle.preprocessing.geometry(*image.size)]
            reading = Reading(bundle.labels, places=places, selection=bundle.manifest.selection, classes=classes)
            rows.append(score.rows(outputs, [item.label], reading))
    figures = score.reduce(joined(rows))
    shown = ", ".join(f"{title} {100 * figures[name]:.2f} %" for name, title in score.titles.items())
    print(f"held-out scenes: {SCENES} images   {shown}")
    return 0 if figures[score.metric] > LEAST else 4


if __name__ == "__main__":
    sys.exit(main())
