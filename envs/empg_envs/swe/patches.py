"""Computation and application of patches in git's format, without git.

A patch is applied exactly, as by ``git apply``: its context must match line by line, at the stated place or
at the nearest matching place. Every path must be inside of the tree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from empg_envs.swe.quoted import can_be_named, read_name
from empg_envs.swe.tree import EXECUTABLE, LINK, PLAIN, File, Tree

CONTEXT = 3
# A changed run with more pairs of lines is replaced as a whole. The smallest difference takes quadratic time,
# and an agent could write files for which this never ends.
MAX_PAIRS = 250_000
MAX_TEXT = 1 << 20  # largest size in bytes of a file in a patch
_HUNK = re.compile(r"@@ -([0-9]{1,9})(?:,([0-9]{1,9}))? \+([0-9]{1,9})(?:,([0-9]{1,9}))? @@")
_NO_NEWLINE = "\\ No newline at end of file"


class PatchError(ValueError):
    """A patch that is malformed or does not match the tree."""


class Change(NamedTuple):
    """A replacement of the lines ``old[start:end]`` by ``new[begin:finish]``."""

    start: int
    end: int
    begin: int
    finish: int


@dataclasses.dataclass
class Hunk:
    """One hunk of a patch: the expected lines and the new lines, and its text."""

    start: int
    text: list[str] = dataclasses.field(default_factory=list)
    old: list[str] = dataclasses.field(default_factory=list)
    new: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Section:
    """The part of a patch about one file; a missing name means that the file does not exist."""

    old: str | None = None
    new: str | None = None
    mode: int | None = None
    is_rename: bool = False
    hunks: list[Hunk] = dataclasses.field(default_factory=list)


def diff(old: Tree, new: Tree) -> tuple[str, list[str]]:
    """Compute the patch from one tree to another.

    Returns:
      The patch, and the changed paths that it cannot contain: links, files that are not UTF-8 text, files
      larger than `MAX_TEXT`, and names that `parse` refuses.
    """
    parts, left_out = [], []
    for path in sorted(old.keys() | new.keys()):
        before, after = old.get(path), new.get(path)
        if before == after:
            continue
        lines = [_lines(file) for file in (before, after)]
        if lines[0] is None or lines[1] is None or not can_be_named(path):
            left_out.append(path)
            continue
        parts.append(_section(path, before, after, lines[0], lines[1]))
    return "".join(parts), left_out


def apply(tree: Tree, patch: str) -> Tree:
    """Apply a patch to a tree and return the new tree.

    Raises:
      PatchError: the patch does not match; the message names the file and the place.
    """
    result = dict(tree)
    for section in parse(patch):
        _apply_section(result, section)
    return dict(sorted(result.items()))


def parse(patch: str, *, is_trusted: bool = False) -> list[Section]:
    """Parse a patch with git's extended headers or plain ``---``/``+++`` pairs.

    Args:
      patch: the patch.
      is_trusted: whether binary changes, copies and links may be among it, of which only the names are read.

    Raises:
      PatchError: the text is no patch or is cut off, contains binary changes, is in part of another form,
        or names a path outside.
    """
    sections: list[Section] = []
    lines = patch.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    place, has_names = 0, False
    while place < len(lines):
        line = lines[place]
        if line.startswith("diff --git "):
            sections.append(_git_names(line))
            has_names = False
        elif line.startswith("--- ") and place + 1 < len(lines) and lines[place + 1].startswith("+++ "):
            if not sections or has_names or sections[-1].hunks:
                sections.append(Section())
            sections[-1].old, sections[-1].new = _name(line[4:]), _name(lines[place + 1][4:])
            has_names = True
            place += 1
        elif line.startswith("@@ "):
            if not sections or not has_names:
                raise PatchError(f"line {place + 1}: a hunk without file names before it")
            hunk, place = _hunk(lines, place)
            sections[-1].hunks.append(hunk)
            continue
        elif line.startswith(("*** ", "Index: ")):  # other programs would read more out of them
            raise PatchError(f"line {place + 1}: only unified diffs are accepted")
        elif sections:
            with contextlib.suppress(*(PatchError,) * is_trusted):
                _extended(sections[-1], line)
        place += 1
    if patch.strip() and not sections:
        raise PatchError("the text holds no patch")
    return sections


def touched(patch: str, *, is_trusted: bool = False) -> set[str]:
    """Return the paths in a patch; see `parse`."""
    sections = parse(patch, is_trusted=is_trusted)
    return {path for section in sections for path in (section.old, section.new) if path is not None}


def render(patch: str, without: Container[str] = ()) -> str:
    """Return a patch in git's form with nothing in it but what `parse` reads.

    Programs that apply patches understand more than that: context diffs, scripts of ``ed``, other headers.

    Args:
      patch: the patch.
      without: paths whose changes are left out.

    Raises:
      PatchError: the patch cannot be parsed, or is not text.
    """
    kept = (part for part in parse(patch) if part.old not in without and part.new not in without)
    text = "".join(map(_rendered, kept))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PatchError("the patch is not UTF-8 text") from None
    return text


def _rendered(section: Section) -> str:
    old, new = section.old, section.new
    if old is None and new is None:
        raise PatchError("a section names no file")
    head = [f"diff --git a/{old or new} b/{new or old}\n"]
    if old is None:
        head.append(f"new file mode {section.mode or PLAIN:o}\n")
    elif new is None:
        head.append(f"deleted file mode {PLAIN:o}\n")
    else:
        if section.mode is not None:
            other = PLAIN if section.mode == EXECUTABLE else EXECUTABLE
            head += [f"old mode {other:o}\n", f"new mode {section.mode:o}\n"]
        if section.is_rename:
            head += [f"rename from {old}\n", f"rename to {new}\n"]
        elif old != new:
            head = []  # two names for one file, of which the program takes the one that exists
    if section.hunks:
        head += _names(old, new)
    text = "".join([*head, *(line for hunk in section.hunks for line in hunk.text)])
    return text if len(head) > 1 else ""


def _names(old: str | None, new: str | None) -> list[str]:
    """Return the lines with the names; a tab ends a name with a space in it."""
    return [
        f"{mark} /dev/null\n" if path is None else f"{mark} {side}/{path}{chr(9) * (' ' in path)}\n"
        for mark, side, path in (("---", "a", old), ("+++", "b", new))
    ]


def _lines(file: File | None) -> list[str] | None:
    """Return lines with their line ends, or None for a file that a text patch cannot contain."""
    if file is None:
        return []
    if file.mode == LINK or b"\0" in file.data or len(file.data) > MAX_TEXT:
        return None
    try:
        text = file.data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return _split(text)


def _split(text: str) -> list[str]:
    # Not splitlines(), which also splits at form feeds and similar characters; patches do not.
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def _section(path: str, before: File | None, after: File | None, old: list[str], new: list[str]) -> str:
    head = [f"diff --git a/{path} b/{path}\n"]
    if before is None:
        assert after is not None
        head.append(f"new file mode {after.mode:o}\n")
    elif after is None:
        head.append(f"deleted file mode {before.mode:o}\n")
    elif before.mode != after.mode:
        head += [f"old mode {before.mode:o}\n", f"new mode {after.mode:o}\n"]
    if old == new:
        return "".join(head)
    names = _names(None if before is None else path, None if after is None else path)
    return "".join([*head, *names, *_hunks(old, new)])


def _changes(old: list[str], new: list[str]) -> list[Change]:
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    middle_old, middle_new = old[first : len(old) - last], new[first : len(new) - last]
    if len(middle_old) * len(middle_new) > MAX_PAIRS:
        return [Change(first, len(old) - last, first, len(new) - last)]
    matcher = difflib.SequenceMatcher(None, middle_old, middle_new, autojunk=False)
    return [
        Change(start + first, end + first, begin + first, finish + first)
        for tag, start, end, begin, finish in matcher.get_opcodes()
        if tag != "equal"
    ]


def _hunks(old: list[str], new: list[str]) -> Iterator[str]:
    groups: list[list[Change]] = []
    for change in _changes(old, new):
        if groups and change.start - groups[-1][-1].end <= 2 * CONTEXT:
            groups[-1].append(change)
        else:
            groups.append([change])
    for group in groups:
        first, last = group[0], group[-1]
        before = min(CONTEXT, first.start)
        after = min(CONTEXT, len(old) - last.end)
        spans = (
            _span(first.start - before, last.end + after),
            _span(first.begin - before, last.finish + after),
        )
        yield f"@@ -{spans[0]} +{spans[1]} @@\n"
        place = first.start - before
        for change in group:
            yield from (_line(" ", line) for line in old[place : change.start])
            yield from (_line("-", line) for line in old[change.start : change.end])
            yield from (_line("+", line) for line in new[change.begin : change.finish])
            place = change.end
        yield from (_line(" ", line) for line in old[place : place + after])


def _span(start: int, end: int) -> str:
    # In git's format an empty range has the number of the line before it.
    return f"{start + 1 if end > start else start},{end - start}"


def _line(mark: str, line: str) -> str:
    return mark + (line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}\n")


def _git_names(line: str) -> Section:
    """Parse the names in ``diff --git a/X b/X``; mode changes and empty files have no other names."""
    names = line[len("diff --git ") :]
    half = len(names) // 2
    if (
        names[half : half + 1] == " "
        and names[:half].partition("/")[2] == names[half + 1 :].partition("/")[2]
    ):
        name = _name(names[:half])
        return Section(name, name)
    return Section()


def _extended(section: Section, line: str) -> None:
    key, _, value = line.rpartition(" ")
    if key in ("new file mode", "new mode"):
        section.mode = EXECUTABLE if value.endswith("755") else PLAIN
        if value == "120000":
            raise PatchError(f"{section.new}: symbolic links are not accepted")
        if key == "new file mode":
            section.old = None
    elif key == "deleted file mode":
        section.new = None
    elif line.startswith(("rename from ", "copy from ")):
        section.old, section.is_rename = _name(line.partition(" from ")[2], has_prefix=False), True
        if line.startswith("copy"):
            raise PatchError(f"{section.old}: copies are not accepted")
    elif line.startswith(("rename to ", "copy to ")):
        section.new, section.is_rename = _name(line.partition(" to ")[2], has_prefix=False), True
    elif line.startswith(("GIT binary patch", "Binary files ")):
        raise PatchError(f"{section.new or section.old}: binary changes are not accepted")


def _name(text: str, *, has_prefix: bool = True) -> str | None:
    try:
        return read_name(text, has_prefix=has_prefix)
    except ValueError as error:
        raise PatchError(str(error)) from None


def _hunk(lines: Sequence[str], place: int) -> tuple[Hunk, int]:
    match = _HUNK.match(lines[place])
    if match is None:
        raise PatchError(f"line {place + 1}: malformed hunk header {lines[place][:60]!r}")
    start, olds, _, news = (1 if group is None else int(group) for group in match.groups())
    hunk, place = Hunk(start if olds else start + 1, [match[0] + "\n"]), place + 1
    marked = ""
    while len(hunk.old) < olds or len(hunk.new) < news or lines[place : place + 1] == [_NO_NEWLINE]:
        if place >= len(lines):
            raise PatchError("the patch ends inside a hunk")
        mark, line = lines[place][:1] or " ", lines[place][1:]
        hunk.text.append(f"{_NO_NEWLINE if mark == chr(92) else mark + line}\n")
        if mark == "\\":
            for side in {" ": (hunk.old, hunk.new), "-": (hunk.old,), "+": (hunk.new,)}.get(marked, ()):
                side[-1] = side[-1].removesuffix("\n")
        elif mark in " -+":
            if mark != "+":
                hunk.old.append(line + "\n")
            if mark != "-":
                hunk.new.append(line + "\n")
        else:
            raise PatchError(f"line {place + 1}: unexpected {lines[place][:60]!r} inside a hunk")
        marked = mark
        place += 1
    if len(hunk.old) != olds or len(hunk.new) != news:
        raise PatchError(f"line {place}: the hunk's lines do not add up to its header")
    return hunk, place


def _apply_section(tree: Tree, section: Section) -> None:
    if section.old is None and section.new is None:
        raise PatchError("a section names no file")
    if section.old is None:
        assert section.new is not None
        if section.new in tree:
            raise PatchError(f"{section.new}: already exists")
        old, mode = [], PLAIN
    else:
        file = tree.get(section.old)
        if file is None or file.mode == LINK:
            raise PatchError(f"{section.old}: no such file")
        old, mode = _split(file.data.decode("utf-8", "surrogateescape")), file.mode
    new = _patched(old, section)
    if section.old is not None and section.old != section.new:
        del tree[section.old]
    if section.new is None:
        if new:
            raise PatchError(f"{section.old}: is to be deleted, but lines are left")
        return
    data = "".join(new).encode("utf-8", "surrogateescape")
    tree[section.new] = File(data, section.mode or mode)


def _patched(old: list[str], section: Section) -> list[str]:
    result: list[str] = []
    done = offset = 0
    for number, hunk in enumerate(section.hunks, start=1):
        place = _find(old, hunk.old, hunk.start - 1 + offset, done)
        if place is None:
            raise PatchError(f"{section.old or section.new}: hunk {number} does not fit")
        offset = place - (hunk.start - 1)
        result += old[done:place] + hunk.new
        done = place + len(hunk.old)
    return result + old[done:]


def _find(lines: list[str], wanted: list[str], start: int, lowest: int) -> int | None:
    """Return the place of the lines ``wanted`` that is nearest to ``start`` and not before ``lowest``."""
    if not wanted:
        return start if lowest <= start <= len(lines) else None
    if start >= lowest and lines[start : start + len(wanted)] == wanted:
        return start
    places = range(lowest, len(lines) - len(wanted) + 1)
    for place in sorted(places, key=lambda place: abs(place - start)):
        if lines[place] == wanted[0] and lines[place : place + len(wanted)] == wanted:
            return place
    return None
