"""The encoder computes what torch's BertModel computes, and what is not one is refused by name."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from empg_envs.deepsearch.passages import Passage
from empg_jax.hf.safetensors import write_safetensors
from empg_jax.retrieval.dense import DenseRetriever, VectorsError, find_nearest
from empg_jax.retrieval.encoder import (
    EncoderError,
    TextEncoder,
    compute_embeddings,
    compute_states,
    load_params,
    read_config,
)
from empg_jax.retrieval.serve import make_engine

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "oslo", "rome", "norway", "italy", "capital", "of", "the", "is"]
WIDTH, INNER, LAYERS, POSITIONS = 16, 24, 2, 40
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}

jit_states = jax.jit(compute_states, static_argnames="config")


def tensors() -> dict[str, np.ndarray]:
    """A random encoder in Hugging Face's names; large weights, so that mistakes show."""
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        affine = {
            "attention.self.query": (WIDTH, WIDTH),
            "attention.self.key": (WIDTH, WIDTH),
            "attention.self.value": (WIDTH, WIDTH),
            "attention.output.dense": (WIDTH, WIDTH),
            "attention.output.LayerNorm": (WIDTH,),
            "intermediate.dense": (INNER, WIDTH),
            "output.dense": (WIDTH, INNER),
            "output.LayerNorm": (WIDTH,),
        }
        for name, shape in affine.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    return {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    """A tiny encoder on disk."""
    path = tmp_path / "encoder"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    values = tensors()
    shapes = {name: (value.shape, value.dtype) for name, value in values.items()}
    write_safetensors(path / "model.safetensors", shapes, values.__getitem__)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=30)  # as saved by others; must not matter
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([1, 5, 12])
    tokens = rng.integers(4, len(WORDS), (3, 12)).astype(np.int32)
    return tokens, np.arange(12)[None] < lengths[:, None]


@pytest.mark.parity
def test_hidden_states_are_those_of_torch(folder) -> None:
    try:
        import torch
        import transformers
    except ImportError as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"needs the parity extra: {missing}")
    model = transformers.BertModel(transformers.BertConfig(**CONFIG), add_pooling_layer=False).eval()
    missing, unexpected = model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in tensors().items()}, strict=False
    )
    assert not unexpected and all("position_ids" in name for name in missing)
    tokens, mask = batch(np.random.default_rng(1))
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state.numpy()
    config = read_config(folder)
    states = jit_states(load_params(folder, config), jnp.asarray(tokens), jnp.asarray(mask), config)
    np.testing.assert_allclose(np.asarray(states)[mask], expected[mask], atol=2e-5)


def test_padding_and_batch_do_not_matter(folder) -> None:
    encoder = TextEncoder(folder, batch_size=4)
    texts = ["oslo", "the capital of norway is oslo", "rome is the capital"]
    together = encoder.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert encoder.encode([]).shape == (0, WIDTH)
    tokens, mask = encoder._pad([encoder._tokenizer.encode("oslo " * 500).ids])
    assert tokens.shape == (1, POSITIONS) and mask.all()  # cut to the encoder's own limit


def test_pooling_follows_its_file(folder) -> None:
    config = read_config(folder)
    params = load_params(folder, config)
    tokens, mask = batch(np.random.default_rng(2))
    states = np.asarray(jit_states(params, jnp.asarray(tokens), jnp.asarray(mask), config))
    mean = np.stack([row[: keep.sum()].mean(axis=0) for row, keep in zip(states, mask, strict=True)])
    pooling = folder / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    for expected, mode in ((mean, "pooling_mode_mean_tokens"), (states[:, 0], "pooling_mode_cls_token")):
        pooling.write_text(json.dumps({"word_embedding_dimension": WIDTH, mode: True}))
        found = compute_embeddings(params, jnp.asarray(tokens), jnp.asarray(mask), config=read_config(folder))
        unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(np.asarray(found), unit, atol=1e-5)
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(EncoderError, match="pooling_mode_max_tokens"):
        read_config(folder)


