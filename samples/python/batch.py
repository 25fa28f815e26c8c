"""Classify a folder of images and write a CSV table:  python batch.py BUNDLE FOLDER > classes.csv

Threads read and scale the next images while the bundle classifies the current ones. A bundle exported with `--batch
dynamic` or `--batch 1:4:8` runs several images in one inference. An image that cannot be read is reported on stderr and
left out; the exit code is then 1.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from evm_deploy import EvmError, load
from evm_deploy.data.sources import find_images
from evm_deploy.errors import ImageError

AT_ONCE = 64


def main(bundle: str, folder: str) -> int:
    """Classify all images below `folder` and return the exit code."""
    paths = [item.source for item in find_images(Path(folder)) if isinstance(item.source, Path)]
    table = csv.writer(sys.stdout)
    table.writerow(["file", "label", "score"])
    unreadable = 0
    with load(bundle) as model, ThreadPoolExecutor() as pool:

        def read(path: Path) -> tuple[Path, np.ndarray | ImageError]:
            try:
                return path, model.preprocessing.pixels(path)
            except ImageError as error:
                return path, error

        for images in read_ahead(pool, read, paths):
            good = {path: pixels for path, pixels in images.items() if not isinstance(pixels, ImageError)}
            for path in images.keys() - good.keys():
                print(f"left out: {images[path]}", file=sys.stderr)
            unreadable += len(images) - len(good)
            if good:
                found = model.classify(np.stack(list(good.values())), top=1)
                table.writerows(
                    [path, best.label, f"{best.score:.4f}"] for path, (best,) in zip(good, found, strict=True)
                )
    return 1 if unreadable else 0


def read_ahead(pool: ThreadPoolExecutor, read: Callable[[Path], Any], paths: list[Path]) -> Iterator[dict[Path, Any]]:
    """Yield the results of `read` for AT_ONCE paths at a time, as {path: result}; the pool already reads the next."""
    ahead: Iterator[Any] = iter(())
    for start in range(0, len(paths), AT_ONCE):
        now, ahead = ahead, pool.map(read, paths[start : start + AT_ONCE])
        yield dict(now)
    yield dict(ahead)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:3]))
    except EvmError as error:
        sys.exit(f"error: {error}")
