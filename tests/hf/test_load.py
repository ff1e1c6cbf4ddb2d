"""Checkpoints in Hugging Face's format: round trips, splits, shardings, and errors that list everything."""

import dataclasses
import json
import tracemalloc

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from empg_jax.errors import RunError
from empg_jax.hf import load as hf
from empg_jax.hf import save as export_folder
from empg_jax.hf.config import config_from_hf, config_to_hf
from empg_jax.hf.load import load_hf, save_hf
from empg_jax.hf.peft import save_adapter
from empg_jax.learner.state import init_trained
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import DecoderConfig, RopeScaling, init_params
from empg_jax.models.lora import LoraConfig
from empg_jax.models.moe import MoeConfig
from empg_jax.models.quantize import quantize_params
from empg_jax.parallel.mesh import make_mesh
from empg_jax.text import build_phrase_tokenizer, load_tokenizer

TINY = DecoderConfig(
    vocab_size=24, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=32
)
CONFIGS = {
    "qwen2": TINY,
    "qwen3": dataclasses.replace(TINY, qkv_bias=False, qk_norm=True, tie_embeddings=False, head_dim=8),
    "llama": dataclasses.replace(
        TINY, qkv_bias=False, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64), norm_eps=1e-5
    ),
}


def random_params(config, seed=0):
    """Parameters in which even norms and biases are random, so that a swap cannot go unnoticed."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), shapes)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture
def saved(tmp_path):
    """A saved Qwen2-like model: (folder, config, params)."""
    params = random_params(TINY)
    save_hf(params, TINY, tmp_path / "model")
    return tmp_path / "model", TINY, params


@pytest.mark.parametrize("family", CONFIGS)
def test_saved_and_loaded_again(family, tmp_path):
    config = CONFIGS[family]
    params = random_params(config)
    save_hf(params, config, tmp_path / "model")
    loaded_config, loaded = load_hf(tmp_path / "model")
    assert loaded_config == config
    assert_same(loaded, params)
    assert not (tmp_path / "model.partial").exists()


def test_matrices_are_transposed_and_layers_separate(saved):
    folder, _, params = saved
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")  # the format's own reader
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.k_proj.weight"],
        np.asarray(params["layers"]["k_proj"]["kernel"][1]).T,
    )
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"], np.asarray(params["embed"]["embedding"])
    )


def test_files_are_split_at_the_given_size(tmp_path):
    params = random_params(TINY)
    save_hf(params, TINY, tmp_path / "model", max_shard_bytes=4000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [
        sum(t.nbytes for t in safetensors.numpy.load_file(tmp_path / "model" / f).values()) for f in files
    ]
    assert max(sizes) <= 4000
    assert (
        index["metadata"]["total_size"] == sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    )
    assert_same(load_hf(tmp_path / "model")[1], params)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16])
def test_stored_type_becomes_the_configs_type(tmp_path, stored):
    params = jax.tree.map(lambda leaf: leaf.astype(stored), random_params(TINY))
    save_hf(params, dataclasses.replace(TINY, param_dtype=stored), tmp_path / "model")
    assert (
        json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == jnp.dtype(stored).name
    )
    assert_same(
        load_hf(tmp_path / "model", TINY)[1], jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    )
    assert_same(load_hf(tmp_path / "model", dataclasses.replace(TINY, param_dtype=stored))[1], params)


def test_each_device_gets_its_part(saved):
    folder, _, params = saved
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        axes = [None] * leaf.ndim
        for axis, name in ((-1, "tensor"), (-2, "fsdp")):
            if leaf.ndim >= -axis and leaf.shape[axis] % mesh.shape[name] == 0:
                axes[axis] = name
        return jax.NamedSharding(mesh, jax.P(*axes))

    shardings = jax.tree.map(place, params)
    _, loaded = load_hf(folder, shardings=shardings)
    assert_same(loaded, params)
    kernel = loaded["layers"]["up_proj"]["kernel"]
    assert kernel.sharding == shardings["layers"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 8)
    save_hf(loaded, TINY, folder.with_name("again"))
    assert_same(load_hf(folder.with_name("again"))[1], params)


DEEP = dataclasses.replace(
    TINY, hidden_size=256, num_heads=8, head_dim=32, intermediate_size=1024, num_layers=6, vocab_size=64
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A saved model whose tensors are large beside what Python itself allocates: (folder, params)."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    params = random_params(DEEP)
    save_hf(params, DEEP, folder)
    return folder, params


def split_places(params):
    return param_shardings(make_mesh(fsdp=4, tensor=2), params, DEEP.head_dim)


def test_a_host_holds_about_one_tensor_at_a_time(deep):
    folder, params = deep
    places = split_places(params)
    load_hf(folder, shardings=places)  # compiles
    tracemalloc.start()
    try:
        loaded = load_hf(folder, shardings=places)[1]
        peak = tracemalloc.get_traced_memory()[1]  # NumPy's memory; the devices' is not counted
    finally:
        tracemalloc.stop()
    assert_same(loaded, params)
    largest = 256 * 1024 * 4
    assert largest < peak < 2.5 * largest  # one layer's matrix; the stacked parameter is six of them


def test_only_what_a_device_needs_is_copied(deep, monkeypatch):
    folder, params = deep
    copied = []

    def count(view, index, dtype, read=hf.copy_part):
        part = read(view, index, dtype)
        copied.append((view.size, part.size))
        return part

    monkeypatch.setattr(hf, "copy_part", count)
    load_hf(folder, shardings=split_places(params))
    assert sum(part for _, part in copied) == sum(leaf.size for leaf in jax.tree.leaves(params))  # once each
    assert {whole // part for whole, part in copied if whole >= 128 * 128} == {8}  # matrices: fsdp x tensor


def test_numpy_transposes_no_matrix(deep, tmp_path, monkeypatch):
    """XLA does, because NumPy takes several times as long for a large one."""
    folder, params = deep

    def straight(view, index, dtype, read=hf.copy_part):
        assert view.flags.c_contiguous
        return read(view, index, dtype)

    def write(file, shapes, read):
        assert all(read(name).flags.c_contiguous and read(name).shape == shapes[name][0] for name in shapes)

    monkeypatch.setattr(hf, "copy_part", straight)
    monkeypatch.setattr(export_folder, "write_safetensors", write)
    load_hf(folder, shardings=split_places(params))
    save_hf(params, DEEP, tmp_path / "model")


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_matrices_are_quantized_as_they_are_read(saved, scheme):
    folder, _, params = saved
    expected = jax.jit(quantize_params, static_argnums=1)(params, scheme)
    places = param_shardings(make_mesh(fsdp=2, tensor=2), expected, TINY.head_dim)
    found = load_hf(folder, shardings=places, quantize=scheme)[1]
    assert_same(found, expected)
    where = found["layers"]["up_proj"][f"kernel_{scheme}"].sharding.spec
    assert where == jax.P(None, ("fsdp", "sequence"), "tensor")


def test_the_tokenizer_goes_along(tmp_path):
    tokenizer = build_phrase_tokenizer(["go to", "apple 1"])
    save_hf(random_params(TINY), TINY, tmp_path / "model", tokenizer)
    assert load_tokenizer(tmp_path / "model").encode("go to apple 1") == tokenizer.encode("go to apple 1")
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [1]
    assert load_hf(tmp_path / "model")[0] == TINY


def test_the_sampling_defaults_of_a_model_go_along(tmp_path):
    own = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "bos_token_id": 0, "eos_token_id": [1, 7]}
    build_phrase_tokenizer(["go to", "apple 1"]).save(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    load_tokenizer(tmp_path / "base").save(tmp_path / "run")  # as a run keeps it
    tokenizer = load_tokenizer(tmp_path / "run")
    save_hf(random_params(TINY), TINY, tmp_path / "model", tokenizer)
    found = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert found == {**own, "pad_token_id": tokenizer.pad_id} and tokenizer.stop_ids == (1, 7)


def rewrite(folder, change):
    """Applies a change to the folder's tensors."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def test_all_wrong_tensors_are_listed(saved):
    folder, *_ = saved

    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.experts"] = np.zeros(3, np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(17, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied: a copy does no harm

    rewrite(folder, change)
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        load_hf(folder)
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  misshaped: model.layers.0.self_attn.q_proj.bias is [17] instead of [16]",
        "  missing: model.layers.1.mlp.up_proj.weight",
        "  missing: model.norm.weight",
        "  unexpected: model.layers.0.mlp.experts",
    ]


