"""The decoder computes what ``transformers`` computes: tiny random models, float32, both ways."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.hf.config import read_hf_config
from empg_jax.hf.load import load_hf, save_hf
from empg_jax.models.decoder import forward, forward_cached, init_cache, output_embedding, unstack_layers
from empg_jax.models.head import compute_head
from tests.models import golden

try:
    import torch
    import transformers
except ImportError as missing:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(f"needs the parity extra: {missing}", allow_module_level=True)

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FAMILIES = {
    **golden.FAMILIES,
    "qwen3_moe": (
        "qwen3_moe",
        {
            **golden.BASE,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
}
SHARPNESS = {"initializer_range": 0.2}  # sharp logits: a wrong rotation or norm shows
LENGTH = 40


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """(folder, the torch model, our config, our parameters) of one family."""
    kind, options = FAMILIES[request.param]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **options, **SHARPNESS), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or "bias" in name:  # ones and zeros would hide a swap
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    config, params = load_hf(folder)
    return folder, theirs, config, params


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()


def our_logits(params, config, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = jax.jit(forward, static_argnums=1)(params, config, tokens, positions, jnp.ones_like(tokens))
    return hidden, hidden @ output_embedding(params).T


def random_tokens():
    return jax.random.randint(jax.random.key(1), (2, LENGTH), 0, golden.BASE["vocab_size"])


def test_logits_and_logprobs(models):
    _, theirs, config, params = models
    tokens = random_tokens()
    expected = torch_logits(theirs, tokens)
    assert np.abs(expected).max() > 3  # the comparison means something
    hidden, logits = our_logits(params, config, tokens)
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4, rtol=1e-4)

    flat = hidden[:, :-1].reshape(-1, config.hidden_size)
    chosen = tokens[:, 1:].reshape(-1)
    logprobs, entropies = compute_head(flat, output_embedding(params), chosen)
    wide = torch.log_softmax(torch.from_numpy(expected[:, :-1]).double(), -1).numpy().reshape(len(chosen), -1)
    np.testing.assert_allclose(np.asarray(logprobs), wide[np.arange(len(chosen)), chosen], atol=1e-4)
    np.testing.assert_allclose(np.asarray(entropies), -(np.exp(wide) * wide).sum(-1), atol=1e-4)


def test_greedy_continuation(models):
    _, theirs, config, params = models
    prompt = random_tokens()[:1, :8]
    steps = 24
    with torch.no_grad():
        expected = theirs.generate(
            torch.from_numpy(np.array(prompt, np.int64)),
            attention_mask=torch.ones(1, 8, dtype=torch.long),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
        ).numpy()[0, 8:]

    unstacked = unstack_layers(params, config.num_layers)
    step = jax.jit(forward_cached, static_argnums=1)
    cache = init_cache(config, slots=1, capacity=8 + steps)
    hidden, cache = step(unstacked, config, prompt, jnp.arange(8)[None], cache)
    found = []
    for position in range(8, 8 + steps):
        logits = (hidden[:, -1] @ output_embedding(params).T)[0]
        # generate() masks the end token while it is below min_new_tokens, so the same is done here.
        ends = theirs.generation_config.eos_token_id
        logits = logits if ends is None else logits.at[ends].set(-jnp.inf)
        found.append(int(jnp.argmax(logits)))
        token = jnp.array([[found[-1]]], jnp.int32)
        hidden, cache = step(unstacked, config, token, jnp.array([[position]], jnp.int32), cache)
    assert found == expected.tolist()


def test_exported_model_is_the_same_model_to_transformers(models, tmp_path):
    folder, theirs, config, params = models
    save_hf(params, config, tmp_path / "out", base_config=read_hf_config(folder), max_shard_bytes=20000)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert type(reloaded) is type(theirs)
    tokens = random_tokens()
    np.testing.assert_array_equal(torch_logits(reloaded.eval(), tokens), torch_logits(theirs, tokens))
    assert load_hf(tmp_path / "out")[0] == config


def test_a_model_of_our_own_is_loaded_by_transformers(models, tmp_path):
    _, theirs, config, params = models
    save_hf(params, config, tmp_path / "out")  # no config.json to start from
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    tokens = random_tokens()
    np.testing.assert_allclose(torch_logits(reloaded.eval(), tokens), torch_logits(theirs, tokens), atol=1e-5)
