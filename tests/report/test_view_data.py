"""What the viewer's page holds: pieces of text, chunks, columns, and what is packed anew."""

import gzip
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from empg_jax.report.view.packing import pack
from empg_jax.report.view.page import HERE, Book
from empg_jax.report.view.pieces import split_text


def _decode(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def test_a_character_over_several_tokens_appears_where_it_is_complete():
    tokens = list("aé!".encode())
    assert split_text(tokens, _decode) == ["a", "", "é", "!"]
    assert split_text(tokens[:2], _decode) == ["a", "\ufffd"]
    assert split_text([], _decode) == []


def test_bytes_that_never_become_a_character_do_not_hide_the_rest():
    pieces = split_text([0xFF] * 20 + list(b"end"), _decode)
    assert "".join(pieces).endswith("end") and len(pieces) == 23


def test_spaces_between_words_are_kept_where_the_tokenizer_sets_them():
    words = ["go", "to", "bed"]

    def decode(ids):
        return " ".join(words[index] for index in ids)

    assert split_text([0, 1, 2], decode) == ["go", " to", " bed"]


def test_the_time_grows_with_the_number_of_tokens_alone():
    decoded = []

    def decode(tokens):
        decoded.append(len(tokens))
        return _decode(tokens)

    assert "".join(split_text(list(b"x" * 4_000), decode)) == "x" * 4_000
    assert sum(decoded) < 20 * 4_000


def _episode(group, member, length):
    return {"group_id": group, "member": member, "turns": [{"observation": "", "response": "x" * length}]}


def test_the_members_of_a_group_lie_in_one_chunk():
    records = [_episode(group, member, 100_000) for member in (1, 0) for group in (2, 1, 0)]
    packed = pack("f", records)
    places = list(zip(*(packed.columns[name] for name in ("group", "member", "chunk", "slot")), strict=True))
    assert [place[:2] for place in places] == [(group, member) for group in range(3) for member in range(2)]
    assert {len({chunk for g, _, chunk, _ in places if g == group}) for group in range(3)} == {1}
    assert len(packed.chunks) == 2
    for group, _, chunk, slot in places:
        episode = json.loads(gzip.decompress(packed.chunks[chunk]))[slot]
        assert len(episode["turns"][0]["response"]) == 100_000, group


def test_halves_of_surrogates_and_numbers_that_are_none_do_no_harm():
    turn = {"observation": "\ud800", "response": "ok", "entropy": float("nan"), "token_ids": [1, "x"]}
    packed = pack("f", [{"turns": [turn], "return": float("inf"), "success": 1}], decode=_decode)
    (episode,) = json.loads(gzip.decompress(packed.chunks["f.0"]))
    assert "entropy" not in episode["turns"][0] and "pieces" not in episode["turns"][0]
    assert packed.columns["return"] == [None] and packed.columns["success"] == [None]


def test_only_files_that_changed_are_packed_anew(tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for update in (1, 2):
        (folder / f"update-{update:06d}.jsonl").write_text(json.dumps(_episode(0, update, 9)) + "\n")
    book = Book(tmp_path)
    before, state = book.refresh(), book.state()
    assert book.state() == state and book.refresh()[0] is before[0]
    time.sleep(0.01)
    (folder / "update-000002.jsonl").write_text(json.dumps(_episode(0, 2, 99)) + "\n")
    after = book.refresh()
    assert after[0] is before[0] and after[1] is not before[1] and book.state() != state
    (folder / "update-000001.jsonl").unlink()  # a resumed run drops what it will repeat
    assert len(book.refresh()) == 1 and len(book.head()["columns"]["update"]) == 1


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_curves_of_a_long_run_are_drawn_in_few_points():
    """All updates have episodes, and one value is high: it is the end of the axis."""
    program = Path(__file__).with_name("long_curves.js")
    words = ["node", program, HERE / "curves.js", "150000"]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert found["highest"] == 9
    assert found["points"] == found["circle"] == 600
