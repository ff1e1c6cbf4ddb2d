"""Shapes of well-known models, for runs with random weights and for the memory plan (`model.preset`).

The numbers come from the models' own ``config.json``. A preset defines everything except types and
rematerialization.
"""

from __future__ import annotations

from typing import Any

from empg_jax.errors import nearest
from empg_jax.models.decoder import DecoderConfig, RopeScaling
from empg_jax.models.moe import MoeConfig

_QWEN2 = {"head_dim": 128, "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
_QWEN3 = {"head_dim": 128, "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": False, "qk_norm": True}
_LLAMA3 = {
    "rope_theta": 5e5,
    "norm_eps": 1e-5,
    "qkv_bias": False,
    "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
}


def _shape(
    vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": mlp,
        "tie_embeddings": tied,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _shape(151936, 896, 24, 14, 2, 4864, tied=True) | _QWEN2 | {"head_dim": 64},
    "qwen2.5-1.5b": _shape(151936, 1536, 28, 12, 2, 8960, tied=True) | _QWEN2,
    "qwen2.5-3b": _shape(151936, 2048, 36, 16, 2, 11008, tied=True) | _QWEN2,
    "qwen2.5-7b": _shape(152064, 3584, 28, 28, 4, 18944, tied=False) | _QWEN2,
    "qwen2.5-14b": _shape(152064, 5120, 48, 40, 8, 13824, tied=False) | _QWEN2,
    "qwen2.5-32b": _shape(152064, 5120, 64, 40, 8, 27648, tied=False) | _QWEN2,
    "qwen3-0.6b": _shape(151936, 1024, 28, 16, 8, 3072, tied=True) | _QWEN3,
    "qwen3-1.7b": _shape(151936, 2048, 28, 16, 8, 6144, tied=True) | _QWEN3,
    "qwen3-4b": _shape(151936, 2560, 36, 32, 8, 9728, tied=True) | _QWEN3,
    "qwen3-8b": _shape(151936, 4096, 36, 32, 8, 12288, tied=False) | _QWEN3,
    "qwen3-14b": _shape(151936, 5120, 40, 40, 8, 17408, tied=False) | _QWEN3,
    "qwen3-30b-a3b": _shape(151936, 2048, 48, 32, 4, 6144, tied=False)
    | _QWEN3
    | {"moe": MoeConfig(128, 8, 768)},
    "qwen3-32b": _shape(151936, 5120, 64, 64, 8, 25600, tied=False) | _QWEN3,
    "llama3.2-1b": _shape(128256, 2048, 16, 32, 8, 8192, tied=True) | _LLAMA3 | {"head_dim": 64},
    "llama3.2-3b": _shape(128256, 3072, 28, 24, 8, 8192, tied=True) | _LLAMA3 | {"head_dim": 128},
    "smollm2-135m": _shape(49152, 576, 30, 9, 3, 1536, tied=True)
    | {"head_dim": 64, "rope_theta": 1e5, "norm_eps": 1e-5, "qkv_bias": False},
}


def make_preset(name: str, **changes: Any) -> DecoderConfig:
    """Build the config of a preset.

    Args:
      name: a key of `PRESETS`.
      **changes: fields of `DecoderConfig` that differ from the preset.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in PRESETS:
        hint = nearest(name, PRESETS)
        raise ValueError(f"model.preset={name} is unknown{hint} (there are: {', '.join(PRESETS)})")
    return DecoderConfig(**{**PRESETS[name], **changes})
