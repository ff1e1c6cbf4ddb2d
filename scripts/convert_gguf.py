"""Converts a GGUF file of a SmolLM2 model to a Hugging Face folder: float32 weights, tokenizer, template.

    python scripts/convert_gguf.py MODEL.gguf OUT

Needs gguf, numpy, safetensors and tokenizers, but no torch; ``scripts/fetch_smollm2.sh`` calls it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PRE_TOKENIZER = "smollm"  # digits one by one, then the byte-level words of GPT-2
CONTROL = 3  # the type of a control token in a GGUF file
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class NotSupported(Exception):
    """The file is of a kind that this script cannot convert; the message says what it can."""


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a tensor.

    Raises:
      NotSupported: a Llama model with tied embeddings has no such tensor.
    """
    if name in TOP:
        return TOP[name]
    block, _, rest = name.partition(".")
    layer, _, module = rest.partition(".")
    known = LAYER.get(module.removesuffix(".weight"))
    if block != "blk" or known is None:
        raise NotSupported(f"tensor {name}: expected those of a Llama model with tied embeddings")
    return f"model.layers.{layer}.{known}.weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a query or key projection back into the order of the Hugging Face layout.

    GGUF files of Llama models hold each head's rotary pairs side by side; there the two halves of a head hold
    one part of every pair each.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def read_tensors(reader: Any, heads: int, kv_heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the float32 values of every tensor."""
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        # GGUF names the fastest axis first; the values already lie as [out, in].
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        name = hf_name(tensor.name)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = unpermute(values, heads if ".attn_q." in tensor.name else kv_heads)
        yield name, np.ascontiguousarray(values)


def make_config(field: Any) -> dict[str, Any]:
    """Return the keys of config.json; ``field`` returns the value of a key of the GGUF file."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        # The file stores a float32; its shortest decimal is what the model was made with.
        "rms_norm_eps": float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": field("llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }


def make_tokenizer(field: Any) -> Any:
    """Build the ``tokenizers`` object from the vocabulary and the merges of the file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(line.split(" ")) for line in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer


def make_tokenizer_config(field: Any) -> dict[str, Any]:
    """Return the keys of tokenizer_config.json, the chat template among them."""
    tokens = field("tokenizer.ggml.tokens")
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{k}_token": tokens[field(f"tokenizer.ggml.{name}_token_id")] for k, name in special.items()},
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("tokenizer.chat_template"),
    }


def convert(source: Path, out: Path) -> None:
    """Write the folder.

    Raises:
      NotSupported: the file is no Llama model with tied embeddings and SmolLM's tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(source)

    def field(key: str) -> Any:
        if key not in reader.fields:
            raise NotSupported(f"{source}: it has no {key}")
        return reader.fields[key].contents()

    for key, expected in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", PRE_TOKENIZER),
    ):
        if field(key) != expected:
            raise NotSupported(f"{source}: {key} is {field(key)}; this script converts {expected} only")
    config = make_config(field)
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = dict(read_tensors(reader, *heads))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(field).save(str(out / "tokenizer.json"))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", ids),
        ("tokenizer_config.json", make_tokenizer_config(field)),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("out", type=Path, metavar="OUT")
    options = parser.parse_args()
    try:
        convert(options.source, options.out)
    except NotSupported as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
