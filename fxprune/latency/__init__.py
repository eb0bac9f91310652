"""Latency in ONNX Runtime: measure it, predict it and plan for it."""
