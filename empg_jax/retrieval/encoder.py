"""BERT-style sentence encoders (MiniLM, E5, BGE): they map a text to a vector of length 1.

The encoder is BERT (Devlin et al., arXiv 1810.04805) with the pooling of Sentence-BERT (Reimers and Gurevych,
arXiv 1908.10084). Weights are read from a local folder in Hugging Face's layout.

Shapes: B texts, T tokens, D width, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from empg_jax.config.places import expand
from empg_jax.errors import UserError
from empg_jax.hf.safetensors import SafetensorsFile

Params = dict[str, Any]
POOLING = "1_Pooling/config.json"
MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers; each vector is scaled anyway
LENGTHS = (16, 32, 64, 128, 256, 512)  # texts are padded to one of these: few programs are compiled


class EncoderError(UserError, ValueError):
    """A folder without a usable encoder. The message gives the reason."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder.

    Attributes:
      num_layers: number of transformer layers.
      num_heads: number of attention heads.
      max_positions: length of the longest text in tokens.
      norm_eps: epsilon of the layer norms.
      pooling: ``mean`` over tokens, or ``cls`` (the first token).
    """

    num_layers: int
    num_heads: int
    max_positions: int
    norm_eps: float
    pooling: str = "mean"


def read_config(folder: Path) -> EncoderConfig:
    """Read ``config.json`` and, if it exists, ``1_Pooling/config.json``.

    Raises:
      EncoderError: the config is missing, or it or ``modules.json`` describes another architecture.
    """
    _check_modules(folder / "modules.json")
    raw = _read_json(folder / "config.json")
    usual = {"hidden_act": "gelu", "position_embedding_type": "absolute"}  # defaults of absent keys
    for key, value in {"model_type": "bert", **usual}.items():
        given = raw.get(key, usual.get(key))
        if given != value:
            raise EncoderError(f"{folder}/config.json: {key} is {given!r}; only {value!r} is implemented")
    try:
        return EncoderConfig(
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            max_positions=raw["max_position_embeddings"],
            norm_eps=raw.get("layer_norm_eps", 1e-12),
            pooling=_read_pooling(folder / POOLING),
        )
    except KeyError as error:
        raise EncoderError(f"{folder}/config.json has no {error}") from error


def _check_modules(path: Path) -> None:
    """Refuse a folder of sentence-transformers with further steps, such as LaBSE's dense layer."""
    if not path.is_file():
        return
    modules = _read_json(path, list)
    for module in modules:
        kind = str(module.get("type")) if isinstance(module, dict) else repr(module)
        if kind.rpartition(".")[2] not in MODULES:
            raise EncoderError(f"{path}: a module {kind}; only {', '.join(MODULES)} are implemented")


def _read_pooling(path: Path) -> str:
    if not path.is_file():
        return "mean"
    raw = _read_json(path)
    modes = sorted(key for key, value in raw.items() if key.startswith("pooling_mode_") and value is True)
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise EncoderError(f"{path}: pooling {modes}; expected one of {list(known)}")
    return known[modes[0]]


