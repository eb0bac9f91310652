"""ONNX export, and measurements in ONNX Runtime."""
