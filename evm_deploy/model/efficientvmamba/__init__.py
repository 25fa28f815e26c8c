"""EfficientVMamba: the network and the loading of its checkpoints."""
