"""Configuration of the model: origin, shape, adapters, and layout on the devices."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from empg_jax.config.algorithm import Section


def as_list(value: Any) -> Any:
    """Convert a single string to a list of one."""
    return [value] if isinstance(value, str) else value


def as_mapping(value: Any) -> Any:
    """Convert null to an empty mapping."""
    return {} if value is None else value


Options = Annotated[dict[str, Any], BeforeValidator(as_mapping)]


# What a folder or a preset brings along.
SIZES = frozenset(("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"))
SIZES |= {"vocab_size", "rope_theta", "norm_eps", "tie_embeddings", "qkv_bias", "qk_norm"}


class LoraConfig(Section):
    """Low-rank adapters: only they are trained, and the model below them stays frozen."""

    rank: int = Field(0, ge=0, description="Rank of the adapters; 0 trains every parameter instead.")
    alpha: float = Field(32.0, gt=0, description="An adapter's product is scaled by alpha / rank.")
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1), BeforeValidator(as_list)] = Field(
        ("*_proj",), description="Patterns of the linear layers to adapt, over names such as q_proj."
    )


class ModelConfig(Section):
    """The policy to train: weights on disk, a preset shape, or the shape given by these keys."""

    path: str | None = Field(None, description="Folder (or hub id) of a Hugging Face model to start from.")
    preset: str | None = Field(None, description="Named model shape to fill with random weights.")
    tokenizer: str | None = Field(
        None,
        description="Folder (or hub id) of a tokenizer, or bytes (built in: a token per byte of a text); by "
        "default the model's, else one built for the environment, or bytes where its vocabulary is open.",
    )
    chat_template: str | None = Field(
        None,
        description="File with a chat template (Jinja) in place of the tokenizer's own, or qwen3_training, "
        "which is packaged and keeps what Qwen3's own takes out of the history.",
    )
    chat_options: Options = Field(
        default_factory=dict,
        description="Variables for the chat template, for example {enable_thinking: false}.",
    )
    chat_date: str | None = Field(
        None,
        description="Date that the chat template prints as today, such as 2026-11-27 (null: where it prints "
        "one, a run writes the day of its start here).",
    )
    hidden_size: int = Field(64, ge=1, description="Width of the residual stream.")
    num_layers: int = Field(2, ge=1, description="Number of decoder blocks.")
    num_heads: int = Field(4, ge=1, description="Attention heads.")
    num_kv_heads: int = Field(4, ge=1, description="Key/value heads; fewer than num_heads is grouped-query.")
    head_dim: int | None = Field(None, ge=2, description="Width of a head (default hidden_size / num_heads).")
    intermediate_size: int = Field(256, ge=1, description="Width of the gated feed-forward layer.")
    vocab_size: int | None = Field(None, ge=2, description="Rows of the embedding (default the tokenizer's).")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary position embedding.")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of the RMS norms.")
    tie_embeddings: bool = Field(True, description="Use the embedding as output head.")
    qkv_bias: bool = Field(True, description="Biases on the query, key and value projections (Qwen2).")
    qk_norm: bool = Field(False, description="RMS norm on queries and keys (Qwen3).")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the computation.")
    param_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the stored weights.")
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type in which gradients are added up over devices, where dtype is narrower; those of "
        "biases always in float32.",
    )
    matmul_precision: Literal["default", "high", "highest"] | None = Field(
        None,
        description="Precision of matrix products on GPUs and TPUs: default is their fastest (TF32 or "
        "bfloat16 for float32 numbers), highest all bits of float32; null: what dtype promises.",
    )
    remat: Literal["full", "dots", "none"] = Field(
        "full",
        description="Rematerialization in the backward pass to save memory: everything except attention's "
        "result (full), everything except the results of matrix products (dots), or nothing (none).",
    )
    scan_layers: bool = Field(
        True, description="Compile one layer and loop over it; false unrolls the layers and compiles slowly."
    )
    attention: Literal["auto", "xla"] = Field(
        "auto",
        description="Attention of packed rows: the kernel of the platform (Triton on a GPU, splash on a TPU) "
        "where rows have 128 tokens or more and a head width of 64, 128 or 256; or plain XLA everywhere.",
    )
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Adapters on frozen weights.")
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="Storage type of the frozen matrices below adapters."
    )

    @field_validator("chat_date", mode="before")
    @classmethod
    def _check_date(cls, value: Any) -> Any:
        if value is None:
            return None
        try:  # YAML reads a date where no quotes stand
            return datetime.date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise ValueError(
                f"model.chat_date={value} is no date: write year, month and day, as 2026-11-27"
            ) from None

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.quantize != "none" and not self.lora.rank:
            raise ValueError(
                f"model.quantize={self.quantize} is for frozen weights; without adapters all are trained: "
                "set model.lora.rank, for example model.lora.rank=16"
            )
        if self.path is not None and self.preset is not None:
            raise ValueError(
                f"model.path={self.path} and model.preset={self.preset} exclude each other: a folder brings "
                "its own shape; set one of them to null"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} must divide model.num_heads={self.num_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must divide model.hidden_size={self.hidden_size}, "
                "or model.head_dim must be set"
            )
        width = self.head_dim or self.hidden_size // self.num_heads
        if width % 2:
            key = "model.head_dim" if self.head_dim else "model.hidden_size / model.num_heads"
            raise ValueError(f"{key}={width} must be even: rotary positions turn pairs of numbers")
        return self


class MeshConfig(Section):
    """Devices of the learner along each axis."""

    data: int = Field(1, ge=1, description="Copies of the model that share the rows.")
    fsdp: int = Field(1, ge=1, description="Shards of weights and optimizer state; shares the rows, too.")
    tensor: int = Field(1, ge=1, description="Shards of heads and hidden layers.")
    sequence: int = Field(1, ge=1, description="Shards of the time axis.")
