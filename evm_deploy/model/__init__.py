"""The network, its checkpoints and its preprocessing: the only package that knows EfficientVMamba."""