def test_a_head_that_is_said_to_be_tied_and_is_another(saved):
    """Transformers takes the head that is there; ours would train another model."""
    folder, *_ = saved
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    load_hf(folder)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1e-3}))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from .*: set tie_word_embeddings to false"
    ):
        load_hf(folder)


def test_untied_model_without_a_head(saved):
    folder, config, _ = saved
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load_hf(folder, dataclasses.replace(config, tie_embeddings=False))


@pytest.mark.parametrize("keep", [4, 100, 5000])
def test_a_file_that_is_cut_short(saved, keep):
    folder, *_ = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is (cut short|not a safetensors file)"):
        load_hf(folder)


def test_a_file_with_a_broken_header(saved):
    folder, *_ = saved
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="the header is not JSON"):
        load_hf(folder)


@pytest.mark.parametrize("text", ["[]", '"qwen2"', '{"cut', "\x00"])
def test_a_config_that_is_no_object(saved, text):
    folder, *_ = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (must hold a JSON object|is not valid JSON)"):
        load_hf(folder)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": [1]}}'])
def test_an_index_that_names_no_files(saved, text):
    folder, *_ = saved
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is not a safetensors index"):
        load_hf(folder)


def test_a_header_that_is_no_object(saved):
    folder, *_ = saved
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ValueError, match=r"model\.safetensors: the header is list; expected an object"):
        load_hf(folder)


