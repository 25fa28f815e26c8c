"""`python -m evm_deploy.demo BUNDLE`: classify the held-out digits with torch and with the bundle, and compare."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np


def main() -> int:
    """Print the predictions and the accuracies. Returns 0 if over 99.5 % of the predicted classes agree, else 4."""
    import torch

    from evm_deploy.bundle.loaded import load
    from evm_deploy.demo import CHECKPOINT, digits, write_images
    from evm_deploy.model.families import load_checkpoint

    images, labels = digits("heldout")
    with load(sys.argv[1]) as bundle, tempfile.TemporaryDirectory() as folder:
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


if __name__ == "__main__":
    sys.exit(main())
