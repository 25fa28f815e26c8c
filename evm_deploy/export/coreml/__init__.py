"""Target `coreml`, defined in target.py. This file imports nothing, so that settings.py loads fast."""
