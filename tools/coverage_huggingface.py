"""Small Hugging Face models from their configurations, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
WIDE = {**TEXT, "intermediate_size": 128}
IMAGE = {"image_size": 64, "patch_size": 16}
CAUSAL = {**WIDE, "num_key_value_heads": 2, "use_cache": False}


def _tokens() -> Tensor:
    return torch.arange(16).view(1, 16) * 7 % 200


def _image() -> Tensor:
    return torch.randn(1, 3, 64, 64)


def _make(
    model: str, config: str, inputs: Callable[[], Tensor], **options: Any
) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        transformers = importlib.import_module("transformers")
        made = getattr(transformers, config)(**options)
        return getattr(transformers, model)(made), (inputs(),)

    return make


MODELS: Mapping[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "bert": _make("BertModel", "BertConfig", _tokens, **WIDE),
    "bert-classifier": _make("BertForSequenceClassification", "BertConfig", _tokens, **WIDE),
    "distilbert": _make(
        "DistilBertModel", "DistilBertConfig", _tokens,
        dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=200,
    ),
    "roberta": _make("RobertaModel", "RobertaConfig", _tokens, **WIDE),
    "vit": _make("ViTModel", "ViTConfig", _image, **WIDE, **IMAGE),
    "vit-classifier": _make("ViTForImageClassification", "ViTConfig", _image, **WIDE, **IMAGE),
    "deit": _make("DeiTModel", "DeiTConfig", _image, **WIDE, **IMAGE),
    "swin": _make(
        "SwinForImageClassification", "SwinConfig", _image,
        image_size=64, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4,
    ),
    "convnext": _make(
        "ConvNextForImageClassification", "ConvNextConfig", _image,
        depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64],
    ),
    "segformer": _make(
        "SegformerForSemanticSegmentation", "SegformerConfig", _image,
        hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1], decoder_hidden_size=64,
    ),
    "clip-vision": _make("CLIPVisionModel", "CLIPVisionConfig", _image, **WIDE, **IMAGE),
    "clip-text": _make("CLIPTextModel", "CLIPTextConfig", _tokens, **WIDE),
    "wav2vec2": _make(
        "Wav2Vec2Model", "Wav2Vec2Config", lambda: torch.randn(1, 4000),
        **WIDE, conv_dim=(32, 32, 32), conv_stride=(5, 4, 2), conv_kernel=(10, 8, 4),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    ),
    "t5-encoder": _make(
        "T5EncoderModel", "T5Config", _tokens,
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=200,
    ),
    "llama-gqa": _make("LlamaForCausalLM", "LlamaConfig", _tokens, **CAUSAL),
    "qwen2-gqa": _make("Qwen2ForCausalLM", "Qwen2Config", _tokens, **CAUSAL),
}  # fmt: skip
