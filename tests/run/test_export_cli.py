"""From a run to a folder that other programs load, and from there into the next run: ``empg-jax export``."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from empg_jax import trainer
from empg_jax.cli import app
from empg_jax.errors import ConfigError
from empg_jax.models.decoder import forward, output_embedding
from empg_jax.models.lora import combine
from empg_jax.run.saved import open_saved
from tests import runs

try:
    import torch
    import transformers
except ImportError as missing:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(f"needs the parity extra: {missing}", allow_module_level=True)

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SHORT = [*runs.HOUSE, "train.updates=1", "sft.updates=0", "eval.tasks=4"]
TOKENS = np.arange(6, 26, dtype=np.int32)[None]


def export(*arguments):
    """Exit code, stdout, stderr of ``empg-jax export``."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that trained everything, and its export."""
    folder = tmp_path_factory.mktemp("whole")
    run = runs.train(folder / "run", *SHORT)
    code, out, _ = export(run, "--out", folder / "model")
    assert code == 0 and out.strip() == str(folder / "model")
    return run, folder / "model"


@pytest.fixture(scope="module")
def adapted(whole, tmp_path_factory):
    """A run that trained adapters on the first one's export, with the base as its reference."""
    folder = tmp_path_factory.mktemp("adapted")
    options = [f"model.path={whole[1]}", "model.lora.rank=2", "model.lora.alpha=3", "algorithm.kl_coef=0.1"]
    return runs.train(folder / "run", *SHORT, *options, "train.learning_rate=0.01")


def our_logits(run):
    saved = open_saved(run, [], warn=print)
    params = combine(saved.base or {}, saved.params)
    positions = jnp.arange(TOKENS.shape[1])[None]
    hidden = forward(params, saved.model, jnp.asarray(TOKENS), positions, jnp.ones_like(TOKENS))
    return np.asarray(hidden @ output_embedding(params).T)


def load_torch(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


@pytest.mark.slow
def test_transformers_computes_what_the_run_trained(whole):
    run, folder = whole
    np.testing.assert_allclose(torch_logits(load_torch(folder)), our_logits(run), atol=1e-4)
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == list(open_saved(run, [], warn=print).language.tokenizer.stop_ids)


def test_the_built_tokenizer_is_one_for_transformers_too(whole, tmp_path):
    """The phrase tokenizer is a file like any other, chat template included."""
    run, folder = whole
    ours = open_saved(run, [], warn=print).language.tokenizer
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = ours.decode(range(8, ours.vocab_size))
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text) != []
    messages = [{"role": "user", "content": text}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == ours.render(messages, add_generation_prompt=True)
    # AutoTokenizer would build Qwen's own tokenizer over these files, so the person is told.
    assert "read it with transformers.PreTrainedTokenizerFast" in export(run, "--out", tmp_path / "again")[2]


@pytest.mark.slow
def test_merged_adapters_are_the_policy(adapted, tmp_path):
    code, _, said = export(adapted, "--out", tmp_path / "model")
    assert code == 0 and "model of step 1 written" in said and "nats per token on a fixed text" in said
    expected = our_logits(adapted)
    np.testing.assert_allclose(torch_logits(load_torch(tmp_path / "model")), expected, atol=1e-4)


def test_the_adapter_folder_is_read_as_peft_reads_it(whole, adapted, tmp_path):
    """Names, orientation and scale by hand: W + (alpha / r) B A, for each module of the target list."""
    code, _, said = export(adapted, "--out", tmp_path / "adapter", "--adapter")
    assert code == 0 and "adapter of step 1 written" in said
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3.0)
    assert config["base_model_name_or_path"] == str(whole[1])
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    model = load_torch(whole[1])
    before = torch_logits(model)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    used = set()
    with torch.no_grad():
        for name, module in linear.items():
            if name.rpartition(".")[2] not in config["target_modules"]:
                continue
            keys = [f"base_model.model.{name}.lora_{half}.weight" for half in "AB"]
            down, up = (torch.from_numpy(tensors[key]) for key in keys)
            used |= set(keys)
            module.weight += config["lora_alpha"] / config["r"] * up @ down
    assert used == set(tensors) and len(linear) == 8  # seven per layer and the head
    found = torch_logits(model)
    np.testing.assert_allclose(found, our_logits(adapted), atol=1e-4)
    assert np.abs(found - before).max() > 1e-3
    assert (tmp_path / "adapter" / "tokenizer.json").exists()


def test_the_type_of_the_weights_can_be_chosen(adapted, tmp_path):
    assert export(adapted, "--out", tmp_path / "model", "--dtype", "bfloat16")[0] == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with safetensors.safe_open(tmp_path / "model" / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_the_loaded_model_is_recognized(whole, adapted):
    """The fingerprint that is noted at the start is the base's, since fresh adapters change nothing."""
    noted = json.loads((adapted / "environment.json").read_text())["model"]
    assert noted["path"] == str(whole[1])
    model = load_torch(whole[1])
    from empg_jax.learner.fingerprint import TEXT

    ids = open_saved(whole[0], [], warn=print).language.tokenizer.encode(TEXT)[:64]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    expected = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean()
    assert noted["text_logprob"] == pytest.approx(float(expected), abs=1e-3)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(whole, adapted, tmp_path):
    run, folder = whole
    for arguments, expected, message in [
        ((run, "--out", folder), 2, "is not empty: export into a new folder"),
        ((run, "--out", "/proc/new/x"), 2, "--out /proc/new/x cannot be written: "),
        ((run, "--out", tmp_path / "x", "--adapter"), 2, "trained every parameter"),
        ((tmp_path, "--out", tmp_path / "x"), 2, "neither a run folder"),
        ((adapted, "--out", tmp_path / "x", "seed=1", "model.path=null"), 2, "belong to the base"),
    ]:
        code, _, said = export(*arguments)
        assert code == expected and message in said
    code, _, said = export(run, "--out", tmp_path / "x", "--dtype", "int8")
    assert code == 2 and "--dtype int8 is unknown" in said
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_loaded_stops_the_run_before_it_begins(whole, tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    for file in whole[1].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    smaller = json.loads((broken / "config.json").read_text()) | {"vocab_size": 9}
    for name, content, message in [
        ("model.safetensors", (broken / "model.safetensors").read_bytes()[:-10], "is cut short"),
        ("config.json", json.dumps(smaller).encode(), "9 embedding rows"),
        ("config.json", b'{"model_type": "gpt2"}', "model_type='gpt2'"),
    ]:
        (broken / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            trainer.train(runs.configure(tmp_path / "run", *SHORT, f"model.path={broken}"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