def load_params(folder: Path, config: EncoderConfig) -> Params:
    """Read ``model.safetensors``.

    Raises:
      EncoderError: the file or a tensor is missing.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise EncoderError(f"{folder} has no model.safetensors")
    file = SafetensorsFile(path)
    names = file.names()
    prefix = "bert." if any(name.startswith("bert.") for name in names) else ""

    def read(name: str) -> jax.Array:
        if prefix + name not in names:
            raise EncoderError(f"{path} has no tensor {prefix + name}: not a BERT encoder of {config}")
        return jnp.asarray(np.asarray(file.array(prefix + name), np.float32))

    def read_affine(name: str) -> Params:
        return {"weight": read(f"{name}.weight"), "bias": read(f"{name}.bias")}

    parts = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attended": "attention.output.dense",
        "attended_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }
    return {
        "words": read("embeddings.word_embeddings.weight"),
        "positions": read("embeddings.position_embeddings.weight"),
        "types": read("embeddings.token_type_embeddings.weight"),
        "norm": read_affine("embeddings.LayerNorm"),
        "layers": [
            {part: read_affine(f"encoder.layer.{number}.{name}") for part, name in parts.items()}
            for number in range(config.num_layers)
        ],
    }


def compute_states(params: Params, tokens: jax.Array, mask: jax.Array, config: EncoderConfig) -> jax.Array:
    """Compute the last hidden states.

    Args:
      params: parameters from `load_params`.
      tokens: int32[B T].
      mask: bool[B T], False at padding; no token attends to padding.
      config: the encoder's shape.

    Returns:
      float32[B T D].
    """
    length = tokens.shape[1]
    x = params["words"][tokens] + (params["positions"][:length] + params["types"][:1])[None]
    x = _norm(x, params["norm"], config.norm_eps)
    for layer in params["layers"]:
        attended = _affine(_attend(x, layer, mask, config.num_heads), layer["attended"])
        x = _norm(x + attended, layer["attended_norm"], config.norm_eps)
        inner = jax.nn.gelu(_affine(x, layer["up"]), approximate=False)
        x = _norm(x + _affine(inner, layer["down"]), layer["norm"], config.norm_eps)
    return x


@functools.partial(jax.jit, static_argnames="config")
def compute_embeddings(
    params: Params, tokens: jax.Array, mask: jax.Array, *, config: EncoderConfig
) -> jax.Array:
    """Compute sentence vectors: the pooled last hidden states, scaled to length 1.

    Args:
      params: parameters from `load_params`.
      tokens: int32[B T].
      mask: bool[B T], False at padding.
      config: the encoder's shape.

    Returns:
      float32[B D].
    """
    states = compute_states(params, tokens, mask, config)
    if config.pooling == "cls":
        pooled = states[:, 0]
    else:
        weights = mask.astype(states.dtype)
        total = jnp.maximum(weights.sum(axis=1), 1.0)
        pooled = jnp.einsum("btd,bt->bd", states, weights) / total[:, None]
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


class TextEncoder:
    """An encoder of texts to vectors, in batches of a few fixed shapes."""

    def __init__(self, folder: str | Path, *, batch_size: int = 32, max_tokens: int = 256) -> None:
        """Load weights and tokenizer.

        Args:
          folder: folder with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
          batch_size: number of texts in a batch.
          max_tokens: texts are cut to this length, or to the encoder's own limit if that is smaller.

        Raises:
          EncoderError: the folder contains no usable encoder.
        """
        folder = expand(folder)
        if not folder.is_dir():
            raise EncoderError(f"no folder {folder}; expected one with an encoder in it")
        if not (folder / "tokenizer.json").is_file():
            raise EncoderError(f"{folder} has no tokenizer.json")
        self.config = read_config(folder)
        self._params = load_params(folder, self.config)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()  # `_pad` pads, to a few fixed lengths
        self._max_tokens = min(max_tokens, self.config.max_positions)
        self._tokenizer.enable_truncation(self._max_tokens)
        self._folder, self._batch_size = folder, batch_size

    @property
    def width(self) -> int:
        """Length of a vector."""
        return int(self._params["words"].shape[1])

    @functools.cached_property
    def identity(self) -> str:
        """Hash of what decides the vectors: the encoder's files, and the length that texts are cut to.

        The vectors themselves are no identity: their last digits differ between machines.
        """
        digest = hashlib.sha256(f"{self._max_tokens}".encode())
        for name in ("config.json", POOLING, "tokenizer.json", "model.safetensors"):
            if (self._folder / name).is_file():
                with open(self._folder / name, "rb") as file:
                    digest.update(f"\0{name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Encode texts to vectors float32[len(texts) D]."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        vectors = np.zeros((len(ids), self.width), np.float32)
        # Texts of similar length share a batch, so that little of it is padding.
        by_length = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        for start in range(0, len(ids), self._batch_size):
            chosen = by_length[start : start + self._batch_size]
            tokens, mask = self._pad([ids[number] for number in chosen])
            found = compute_embeddings(self._params, tokens, mask, config=self.config)
            vectors[chosen] = np.asarray(found)[: len(chosen)]
        return vectors

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        longest = max(map(len, rows))
        width = min(next((n for n in LENGTHS if n >= longest), longest), self.config.max_positions)
        # Single queries are frequent, so that a compiled program for one row pays off.
        height = 1 if len(rows) == 1 else self._batch_size
        tokens = np.zeros((height, width), np.int32)
        mask = np.zeros((height, width), bool)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
            mask[number, : len(row)] = True
        return tokens, mask


def _affine(x: jax.Array, layer: Params) -> jax.Array:
    return jnp.einsum("bti,oi->bto", x, layer["weight"]) + layer["bias"][None, None]


def _norm(x: jax.Array, layer: Params, eps: float) -> jax.Array:
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    scaled = (x - mean) * jax.lax.rsqrt(variance + eps)
    return scaled * layer["weight"][None, None] + layer["bias"][None, None]


def _attend(x: jax.Array, layer: Params, mask: jax.Array, num_heads: int) -> jax.Array:
    batch, length, width = x.shape
    query, key, value = (
        _affine(x, layer[part]).reshape(batch, length, num_heads, width // num_heads)
        for part in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (width // num_heads) ** 0.5
    scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)
    return attended.reshape(batch, length, width)


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, kind):
        raise EncoderError(f"{path} holds {type(raw).__name__}; expected {kind.__name__}")
    return raw
