"""SmolLM2 from a GGUF file: its layout, its tokenizer and, where its folder is (EMPG_SMOLLM2), real text.

``scripts/fetch_smollm2.sh`` makes the folder; without it the tests of real text are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import convert_gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax import trainer
from empg_jax.config import load_config
from empg_jax.hf.config import config_from_hf
from empg_jax.hf.load import load_hf
from empg_jax.hf.presets import make_preset
from empg_jax.models.decoder import forward, output_embedding
from empg_jax.run.assembly import make_language
from tests.runs import ROOT, lines

FOLDER = Path(os.environ.get("EMPG_SMOLLM2") or Path.home() / ".cache" / "empg-jax" / "SmolLM2-135M-Instruct")
real = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(),
    reason=f"no model in {FOLDER}: scripts/fetch_smollm2.sh makes it (or EMPG_SMOLLM2 names it)",
)
# The keys of a GGUF file with a vocabulary of few tokens.
TOKENS = ["<|end|>", "<|start|>", *"abc123", "Ġ", "ab", "Ġc", "12"]
FIELDS = {
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
    "tokenizer.ggml.merges": ["a b", "Ġ c", "1 2"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
    "llama.context_length": 99,
    "llama.vocab_size": 49152,
    "llama.embedding_length": 576,
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.dimension_count": 64,
    "llama.feed_forward_length": 1536,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 100000.0,
}


def test_rows_of_a_projection_come_back():
    rows = np.arange(24.0).reshape(12, 2)  # two heads of six rows: rotary pairs (0, 3), (1, 4), (2, 5)
    side_by_side = rows.reshape(2, 2, 3, 2).swapaxes(1, 2).reshape(12, 2)
    assert side_by_side[:6, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert (convert_gguf.unpermute(side_by_side, 2) == rows).all()


def test_tensors_have_names():
    assert convert_gguf.hf_name("blk.7.ffn_gate.weight") == "model.layers.7.mlp.gate_proj.weight"
    assert convert_gguf.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    for other in ("output.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight"):
        with pytest.raises(convert_gguf.NotSupported, match=other):
            convert_gguf.hf_name(other)


def test_the_tokenizer_splits_digits_and_keeps_control_tokens():
    backend = convert_gguf.make_tokenizer(FIELDS.__getitem__)
    text = "ab c12<|end|>"
    ids = backend.encode(text).ids
    assert [TOKENS[index] for index in ids] == ["ab", "Ġc", "1", "2", "<|end|>"]
    assert backend.decode(ids, skip_special_tokens=False) == text
    config = convert_gguf.make_tokenizer_config(FIELDS.__getitem__)
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (*TOKENS[1::-1], TOKENS[0])
    assert config["chat_template"] == "{{ messages }}"


def test_the_preset_is_the_files_shape():
    keys = convert_gguf.make_config(FIELDS.__getitem__)
    assert keys["rms_norm_eps"] == 1e-5  # not the float32 next to it
    assert config_from_hf(json.loads(json.dumps(keys))) == make_preset("smollm2-135m")


@real
@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_prompts_and_logits_are_those_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    language = make_language(load_config("household_smollm2", [f"model.path={FOLDER}"]))
    messages = [
        {
            "role": "user",
            "content": "You arrive at desk 12. On the desk 12, you see a pen 1.\nYour task:",
        },
        {"role": "assistant", "content": "take pen 1 from desk 12"},
        {"role": "user", "content": "You pick up the pen 1, it's thé last.  2026!"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = language.renderer.start(messages)
    assert ids == expected
    answered = language.renderer.encode_response(messages[1]["content"])
    added = language.renderer.follow(
        messages[:1], messages[1]["content"], messages[2:], stopped=True
    )  # token by token it is the same conversation
    assert language.renderer.start(messages[:1]) + answered + added == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].numpy()
    del model
    config, params = load_hf(FOLDER)
    assert config.tie_embeddings and config.num_kv_heads == 3
    tokens = jnp.asarray([ids])
    places = jnp.arange(len(ids))[None]
    hidden = jax.jit(forward, static_argnums=1)(params, config, tokens, places, jnp.ones_like(tokens))
    ours = np.asarray(hidden[0, -1] @ output_embedding(params).T)
    assert np.abs(ours - logits).max() < 2e-3 * np.abs(logits).max()
    assert ours.argmax() == logits.argmax()


@real
@pytest.mark.slow
def test_a_complete_folder_is_left_as_it_is():
    script = ROOT / "scripts" / "fetch_smollm2.sh"
    done = subprocess.run([script, FOLDER], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == f"{FOLDER}\n" and "already there" in done.stderr


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").touch()
    script = ROOT / "scripts" / "fetch_smollm2.sh"
    done = subprocess.run([script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "is no complete folder of this model" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@real
@pytest.mark.slow
@pytest.mark.long
def test_real_text_trains(tmp_path):
    run_dir = trainer.train(
        load_config(
            "household_smollm2",
            [
                *(f"model.path={FOLDER}", f"run_dir={tmp_path / 'run'}"),
                *("train.updates=1", "train.warmup_updates=0"),
                *("sft.updates=1", "sft.demonstrations=8", "eval.tasks=1", "log.progress=false"),
            ],
        )
    )
    (update,) = [line for line in lines(run_dir) if "loss" in line]
    assert update["episodes_trained"] == 16 and np.isfinite(update["loss"])
    assert update["segments_per_episode"] == 1  # the template lets a conversation grow
    assert update["response_tokens"] > 2
