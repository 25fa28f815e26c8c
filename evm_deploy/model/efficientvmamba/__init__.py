"""EfficientVMamba: the network and its checkpoints."""