def test_further_modules_are_refused(folder) -> None:
    def write(*kinds: str) -> None:
        modules = [{"idx": 0, "path": "", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
        (folder / "modules.json").write_text(json.dumps(modules))

    write("Transformer", "Pooling", "Normalize")
    assert read_config(folder).pooling == "mean"
    write("Transformer", "Pooling", "Dense", "Normalize")  # as LaBSE has it
    with pytest.raises(EncoderError, match=r"a module sentence_transformers\.models\.Dense; only Tr"):
        TextEncoder(folder)


def test_nearest_by_inner_product() -> None:
    passages = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    scores, numbers = find_nearest(jnp.asarray([[0.0, 2.0]]), passages, topk=2)
    assert numbers.tolist() == [[1, 2]]
    np.testing.assert_allclose(scores, [[2.0, 1.6]], rtol=1e-6)


def test_dense_retrieval_and_its_cache(folder, tmp_path) -> None:
    titles = ("oslo", "rome", "norway", "italy")
    passages = [Passage(str(n), title, f"the {title}") for n, title in enumerate(titles)]
    encoder, cache = TextEncoder(folder, batch_size=4), tmp_path / "vectors.npz"
    counted: list[int] = []
    first = DenseRetriever(passages, encoder, cache=cache, advance=counted.append)
    # A passage's own words are nearest to it.
    found = first.search([f"{passage.title}\n{passage.text}" for passage in passages], 9)
    assert [hits[0].passage.id for hits in found] == ["0", "1", "2", "3"]
    assert all(len(hits) == 4 and hits[0].score == pytest.approx(1.0, abs=1e-5) for hits in found)
    assert counted == [4] and cache.is_file()
    again = DenseRetriever(passages, encoder, cache=cache, advance=counted.append)
    many, one = again.search(["oslo"] * 70, 2), first.search(["oslo"], 2)
    assert counted == [4] and [hit.passage for hit in many[69]] == [hit.passage for hit in one[0]]
    DenseRetriever(passages[:3], encoder, cache=cache, advance=counted.append)  # another corpus
    assert counted == [4, 3]
    cache.write_bytes(cache.read_bytes()[:100])  # cut short
    DenseRetriever(passages, encoder, cache=cache, advance=counted.append)
    assert counted == [4, 3, 4]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".npz"] == ["vectors.npz"]


def test_vectors_that_cannot_be_written_are_told_before_they_are_computed(folder, tmp_path) -> None:
    passages, counted = [Passage("0", "oslo", "the capital")], []
    encoder = TextEncoder(folder)
    for cache, reason in ((tmp_path / "nowhere" / "v.npz", "No such file"), (tmp_path, "it is a folder")):
        with pytest.raises(VectorsError, match=f"cannot be written to {cache}: {reason}"):
            DenseRetriever(passages, encoder, cache=cache, advance=counted.append)
    assert counted == []


def test_vectors_are_kept_for_an_encoder_not_for_its_last_digits(folder, tmp_path, monkeypatch) -> None:
    passages, cache = (
        [Passage(str(n), f"oslo {n}", "the capital") for n in range(3)],
        tmp_path / "vectors.npz",
    )
    counted: list[int] = []

    def build(where, **options) -> DenseRetriever:
        return DenseRetriever(passages, TextEncoder(where, **options), cache=cache, advance=counted.append)

    stored, encode = build(folder), TextEncoder.encode
    noise = np.random.default_rng(0)
    with monkeypatch.context() as other_machine:
        other_machine.setattr(
            TextEncoder,
            "encode",
            lambda self, texts: encode(self, texts) + noise.uniform(-1e-3, 1e-3, (len(texts), self.width)),
        )
        assert [np.asarray(piece).tolist() for piece in build(folder)._pieces] == [
            np.asarray(piece).tolist() for piece in stored._pieces
        ]
    assert counted == [3]
    build(folder, max_tokens=4)
    assert counted == [3, 3]
    other = shutil.copytree(folder, tmp_path / "other")
    weights = tensors()
    weights["encoder.layer.0.output.dense.bias"][0] += 1e-4
    shapes = {name: (value.shape, value.dtype) for name, value in weights.items()}
    write_safetensors(other / "model.safetensors", shapes, weights.__getitem__)
    build(folder)
    build(other)
    assert counted == [3, 3, 3, 3]


def test_the_devices_of_a_process_have_a_piece_each(folder, monkeypatch) -> None:
    passages = [Passage(str(n), "oslo" if n % 2 else "rome", f"the {n % 3} norway") for n in range(6)]
    encoder, found = TextEncoder(folder, batch_size=4), []
    device = jax.local_devices()[0]
    for count in (1, 2, 3, 9):  # more devices than passages, too
        monkeypatch.setattr(jax, "local_devices", lambda count=count: [device] * count)
        engine = DenseRetriever(passages, encoder)
        assert len(engine._pieces) == min(count, 6)
        found.append(engine.search(["rome", "oslo norway"], 5))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert [hit.passage.id for hit in one] == [hit.passage.id for hit in two]
            np.testing.assert_allclose([h.score for h in one], [h.score for h in two], atol=1e-6)


def test_an_index_of_the_same_vectors_finds_the_same(folder, tmp_path) -> None:
    titles = ("oslo", "rome", "norway", "italy")
    passages = [Passage(str(n), title, f"the {title}") for n, title in enumerate(titles)]
    encoder = TextEncoder(folder, batch_size=4)
    dense = DenseRetriever(passages, encoder, query_prefix="the ")
    np.save(tmp_path / "v.npy", encoder.encode([f"{each.title}\n{each.text}" for each in passages]))
    options = {"model": str(folder), "index": str(tmp_path / "v.npy"), "query_prefix": "the "}
    engine = make_engine("vectors", passages, options)
    for one, two in zip(*(each.search(["oslo", "italy rome"], 4) for each in (dense, engine)), strict=True):
        assert [hit.passage for hit in one] == [hit.passage for hit in two]
        np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in two], atol=1e-5)


def test_folders_that_hold_no_encoder(folder, tmp_path) -> None:
    with pytest.raises(EncoderError, match="no folder"):
        TextEncoder(tmp_path / "nowhere")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "roberta"}))
    with pytest.raises(EncoderError, match="model_type is 'roberta'; only 'bert'"):
        TextEncoder(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 3}))
    with pytest.raises(EncoderError, match=r"no tensor encoder\.layer\.2"):
        TextEncoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"no model\.safetensors"):
        TextEncoder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match=r"no tokenizer\.json"):
        TextEncoder(folder)
