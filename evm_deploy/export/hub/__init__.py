"""The hub ONNX graph and its passes."""
