"""Chat files as examples: what is kept, held out, cut, counted and refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.sft.chat_data import ChatDataError, epoch_batch, load_chat_data
from empg_jax.sft.examples import gather_examples
from empg_jax.text import ChatRenderer
from empg_jax.text.chatfile import parse_conversation
from empg_jax.text.rows import tokenize_conversation
from tests.text.families import build_bpe

THOUGHT = "<think>\nhm\n</think>\n\ngo"


@pytest.fixture(scope="module")
def renderer():
    return ChatRenderer(build_bpe("chatml"))


def record(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def write(path, records):
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


def load(path, renderer, **options):
    return load_chat_data([path], renderer, **{"max_tokens": 200} | options)


def rows_of(corpus):
    """(tokens, mask) per row, from the flat arrays."""
    return [
        (corpus.tokens[a:b].tolist(), corpus.loss_mask[a:b].tolist())
        for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    ]


MANY = [record(f"task {i}", f"go {i}", "then?", f"stop {i}") for i in range(60)]


@pytest.mark.parametrize(("family", "count"), [("chatml", 3), ("thinking", 6)])
def test_flat_arrays_hold_what_was_tokenized(family, count, tmp_path):
    renderer = ChatRenderer(build_bpe(family))
    records = [record("a", "b"), record("a", THOUGHT, "c", "d", "e", "f"), record("a", "b", "c", "d", "tail")]
    data = load(write(tmp_path / "chat.jsonl", records), renderer)
    rows = [row for r in records for row in tokenize_conversation(renderer, parse_conversation(r))]
    assert len(rows) == count  # reasoning is not kept in history
    assert rows_of(data.train) == [(row.tokens, row.loss_mask) for row in rows]
    assert (data.train.tokens.dtype, data.train.loss_mask.dtype) == (np.int32, np.bool_)
    assert (data.conversations, len(data.held_out), data.too_long, data.unknown) == (3, 0, 0, 0)
    assert data.train.max_turns == (3 if family == "chatml" else 1)


def test_a_row_given_out_as_a_trajectory_is_the_same_row(renderer, tmp_path):
    data = load(write(tmp_path / "chat.jsonl", MANY), renderer)
    assert len(data.train) == len(list(data.train)) == 60
    for index, (tokens, mask) in enumerate(rows_of(data.train)):
        trajectory = data.train[index]
        last = trajectory.turns[-1]
        assert np.concatenate([last.prompt_tokens, last.response_tokens]).tolist() == tokens
        found = np.zeros(len(tokens), bool)
        for turn in trajectory.turns:
            assert turn.prompt_tokens.tolist() == tokens[: len(turn.prompt_tokens)]
            found[len(turn.prompt_tokens) :][: len(turn.response_tokens)] = True
        assert found.tolist() == mask and trajectory.outcome.is_trained
    with pytest.raises(IndexError):
        data.train[60]


def test_only_the_last_answer_on_request(renderer, tmp_path):
    path = write(tmp_path / "chat.jsonl", MANY[:1])
    whole, last = (load(path, renderer, loss_on=kind).train for kind in ("all", "last"))
    assert len(whole[0].turns) == 2 and len(last[0].turns) == 1
    assert last.tokens.tolist() == whole.tokens.tolist()
    assert last[0].turns[0].response_tokens.tolist() == whole[0].turns[1].response_tokens.tolist()


def test_the_held_out_part_depends_on_content_alone(renderer, tmp_path):
    def texts(corpus):
        return {tuple(tokens) for tokens, _ in rows_of(corpus)}

    data = load(write(tmp_path / "a.jsonl", MANY), renderer, holdout=0.25)
    turned = load(write(tmp_path / "b.jsonl", [*MANY[::-1], *MANY]), renderer, holdout=0.25)
    assert texts(data.train) == texts(turned.train) and texts(data.held_out) == texts(turned.held_out)
    assert not texts(data.train) & texts(data.held_out)
    assert 5 <= data.held_out_conversations == len(data.held_out) <= 25
    assert data.held_out_conversations + len(data.train) == 60
    fewer = load(tmp_path / "a.jsonl", renderer, holdout=0.1)
    assert texts(fewer.held_out) < texts(data.held_out)  # a smaller share is a part of a larger one
    assert fewer.train.fingerprint != data.train.fingerprint
    assert load(tmp_path / "a.jsonl", renderer, holdout=0.25).train.fingerprint == data.train.fingerprint


def test_what_is_too_long_is_left_out_or_cut_and_counted(renderer, tmp_path):
    path = write(
        tmp_path / "chat.jsonl", [record("a", "b"), record("a", "b", "c", "x " * 99), record("y " * 99, "b")]
    )
    whole = rows_of(load(path, renderer, max_tokens=2000).train)
    skipped = load(path, renderer, max_tokens=60)
    assert rows_of(skipped.train) == whole[:1] and skipped.too_long == 2
    cut = load(path, renderer, max_tokens=60, too_long="truncate")
    # The third has no answer within the limit, so that nothing of it could be learned.
    assert rows_of(cut.train) == [whole[0], (whole[1][0][:60], whole[1][1][:60])] and cut.too_long == 2
    # The answer's end is beyond the limit: its beginning alone is learned.
    assert whole[1][1][59] and len(cut.train[1].turns) == 2
    assert "2 rows longer than rollout.max_tokens=60 left out (sft.too_long=truncate" in (
        skipped.describe(60, "skip")
    )
    assert "rollout.max_tokens=60 cut" in cut.describe(60, "truncate")
    short = load(path, renderer, max_tokens=len(whole[0][0]) + 1, too_long="truncate")
    assert rows_of(short.train)[1][1][-1]  # a cut between two answers ends with the first


def test_unknown_words_are_counted(tmp_path):
    from empg_jax.text import build_phrase_tokenizer

    renderer = ChatRenderer(build_phrase_tokenizer(["go"]))
    data = load(write(tmp_path / "chat.jsonl", [record("zork zork", "go zork")]), renderer)
    assert data.unknown == 3 and "3 tokens are unknown" in data.describe(200, "skip")


def test_all_bad_lines_are_counted_and_ten_are_told(renderer, tmp_path):
    bad = [record("a"), {"text": "b"}, *[record("a", "b<|im_end|>")] * 12]
    first = write(tmp_path / "first.jsonl", [record("a", "b"), *bad])
    second = tmp_path / "second.jsonl"
    second.write_text("{\n")
    with pytest.raises(ChatDataError) as caught:
        load_chat_data([first, second], renderer, max_tokens=200)
    lines = str(caught.value).splitlines()
    assert lines[0] == "sft.data: 15 lines are no conversations:"
    assert lines[1] == f"  {first}, line 2: has no message of the assistant to learn from"
    assert lines[2].startswith(f"  {first}, line 3: has neither messages nor")
    assert lines[10] == f"  {first}, line 11: message 1 holds the control token <|im_end|>, which ends a turn"
    assert lines[11:] == ["  and 5 more"]
    with pytest.raises(ChatDataError, match=r"1 line is no conversation:\n  .*second\.jsonl, line 1: is not"):
        load(second, renderer)


def test_what_the_template_refuses_is_a_bad_line(tmp_path):
    path = write(
        tmp_path / "chat.jsonl",
        [
            {
                "messages": [*record("a", "b")["messages"], {"role": "tool", "content": "c"}]
                + record("x", "y")["messages"]
            }
        ],
    )
    with pytest.raises(ChatDataError, match=r"line 1: the chat template refused a conversation with roles"):
        load(path, ChatRenderer(build_bpe("brackets")))


def test_nothing_to_learn_from_is_said(renderer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ChatDataError, match=r"chat\.jsonl holds no conversation"):
        load(path, renderer)
    write(path, MANY[:3])
    with pytest.raises(ChatDataError, match=r"none of the 3 conversations .* fits rollout\.max_tokens=4"):
        load(path, renderer, max_tokens=4)
    with pytest.raises(ChatDataError, match=r"all 3 conversations .* are held out: lower sft\.holdout"):
        load(path, renderer, holdout=0.999999)


def test_every_example_comes_once_per_epoch():
    count, size = 10, 4
    drawn = [index for update in range(10) for index in epoch_batch(count, size, 3, update)]
    epochs = [drawn[start : start + count] for start in range(0, 40, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # another order each time
    assert epoch_batch(count, size, 4, 0) != epoch_batch(count, size, 3, 0)
    assert sorted(epoch_batch(3, 8, 0, 5)) == [0, 1, 2]


def test_a_batch_larger_than_the_data_is_the_data(tmp_path, renderer):
    said = []
    progress = SimpleNamespace(phase=no_op, advance=no_op, close=no_op, message=said.append)
    data = write(tmp_path / "chat.jsonl", MANY[:6])
    keys = [f"sft.data={data}", "sft.updates=3", "sft.batch_size=64", "sft.holdout=0"]
    language = SimpleNamespace(renderer=renderer)
    examples = gather_examples(load_config("quickstart", keys), language, progress)
    assert len(examples.draw(0)) == len(examples.train) == 6
    assert said[0].endswith("; 3 updates of 6 are 3 epochs")


def no_op(*args):
    """Do nothing."""


def test_files_are_named_one_or_several(tmp_path):
    one, two = (
        load_config("quickstart", [f"sft.data={value}"]) for value in ("a.jsonl", "[a.jsonl, b.jsonl]")
    )
    assert (one.sft.data, two.sft.data) == (("a.jsonl",), ("a.jsonl", "b.jsonl"))
    (tmp_path / "run.yaml").write_text(two.to_yaml())
    assert load_config(tmp_path / "run.yaml") == two
    with pytest.raises(ConfigError, match=r"sft\.data=\[\] names no file"):
        load_config("quickstart", ["sft.data=[]"])
    with pytest.raises(ConfigError, match=r"sft\.data=a has no effect with sft\.updates=0"):
        load_config("quickstart", ["sft.data=a", "sft.updates=0"])
    with pytest.raises(ConfigError, match=r"sft\.data=3: must be"):
        load_config("quickstart", ["sft.data=3"])


def test_the_config_of_a_warm_start_alone_can_be_loaded_again():
    assert load_config("quickstart", ["train.updates=0"]).train.warmup_updates == 3
    with pytest.raises(ConfigError, match=r"train\.warmup_updates=3 exceeds train\.updates=2"):
        load_config("quickstart", ["train.updates=2"])
