"""A compiler for trained PyTorch models: physically smaller networks, faster in ONNX Runtime."""

from __future__ import annotations