def test_an_adapted_router_has_one_name(tmp_path):
    lora = LoraConfig(2, targets=("*",))
    model = dataclasses.replace(CONFIGS["qwen3"], moe=MoeConfig(4, 2, 8), lora=lora)
    adapters = init_trained(jax.random.key(0), model)
    save_adapter(adapters, lora, tmp_path / "adapter", base_path="base")
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    names = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = {name.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2] for name in names}
    assert set(targets) == modules and "gate" in modules


def test_quantized_tensors_are_refused(saved):
    folder, *_ = saved
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is I8; only F64, F32"):
        load_hf(folder)


def test_only_the_models_own_files_are_downloaded(tmp_path, monkeypatch):
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["consolidated.safetensors", "checkpoint-500/model.safetensors", "onnx/config.json"]
    wanted = []

    def download(name, **patterns):
        wanted.extend(huggingface_hub.utils.filter_repo_objects([*files, *others], **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_hf("owner/name")
    assert wanted == files


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load_hf(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(TINY)))
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"lacks part-1\.safetensors"):
        load_hf(tmp_path)


def test_nothing_is_written_when_the_export_cannot_be(tmp_path):
    params = random_params(TINY)
    target = tmp_path / "model"
    with pytest.raises(ValueError, match="no Hugging Face family has both"):
        save_hf(params, dataclasses.replace(TINY, qk_norm=True, qkv_bias=True), target)
    with pytest.raises(ValueError, match=r"embed/embedding is \[24, 16\] instead of \[25, 16\]"):
        save_hf(params, dataclasses.replace(TINY, vocab_size=25), target)
    with pytest.raises(ValueError, match="the tokenizer has 30 tokens, the model only 24"):
        save_hf(params, TINY, target, build_phrase_tokenizer([f"word {i}" for i in range(18)]))
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "mine").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_hf(params, TINY, target)


@pytest.mark.parametrize("name", [".", "link", "there"])
def test_an_empty_folder_stays_and_is_filled(name, tmp_path, monkeypatch):
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    link.symlink_to(there)
    number = there.stat().st_ino
    monkeypatch.chdir(there if name == "." else tmp_path)
    save_hf(random_params(TINY), TINY, name)
    assert there.stat().st_ino == number and link.is_symlink()  # a mount point cannot be replaced
    assert sorted(entry.name for entry in there.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "there"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(export_folder, "write_safetensors", fail)
    with pytest.raises(RunError, match="model cannot be written: no space left"):
        save_hf(random_params(TINY), TINY, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def test_config_keys_of_older_and_newer_files():
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    older = config_from_hf({**LLAMA, "rope_theta": 500000.0, "rope_scaling": scaling})
    newer = config_from_hf({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 500000.0}})
    assert older == newer
    assert older.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert (older.rope_theta, older.num_kv_heads, older.head_dim, older.qkv_bias) == (500000.0, 2, 4, False)


def test_config_keeps_what_the_decoder_does_not_know():
    base = {**LLAMA, "max_position_embeddings": 77, "bos_token_id": 5, "rope_parameters": {"rope_theta": 1.0}}
    keys = config_to_hf(config_from_hf(LLAMA), base)
    assert (keys["max_position_embeddings"], keys["bos_token_id"], keys["rope_theta"]) == (77, 5, 10000.0)
    assert "rope_parameters" not in keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type='gpt2' is not supported; supported are llama, mistral, qwen2, qwen3",
        ),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "hidden_act='gelu' .*attention_bias=true"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope scaling lacks low_freq_factor"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling with a factor and no rope_type"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            r"rope_parameters by the kind of layer \(full_attention\)",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            r"rope_scaling=\{'rope_type': 'yarn', 'factor': 4.0\} beside rope_parameters=",
        ),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3' "),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' is neither true nor false"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not supported"),
        ({"rope_theta": None}, "rope_theta=None "),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}}, "rope_theta='1e6' "),
        (
            {"rms_norm_eps": None, "hidden_size": "8", "num_attention_heads": 0},
            "hidden_size='8' .*num_attention_heads=0 .*rms_norm_eps=None ",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral"}, "sliding_window=4096, unless max_length"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}, "sliding_window=9"),
    ],
)
def test_what_the_decoder_cannot_reproduce_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**LLAMA, **change})


def test_sliding_windows_are_fine_for_short_rows():
    assert config_from_hf({**LLAMA, "model_type": "mistral", "num_key_value_heads": 2}, max_length=4096)
    assert config_from_hf(
        {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}
    )
