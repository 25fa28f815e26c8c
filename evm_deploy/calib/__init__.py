"""INT8 quantisation: calibration and evaluation images, activation ranges, choice of blocks to keep in float."""
