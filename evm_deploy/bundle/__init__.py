"""Bundles on disk and in use: manifest, zip, signature, self-test, `load`. Needs neither torch nor `export`."""
