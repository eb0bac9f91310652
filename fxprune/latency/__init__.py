"""Latency in ONNX Runtime: measured, predicted, planned for."""
