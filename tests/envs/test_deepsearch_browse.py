"""The tool that browses: what a configuration with it shows, reads, costs and trains on."""

import json
import threading

import numpy as np
import pytest

from empg_envs import make_env
from empg_envs.deepsearch.bm25 import BuiltinBm25
from empg_envs.deepsearch.pages import MemoryPages, cut_piece, read_key, write_key
from empg_envs.deepsearch.pages_ondisk import DiskPages
from empg_envs.deepsearch.passages import RetrieverError, read_corpus
from empg_envs.deepsearch.prompt import make_parser, make_prompts, phrases
from empg_jax.config import load_config
from empg_jax.learner.batching import make_batch
from empg_jax.retrieval.serve import open_server
from empg_jax.rollout.context import make_context
from empg_jax.run.assembly import make_batch_shape, make_language
from empg_jax.sft.demonstrations import record_demonstrations
from empg_jax.text.builtin import build_phrase_tokenizer
from empg_jax.text.chat import ChatRenderer
from tests.text.families import build_bpe

BROWSE = {"tools": ["search", "browse"]}
ROWS = [
    ("7", '"Oslo"\nOslo is the capital of Norway.'),
    ("8", '"Rome"\nRome lies in Italy.'),
    ("9", '"Oslo"\nIts fjord is long  and deep.'),
    ("10", '"Part #2"\nThe second part.'),
    ("11", '"Oslo"\nHarald founded it.'),
    ("12", '"Part"\nThe first part.'),
]
PAGE = "Oslo is the capital of Norway.\nIts fjord is long  and deep.\nHarald founded it."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browse")
    corpus, questions = folder / "corpus.jsonl", folder / "questions.jsonl"
    corpus.write_text("".join(json.dumps({"id": key, "contents": text}) + "\n" for key, text in ROWS))
    questions.write_text(json.dumps({"id": "q", "question": "Who founded it?", "golden_answers": ["Harald"]}))
    return {"questions": {"train": str(questions)}, "corpus": str(corpus), "retriever": "builtin"}


def start(files, **options):
    env = make_env("deepsearch", **{**files, **BROWSE, "max_turns": 20, **options})
    _, info = env.reset(split="train", index=0)
    assert info["tools"] == ["search", "browse", "answer"]
    return env


def inside(observation: str) -> str:
    return observation.strip().removeprefix("<information>").removesuffix("</information>")


def test_a_page_is_all_passages_of_a_title_in_pieces(files) -> None:
    env = start(files, snippet_words=2, piece_words=6, topk=1)
    assert "No result so far has that title" in env.step("<browse>Oslo</browse>")[0]  # guessing shows nothing
    assert inside(env.step("<search>fjord</search>")[0]) == "Doc 1(Title: Oslo) Its fjord"
    shown = [inside(env.step(f"<browse>Oslo{mark}</browse>")[0]) for mark in ("", " #2", "#3")]
    heads = [f"(Title: Oslo, piece {number} of 3) " for number in (1, 2, 3)]
    assert all(text.startswith(head) for text, head in zip(shown, heads, strict=True))
    pieces = [text.removeprefix(head) for text, head in zip(shown, heads, strict=True)]
    assert pieces == ["Oslo is the capital of Norway.", "Its fjord is long  and deep.", "Harald founded it."]
    for number in ("#4", "#0", "#999999"):
        assert "no piece of that number" in env.step(f"<browse>Oslo {number}</browse>")[0]
    _, reward, _, _, info = env.step("<answer>Harald</answer>")
    assert reward == 1.0 and (info["metrics"]["searches"], info["metrics"]["browses"]) == (1.0, 7.0)


def test_the_usual_pieces_and_snippets(files) -> None:
    env = start(files)
    assert "Oslo is the capital of Norway.\n" in env.step("<search>Oslo Rome</search>")[0]  # under 30 words
    assert inside(env.step("<browse>Oslo</browse>")[0]) == f"(Title: Oslo, piece 1 of 1) {PAGE}"
    assert "<browse>" not in env.step("<open>7</open>")[0]  # another tool's tag is no call
    assert env.step("<open>7</open>")[4]["metrics"]["opens"] == 0.0


