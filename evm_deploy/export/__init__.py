"""Checkpoint in, verified bundle out. Nothing in here knows which network it exports."""
