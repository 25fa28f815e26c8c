"""INT8: images to calibrate and judge with, activation ranges, quantisation, and which blocks to keep in float."""
