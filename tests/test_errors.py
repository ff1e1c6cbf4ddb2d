"""Errors in one line."""

from empg_jax.errors import first_line


def test_a_foreign_message_is_told_by_its_first_line_and_cut_short():
    assert first_line(ValueError("no such file\nin the folder")) == "ValueError: no such file"
    assert first_line(KeyError()) == "KeyError: no message"
    long = first_line(ValueError("shapes " * 3000))
    assert long.startswith("ValueError: shapes shapes ") and long.endswith("...") and len(long) < 330
