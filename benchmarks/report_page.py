"""Make a screenshot of evm-report's page, for docs/report.md.

python benchmarks/report_page.py report.html docs/report.png      needs chromium
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, SHOWN = 1200, 1800, 1540  # pixels; the part below `SHOWN` is cut off
COLOURS = 128


def main() -> None:
    """Write the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    browser = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={WIDTH},{HEIGHT}",
        ]
        flags += ["--blink-settings=preferredColorScheme=1", f"--screenshot={shot}"]
        subprocess.run([browser, *flags, args.page.resolve().as_uri()], check=True, capture_output=True)
        with Image.open(shot) as image:
            image.convert("RGB").crop((0, 0, WIDTH, SHOWN)).quantize(COLOURS).save(args.image, optimize=True)


if __name__ == "__main__":
    main()
