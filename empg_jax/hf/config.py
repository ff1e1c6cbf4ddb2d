"""Conversion between ``config.json`` of the Hugging Face families and `DecoderConfig`.

Settings that the decoder cannot reproduce are refused by name. A model that loads therefore computes the same
function as in ``transformers``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from empg_jax.files import read_json_object
from empg_jax.hf.hub import find_folder
from empg_jax.models.decoder import DecoderConfig, RopeScaling
from empg_jax.models.moe import MoeConfig

# Defaults of each family's own config class for absent keys.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_MOE_REQUIRED = ("num_experts_per_tok", "moe_intermediate_size")
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window", "num_experts", "num_local_experts")
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_hf_config(folder: pathlib.Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file holds no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json; it holds {sorted(e.name for e in folder.iterdir())}"
        )
    return read_json_object(file)


def read_positions(path: str | pathlib.Path) -> int | None:
    """Return the longest row in tokens that the model of a folder or hub id was made for; None: it says none.

    Raises:
      FileNotFoundError: there is no such folder, or no config.json in it.
      ValueError: the file holds no JSON object.
    """
    raw = read_hf_config(find_folder(path, ["config.json"], "model"))
    positions = raw.get("max_position_embeddings")
    return positions if type(positions) is int and positions > 0 else None


def config_from_hf(raw: Mapping[str, Any], *, max_length: int | None = None) -> DecoderConfig:
    """Build a decoder config from the keys of a config.json.

    Args:
      raw: the keys.
      max_length: the longest row that will be used. Sliding-window attention equals full attention for rows
        up to the window, so such a model is refused if this is longer than the window, or None.

    Raises:
      ValueError: keys are missing, of a wrong type or not supported; all are listed.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _DEFAULTS:
        raise ValueError(
            f"model_type={family!r} is not supported; supported are {', '.join(sorted(_DEFAULTS))}"
        )
    keys = {**_DEFAULTS[family], **raw}
    required = _REQUIRED + (_MOE_REQUIRED if family == "qwen3_moe" else ())
    missing = [name for name in required if keys.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    norm_eps = keys.get("rms_norm_eps", 1e-6)
    wrong = _wrong_sizes({name: keys.get(name) for name in required + _OPTIONAL})
    wrong += _wrong_numbers({"rms_norm_eps": norm_eps})
    theta, scaling, problems = _read_rope(keys)
    is_tied = keys.get("tie_word_embeddings") or False
    if not isinstance(is_tied, bool):
        problems.append(f"tie_word_embeddings={is_tied!r} is neither true nor false")
    problems += wrong or _unsupported(family, keys, max_length)
    if problems:
        raise ValueError(f"this {family} model is not supported: " + "; ".join(problems))
    heads = keys["num_attention_heads"]
    return DecoderConfig(
        vocab_size=keys["vocab_size"],
        hidden_size=keys["hidden_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=keys.get("num_key_value_heads") or heads,
        head_dim=keys.get("head_dim") or keys["hidden_size"] // heads,
        intermediate_size=keys["intermediate_size"],
        rope_theta=float(theta),
        rope_scaling=scaling,
        norm_eps=float(norm_eps),
        tie_embeddings=is_tied,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        moe=_read_moe(keys) if family == "qwen3_moe" else None,
    )


def _read_moe(keys: Mapping[str, Any]) -> MoeConfig:
    return MoeConfig(
        num_experts=keys.get("num_experts") or keys.get("num_local_experts") or 128,
        top_k=keys["num_experts_per_tok"],
        expert_size=keys["moe_intermediate_size"],
        is_normalized=bool(keys["norm_topk_prob"]),
    )


def config_to_hf(config: DecoderConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the keys of a config.json for a decoder config.

    Args:
      config: the decoder's config.
      base: the config.json that the model was loaded from; keys that the decoder does not know are kept.

    Raises:
      ValueError: no family has this combination of biases and norms.
    """
    base = dict(base or {})
    family = _family_of(config, base.get("model_type"))
    # Old and new versions of transformers both understand the two separate keys written below.
    base.pop("rope_parameters", None)
    rope = config.rope_scaling
    scaling = rope and {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
    own: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": jnp.dtype(config.param_dtype).name,
    }
    if config.moe is not None:
        base.pop("num_local_experts", None)  # a newer spelling of num_experts
        own |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "moe_intermediate_size": config.moe.expert_size,
            "norm_topk_prob": config.moe.is_normalized,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    fixed: dict[str, Any] = {} if family in ("qwen2", "mistral") else {"attention_bias": False}
    fixed |= {"mlp_bias": False} if family == "llama" else {"sliding_window": None}
    base.pop("dtype", None)  # the newer spelling of torch_dtype
    return {"max_position_embeddings": 32768, **fixed, **base, **own}


def _family_of(config: DecoderConfig, base_family: str | None) -> str:
    if config.qkv_bias and config.qk_norm:
        raise ValueError("no Hugging Face family has both qkv_bias and qk_norm: the model cannot be exported")
    if config.moe is not None and not config.qk_norm:
        raise ValueError("the only family with experts is qwen3_moe: without qk_norm it cannot be exported")
    if config.qkv_bias:
        family = "qwen2"
        if config.head_dim * config.num_heads != config.hidden_size:
            raise ValueError(
                f"Qwen2 needs head_dim x num_heads = hidden_size, not {config.head_dim} x {config.num_heads} "
                f"and {config.hidden_size}: the model cannot be exported (use qkv_bias=False)"
            )
    elif config.qk_norm:
        family = "qwen3" if config.moe is None else "qwen3_moe"
    else:
        family = "mistral" if base_family == "mistral" else "llama"
    if base_family not in (None, family):
        raise ValueError(f"the config describes a {family} model, its base config.json a {base_family} model")
    return family


def _read_rope(keys: Mapping[str, Any]) -> tuple[float, RopeScaling | None, list[str]]:
    """Return the rotary theta, the scaling and a list of problems.

    Newer files have ``rope_parameters``; older files have ``rope_theta`` and ``rope_scaling``, which
    transformers prefers where a file has both.
    """
    old, new = keys.get("rope_scaling"), keys.get("rope_parameters")
    if old and new and old != new:
        return 0.0, None, [f"rope_scaling={old!r} beside rope_parameters={new!r} (one of them is)"]
    name = "rope_parameters" if keys.get("rope_parameters") else "rope_scaling"
    rope = keys.get(name) or {}
    if not isinstance(rope, Mapping):
        return 0.0, None, [f"{name}={rope!r} (an object is)"]
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        return 0.0, None, [f"{name} by the kind of layer ({', '.join(nested)})"]
    theta = rope.get("rope_theta", keys.get("rope_theta", 10000.0))
    if wrong := _wrong_numbers({"rope_theta": theta}):
        return 0.0, None, wrong
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None and "factor" in rope:
        return theta, None, [f"{name} with a factor and no rope_type"]
    if kind in (None, "default"):
        return theta, None, []
    if kind != "llama3":
        return theta, None, [f"rope_type {kind!r} (only default and llama3 are)"]
    missing = [name for name in _LLAMA3_KEYS if name not in rope]
    if missing:
        return theta, None, [f"rope scaling lacks {', '.join(missing)}"]
    if wrong := _wrong_numbers({key: rope[key] for key in _LLAMA3_KEYS}):
        return theta, None, wrong
    factor, low, high, original = (rope[name] for name in _LLAMA3_KEYS)
    return theta, RopeScaling(float(factor), float(low), float(high), int(original)), []


def _wrong_sizes(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}={value!r} (a whole number above 0 is)"
        for name, value in values.items()
        if value is not None and (type(value) is not int or value < 1)
    ]


def _wrong_numbers(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={v!r} (a number is)" for name, v in values.items() if type(v) not in (int, float)]


def _unsupported(family: str, keys: Mapping[str, Any], max_length: int | None) -> list[str]:
    problems = []
    if keys.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act={keys['hidden_act']!r} (only silu is)")
    problems += [f"{name}=true" for name in ("attention_bias", "mlp_bias") if keys.get(name)]
    if keys.get("mlp_only_layers") or keys.get("decoder_sparse_step", 1) != 1:
        problems.append("layers without experts among layers with them")
    if keys.get("quantization_config"):
        problems.append("quantization_config (load the unquantized weights)")
    if keys.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={keys['partial_rotary_factor']}")
    window = keys.get("sliding_window") if keys.get("use_sliding_window", family == "mistral") else None
    if window is not None and (max_length is None or max_length > window):
        problems.append(f"sliding_window={window}, unless max_length is given and at most that")
    return problems