def test_a_title_with_a_number_is_a_title(files) -> None:
    env = start(files)
    env.step("<search>second part</search>")
    assert "The second part." in env.step("<browse>Part #2</browse>")[0]
    assert "The first part." in env.step("<browse>Part</browse>")[0]


def test_browsing_takes_of_the_same_budget(files) -> None:
    env = start(files, tool_budget=2)
    env.step("<search>fjord</search>")
    env.step("<browse>Oslo</browse>")
    assert "used up" in env.step("<browse>Oslo</browse>")[0]


@pytest.mark.parametrize("engine", ["bm25s", "tantivy"])
def test_pages_on_disk_are_those_in_memory(files, tmp_path, engine, monkeypatch) -> None:
    pytest.importorskip(engine)
    options = {"retriever": engine, "retriever_options": {"index_dir": str(tmp_path)}}

    def read():
        env = start(files, **options)
        env.step("<search>fjord Rome</search>")
        return [env.step(f"<browse>{title}</browse>")[0] for title in ("Oslo", "Rome")]

    first = read()
    assert inside(first[0]) == f"(Title: Oslo, piece 1 of 1) {PAGE}" and "Rome lies in Italy." in first[1]
    from empg_envs.deepsearch import sources

    for kept in (sources._load_retriever, sources._load_pages):
        kept.cache_clear()
    monkeypatch.setattr(DiskPages, "_write", None)  # the next process only opens the list of titles
    assert read() == first


@pytest.fixture
def served(files):
    passages = read_corpus(files["corpus"])

    def serve(pages):
        return open_server(BuiltinBm25(passages), len(passages), pages=pages, port=0)

    yield serve, MemoryPages(passages)


def test_a_server_gives_the_same_pages_and_one_without_them_is_named(files, served) -> None:
    serve, pages = served
    for has_pages in (True, False):
        with serve(pages if has_pages else None) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            options = {"urls": server.url, "timeout": 60.0, "wait": 0.0, "attempts": 2}
            env = start({"questions": files["questions"]}, retriever="remote", retriever_options=options)
            env.step("<search>fjord</search>")
            if has_pages:
                found = env.step("<browse>Oslo</browse>")[0]
                assert inside(found) == f"(Title: Oslo, piece 1 of 1) {PAGE}"
            else:
                with pytest.raises(RetrieverError, match=r"2 requests failed; .*status 404.*no /pages"):
                    env.step("<browse>Oslo</browse>")
            env._source._retriever.close()
            server.shutdown()


@pytest.mark.parametrize("style", ["terse", "search_r1"])
@pytest.mark.parametrize("piece_words", [3, 7, None])
def test_the_expert_reads_on_by_what_it_has_seen(style, piece_words) -> None:
    options = {"style": style, "snippet_words": 2, "piece_words": piece_words, "max_turns": 60}
    for level in ("tiny", "hard"):
        env = make_env("deepsearch", level=level, **BROWSE, **options)
        browses = 0.0
        for index in range(6):
            _, info = env.reset(split="test", index=index)
            is_done, reward = False, 0.0
            while not is_done:
                action = env.expert_action()
                assert action.startswith("<answer>") or action in info["admissible"]
                _, reward, terminated, truncated, info = env.step(action)
                is_done = terminated or truncated
            assert reward == 1.0
            browses += info["metrics"]["browses"]
        assert browses > 6  # it is needed


@pytest.mark.parametrize("piece_words", [3, None])
def test_the_vocabulary_has_titles_pieces_and_tags(piece_words) -> None:
    options = {"level": "hard", **BROWSE, "snippet_words": 4, "piece_words": piece_words}
    tokenizer = build_phrase_tokenizer(phrases(**options))
    env = make_env("deepsearch", **options, max_turns=60)
    for index in range(5):
        said, is_done = [env.reset(split="test", index=index)[0]], False
        while not is_done:
            action = env.expert_action()
            observation, _, terminated, truncated, _ = env.step(action)
            said += [action, observation]
            is_done = terminated or truncated
        env.reset(split="test", index=index)
        said += [env.step(f"<browse>{name}</browse>")[0] for name in ("x", "anna reed #9")]
        for text in said:
            decoded = tokenizer.decode(tokenizer.encode(text))
            assert "<|unk|>" not in decoded and decoded.replace(" ", "") == text.replace(" ", "")


