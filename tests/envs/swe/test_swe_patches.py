"""Patches: what `diff` writes, `apply` and git read."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_envs.swe import patches
from empg_envs.swe.patches import PatchError, apply, diff, parse, render, touched
from empg_envs.swe.tree import EXECUTABLE, LINK, File, Tree, content_hash, pack, read_archive

LINES = st.lists(
    st.sampled_from(["a\n", "b\n", "c\n", "  d\n", "\n", "-- x\n", "é\f\n", "\\ No\r\n"]), max_size=12
)
TEXTS = st.builds(lambda lines, end: "".join(lines) + end, LINES, st.sampled_from(["", "end", "+++ b/x"]))
TREES = st.dictionaries(
    st.sampled_from(["a.py", "d/b.py", "d/with space.txt", "é.py", "z"]),
    st.builds(lambda text, mode: File(text.encode(), mode), TEXTS, st.sampled_from([0o100644, EXECUTABLE])),
    max_size=4,
)

GOLDEN = """\
diff --git a/m.py b/m.py
--- a/m.py
+++ b/m.py
@@ -1,5 +1,5 @@
 one
 two
-three
+THREE
 four
 five
"""


def tree(**texts: str) -> Tree:
    return {name.replace("__", "/") + ".py": File(text.encode()) for name, text in texts.items()}


def test_golden() -> None:
    old, new = tree(m="one\ntwo\nthree\nfour\nfive\n"), tree(m="one\ntwo\nTHREE\nfour\nfive\n")
    assert diff(old, new) == (GOLDEN, [])
    assert apply(old, GOLDEN) == new
    assert touched(GOLDEN) == {"m.py"}


@settings(max_examples=150, deadline=None)
@given(old=TREES, new=TREES)
def test_apply_inverts_diff(old: Tree, new: Tree) -> None:
    patch, left_out = diff(old, new)
    assert left_out == []
    assert apply(old, patch) == dict(sorted(new.items()))
    assert (patch == "") == (dict(old) == dict(new))


@settings(max_examples=60, deadline=None)
@given(old=TREES, new=TREES)
def test_large_stretches_are_replaced_and_still_apply(old: Tree, new: Tree) -> None:
    limit, patches.MAX_PAIRS = patches.MAX_PAIRS, 0
    try:
        assert apply(old, diff(old, new)[0]) == dict(sorted(new.items()))
    finally:
        patches.MAX_PAIRS = limit


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200), patch=st.sampled_from(["", GOLDEN, "--- a/m.py\n+++ b/m.py\n"]))
def test_any_text_applies_or_is_a_patch_error(text: str, patch: str) -> None:
    with contextlib.suppress(PatchError):
        apply(tree(m="one\ntwo\nthree\n"), patch + text)


@settings(max_examples=100, deadline=None)
@given(old=TREES, new=TREES)
def test_what_is_read_is_all_that_is_rendered(old: Tree, new: Tree) -> None:
    patch, _ = diff(old, new)
    assert apply(old, render(patch)) == dict(sorted(new.items()))
    junk = f"From: x\n{patch}1d\n< x\n0a\nx\n.\n"
    assert not patch or render(junk) == render(patch) == render(render(patch))


def test_quoted_names_are_read() -> None:
    quoted = GOLDEN.replace("a/m.py", '"a/\\303\\251 m.py"').replace("b/m.py", '"b/\\303\\251 m.py"')
    assert touched(quoted) == {"é m.py"}
    assert "+++ b/é m.py\t\n" in render(quoted)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_agrees(tmp_path: Path) -> None:
    old = {
        "a.py": File(b"x\n" * 30 + b"end"),
        "gone.py": File(b"1\n"),
        "run.sh": File(b"echo\n"),
        "e": File(b""),
    }
    new = {
        "a.py": File(b"y\n" + b"x\n" * 20 + b"z\n" + b"x\n" * 9 + b"end\n"),
        "new dir/b.py": File(b"2\n"),
        "run.sh": File(b"echo\n", EXECUTABLE),
        "empty": File(b""),
    }
    for path, file in old.items():
        (tmp_path / path).write_bytes(file.data)
    assert render(diff(old, new)[0]).count("diff --git") == 6
    (tmp_path / "p").write_text(render(diff(old, new)[0]))
    subprocess.run(["git", "apply", "p"], cwd=tmp_path, check=True, capture_output=True)
    for path, file in new.items():
        assert (tmp_path / path).read_bytes() == file.data
        assert bool((tmp_path / path).stat().st_mode & 0o100) == (file.mode == EXECUTABLE)
    assert not (tmp_path / "gone.py").exists() and not (tmp_path / "e").exists()


def test_a_hunk_that_moved_is_found_by_its_context() -> None:
    old = tree(m="new\n" * 7 + "one\ntwo\nthree\nfour\nfive\n")
    assert apply(old, GOLDEN)["m.py"].data == b"new\n" * 7 + b"one\ntwo\nTHREE\nfour\nfive\n"


def test_renames_and_deletions_of_git() -> None:
    renamed = "diff --git a/m.py b/n.py\nsimilarity index 100%\nrename from m.py\nrename to n.py\n"
    assert apply(tree(m="x\n"), renamed) == tree(n="x\n")
    removed = (
        "diff --git a/m.py b/m.py\ndeleted file mode 100644\n--- a/m.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"
    )
    assert apply(tree(m="x\n"), removed) == {}


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (GOLDEN.replace("one", "ONE"), r"m\.py: hunk 1 does not fit"),
        (GOLDEN.replace("m.py", "n.py"), r"n\.py: no such file"),
        (GOLDEN[:-12], "ends inside a hunk"),
        (GOLDEN.replace("b/m.py", "b/../m.py"), "not a plain relative path"),
        (GOLDEN.replace("a/m.py", "/etc/passwd/../.."), "not a plain relative path"),
        (GOLDEN.replace("@@ -1,5 +1,5 @@", "@@ nonsense"), "malformed hunk"),
        ("@@ -1 +1 @@\n-a\n+b\n", "without file names"),
        ("hello", "holds no patch"),
        ("diff --git a/m.py b/m.py\nGIT binary patch\n", "binary"),
        ("diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc\n", "links"),
        ("--- /dev/null\n+++ b/m.py\n@@ -0,0 +1 @@\n+x\n", "already exists"),
        (GOLDEN + "*** a/x\n--- b/x\n", "only unified diffs"),
        (GOLDEN + "Index: x\n", "only unified diffs"),
        (GOLDEN.replace("b/m.py", '"b/m\\9.py"'), "cannot be decoded"),
        (GOLDEN.replace("b/m.py", '"b/\\377.py"'), "cannot be decoded"),
        (GOLDEN.replace("b/m.py", "b/m.py "), "is not accepted"),
        (GOLDEN.replace("1,5", "1" * 5000), "malformed hunk"),
        (GOLDEN.replace("-1,5", "-\N{ARABIC-INDIC DIGIT ONE},5"), "malformed hunk"),
    ],
)
def test_what_does_not_fit_is_named(patch: str, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        apply(tree(m="one\ntwo\nthree\nfour\nfive\n"), patch)


def test_what_no_patch_can_hold_is_left_out_and_named() -> None:
    new = {"b": File(b"\0"), "l": File(b"/etc", LINK), "u": File(b"\xff"), "t.py": File(b"x\n")}
    new["large.py"] = File(b"\n" * (patches.MAX_TEXT + 1))
    new |= dict.fromkeys([" in", "out ", 'a"b', "no-break\xa0"], File(b"x\n"))
    patch, left_out = diff({}, new)
    assert left_out == [" in", 'a"b', "b", "l", "large.py", "no-break\xa0", "out ", "u"]
    assert touched(patch) == {"t.py"}


def test_trees_survive_packing_and_hash_by_content() -> None:
    files = {"a/b.py": File(b"x"), "run": File(b"#!", EXECUTABLE), "l": File(b"a/b.py", LINK)}
    files = dict(sorted(files.items()))
    assert pack(files) == pack(dict(reversed(files.items())))
    assert read_archive(pack(files)) == files
    hashes = {
        content_hash(files),
        content_hash({**files, "run": File(b"#!")}),
        content_hash({"a": File(b"x")}),
    }
    assert len(hashes) == 3
    assert parse("") == []
