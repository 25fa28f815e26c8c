"""Targets `trt` and `trt-rtx`: target.py. Nothing is imported here, so that settings.py is light."""