def test_a_configuration_trains_on_calls_that_browse() -> None:
    chosen = "env.options={level: tiny, style: terse, topk: 2, max_turns: 16, tools: [search, browse], "
    chosen += "snippet_words: 2, piece_words: 5}"
    limits = ["env.max_turns=16", "rollout.max_tokens=400", "train.micro_tokens=2400"]
    small = ["rollout.tasks_per_update=3", "rollout.group_size=4", "sft.noise=0.1"]
    config = load_config("deepsearch_tiny", [chosen, *limits, *small])
    language = make_language(config)
    episodes = record_demonstrations(config, language, 12)
    batch, _ = make_batch(episodes, make_batch_shape(config), seed=(0,))
    trained = np.asarray(batch.tokens)[np.asarray(batch.loss_mask)]
    text = language.tokenizer.decode(trained.tolist())
    assert "<browse>" in text and "#2 </browse>" in text and "<open>" not in text


def test_the_prompt_tells_of_the_tool_that_is_on_offer() -> None:
    for tools, tags in ((["search"], ()), (["search", "browse"], ("<browse>",))):
        options = {} if not tags else {"tools": tools}
        _, info = make_env("deepsearch", style="search_r1", **options).reset(split="test", index=0)
        text = make_prompts("search_r1").start("?", info)[0]["content"]
        assert ("<browse>" in text) == bool(tags) and "<open>" not in text
        for parser in ("search_r1", "verl_agent"):
            parsed = make_parser(parser)("<browse>Oslo</browse>", info)
            assert (parsed.action, parsed.is_valid) == (
                ("<browse>Oslo</browse>", True) if tags else ("", False)
            )


@pytest.mark.parametrize("kind", ["transcript", "window"])
def test_a_template_that_tells_tools_leaves_these_to_the_prompt(kind) -> None:
    renderer = ChatRenderer(build_bpe("chatml"))
    assert renderer.tells_tools
    env = make_env("deepsearch", style="search_r1", **BROWSE)
    observation, info = env.reset(split="test", index=0)
    context = make_context(kind, make_prompts("search_r1"), renderer, history=1)()
    told = renderer.tokenizer.decode(context.start(observation, info).tokens, skip_special=False)
    assert "<browse>its title</browse>" in told and "# Tools" not in told and '"search"' not in told
    observation, *_, info = env.step("<search>x</search>")
    delta = context.follow([renderer.end_id], "", True, "<search>x</search>", observation, info)
    assert "<tool_response>" not in renderer.tokenizer.decode(delta.tokens, skip_special=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tools": ["browse"]},
            r"tools is \['browse'\]; expected one of \[search\], \[search, open\], \[search",
        ),
        ({"tools": "search"}, "tools is 'search'"),
        ({"tools": ["search", "open"]}, "needs snippet_words"),
        ({"tools": ["search"], "snippet_words": 3}, "needs a tool that reads on"),
        ({"piece_words": 3}, r"piece_words has an effect with tools=\[search, browse\] only"),
        ({**BROWSE, "piece_words": 0}, "piece_words must be at least 1"),
    ],
)
def test_sets_of_tools_that_make_no_sense(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_env("deepsearch", **options)


def test_the_tools_of_today_by_name_are_those_of_today() -> None:
    for named, usual in (({"tools": ["search"]}, {}), ({"tools": ["search", "open"]}, {})):
        limits = {"snippet_words": 3} if "open" in named["tools"] else {}
        one, two = (make_env("deepsearch", **limits, **each) for each in (named, usual))
        assert one.reset(split="test", index=1) == two.reset(split="test", index=1)
        for _ in range(3):
            action = one.expert_action()
            assert action == two.expert_action() and one.step(action) == two.step(action)


def test_keys_and_pieces() -> None:
    assert read_key("Oslo") == ("Oslo", 1) and read_key("Oslo#12") == ("Oslo", 12)
    assert read_key("#2") == ("#2", 1) and read_key("a # b") == ("a # b", 1)
    assert [read_key(write_key("A b", number)) for number in (1, 2)] == [("A b", 1), ("A b", 2)]
    assert cut_piece("", 1, 5) == ("", 0, 1) and cut_piece("", 2, 5) is None
    assert cut_piece(" a b  c ", 1, 2) == ("a b", 4, 2) and cut_piece(" a b  c ", 2, 2) == ("c", 7, 2)
