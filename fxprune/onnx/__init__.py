"""Programs as ONNX."""
