"""Runtimes: one module or folder per target. All runtimes implement `base.Runtime`."""
