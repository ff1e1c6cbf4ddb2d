"""A small model that says tool calls, and servers in processes of their own."""

import itertools
import time

import jax
import numpy as np
from serving import ROOT

from empg_jax.hf.save import save_hf
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.text import build_phrase_tokenizer

TEMPLATE = ROOT / "scripts" / "examples" / "tools.jinja"
WORDS = [*"red green blue one two three four five six seven eight nine".split(), "north", "south"]  # noqa: SIM905
CALL = '{"name": "add", "arguments": {"a": 2, "b": 3}}'
# What the model says if it is greedy. Sampled, it says these words and others.
CHAIN = ["<|assistant|>", "<tool_call>", CALL, "</tool_call>", "<|end|>"]
WIDTH = 64
PADDING = 3  # rows of the model beyond the tokenizer's, as Qwen has them
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}},
    }
]


def save_talker(folder):
    """Save a model whose next token follows the last one, disturbed by attention to the others."""
    tokenizer = build_phrase_tokenizer([*WORDS, "<tool_call>", CALL, "</tool_call>"])
    size = tokenizer.vocab_size + PADDING
    assert size <= WIDTH
    model = DecoderConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=8,
        tie_embeddings=False,
    )
    params = jax.tree.map(np.array, init_params(jax.random.key(3), model))
    # Large against what attention adds, so that the last token decides most.
    params["embed"]["embedding"] = 8 * np.eye(size, WIDTH, dtype=np.float32)
    head = np.random.default_rng(0).normal(0, 0.1, (size, WIDTH)).astype(np.float32)
    # A greedy response that begins with one of these never ends.
    north, south = tokenizer.token_to_id("north"), tokenizer.token_to_id("south")
    head[north, south] += 2
    head[south, north] += 2
    ids = [tokenizer.token_to_id(token) for token in CHAIN]
    for before, after in itertools.pairwise(ids):
        head[after, before] += 0.5
    # Other control tokens are never said, so that every text is tokenized as it was sampled.
    for name in ("<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unk|>"):
        head[tokenizer.token_to_id(name)] = -6
    head[-PADDING:] = -6
    params["head"]["embedding"] = head
    save_hf(params, model, folder, tokenizer)
    return folder


def wait_until(condition, seconds=60):
    """Wait for a condition; generous, because the machine may be busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.02)
