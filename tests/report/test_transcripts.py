"""Transcripts and the viewer: every token shown once, nothing of the text taken for markup."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from empg_jax.report.transcripts import select_samples, write_transcripts
from empg_jax.report.viewer import split_text, write_viewer
from empg_jax.types import Outcome, Status, Trajectory, Turn


def _decode(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def _turn(response="go <b>", observation="You see a box & a <script>alert(1)</script>.", **changes):
    tokens = np.frombuffer(response.encode(), dtype=np.uint8).astype(np.int32)
    values = {
        "prompt_tokens": np.frombuffer(b"prompt", dtype=np.uint8).astype(np.int32),
        "response_tokens": tokens,
        "behavior_logprobs": np.full(len(tokens), -0.5, np.float32),
        "entropies": np.linspace(0.0, 2.0, len(tokens), dtype=np.float32),
        "reward": 0.0,
        "version": 0,
        "anchor": 1,
        "is_valid": True,
        "finish_reason": "stop",
        "observation": observation,
        "response": response,
    }
    return Turn(**(values | changes))


def _trajectory(task=0, is_success=True, turns=None, detail=""):
    return Trajectory(
        task=task,
        split="test",
        group_id=task,
        member=0,
        turns=(_turn(), _turn(reward=1.0, is_valid=False, finish_reason="length"))
        if turns is None
        else turns,
        outcome=Outcome(Status.TRAINED, "won" if is_success else "turn_limit", detail),
        episode_return=1.0,
        is_success=is_success,
        terminated=is_success,
        truncated=not is_success,
    )


def test_samples_are_half_solved_half_not():
    panel = [_trajectory(task, is_success=task in (0, 1, 2, 3, 6)) for task in range(8)]
    panel.append(_trajectory(8, turns=()))
    assert [sample.task for sample in select_samples(panel, 4)] == [0, 1, 4, 5]
    assert [sample.task for sample in select_samples(panel[:4], 3)] == [0, 1, 2]
    assert [sample.task for sample in select_samples(panel[4:6], 3)] == [4, 5]
    assert len(select_samples(panel, 99)) == 8 and select_samples(panel, 0) == []


def test_a_transcript_tells_the_episode(tmp_path):
    text = write_transcripts(tmp_path / "transcripts.txt", [_trajectory()]).read_text()
    assert "test task 0, attempt 0: solved, won, return 1, 2 turns, 12 tokens" in text
    assert "  > go <b>    [turn 1, entropy 1.00]" in text
    assert "[turn 2, entropy 1.00, reward 1, no valid action, cut at the length limit]" in text


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tokens, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        if tag not in ("meta", "input"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "span" and "title" in self.open[-1][1]:
            self.tokens.append((data, self.open[-1][1]))


def _read(path):
    reader = _Reader()
    reader.feed(path.read_text())
    assert reader.open == [] and reader.scripts == 0
    return reader


def test_the_viewer_shows_every_token_once_in_its_color(tmp_path):
    trajectory = _trajectory(turns=(_turn("go <b>"),))
    advantages = [[np.array([1.0, 0.5, 0.0, -0.5, -1.0, -2.0], np.float32)]]
    reader = _read(write_viewer(tmp_path / "v.html", [trajectory], _decode, advantages=advantages))
    assert "".join(text for text, _ in reader.tokens) == "go <b>"
    assert reader.tokens[0][1]["style"] == "--e:0.00;--p:0.50;--n:0.00"
    assert reader.tokens[-1][1]["style"] == "--e:1.00;--p:0.00;--n:1.00"
    assert reader.tokens[-1][1]["title"] == "entropy 2.000, log-prob -0.500, advantage -2.000"


def test_the_page_stands_alone(tmp_path):
    page = write_viewer(tmp_path / "v.html", [_trajectory(), _trajectory(1, False)], _decode, title="A & B")
    text = page.read_text()
    assert "<h1>A &amp; B</h1>" in text and not re.search(r"https?://|<link|src=", text)
    assert 'type="radio"' not in text  # without advantages there is nothing to choose
    _read(page)


def test_advantages_must_fit_the_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"lengths \[\[3\]\]"):
        write_viewer(tmp_path / "v.html", [_trajectory()], _decode, advantages=[[np.zeros(3)]])


def test_nothing_to_show_is_an_empty_page(tmp_path):
    _read(write_viewer(tmp_path / "v.html", [], _decode))


def test_a_character_over_several_tokens_appears_where_it_is_complete():
    tokens = list("aé!".encode())
    assert split_text(tokens, _decode) == ["a", "", "é", "!"]
    assert split_text(tokens[:2], _decode) == ["a", "\ufffd"]
