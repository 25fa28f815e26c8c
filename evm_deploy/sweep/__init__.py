"""Sweeps: exports, evaluations and measurements as units of work that any engine runs, and that are done once."""
