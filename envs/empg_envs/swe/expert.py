"""An expert that knows the gold patch and reproduces it with the agent's own tools.

It has no internal plan. Before each action it compares the current files with the fixed ones, so that it also
continues correctly after the actions of another policy.
"""

from __future__ import annotations

import base64
import shlex

from empg_envs.swe import patches, terse, tools
from empg_envs.swe.tree import File, Tree


def next_change(now: Tree, goal: Tree) -> tuple[str, File | None, File | None] | None:
    """Return the first path that differs, with both versions; caches and links are ignored."""
    for path in sorted(now.keys() | goal.keys()):
        if now.get(path) != goal.get(path):
            return path, now.get(path), goal.get(path)
    return None


def first_hunk(path: str, before: File, after: File) -> patches.Hunk | None:
    """Return the first differing run of lines, or None if a text patch cannot express it."""
    patch, _ = patches.diff({path: before}, {path: after})
    sections = patches.parse(patch)
    return sections[0].hunks[0] if sections and sections[0].hunks else None


def function_action(now: Tree, goal: Tree, seen: list[str]) -> str:
    """Return the next call: show the lines, replace them, or submit."""
    change = next_change(now, goal)
    if change is None:
        return tools.render_call("finish", command="submit")
    path, before, after = change
    hunk = first_hunk(path, before, after) if before and after else None
    if hunk is None or before is None:
        return tools.render_call("execute_bash", cmd=_overwrite(path, after))
    if not any(f"<parameter=path>{path}<" in action for action in seen):
        first, last = max(1, hunk.start - 10), hunk.start + len(hunk.old) + 10
        return tools.render_call("file_editor", command="view", path=path, view_range=f"[{first}, {last}]")
    old, new = "".join(hunk.old), "".join(hunk.new)
    text = before.data.decode("utf-8", "surrogateescape")
    if text.count(old) != 1 or "</" in old + new or not _survives(old) or not _survives(new):
        return tools.render_call("execute_bash", cmd=_overwrite(path, after))
    return tools.render_call("file_editor", command="str_replace", path=path, old_str=old, new_str=new)


def bash_action(now: Tree, goal: Tree, seen: list[str]) -> str:
    """Return the next shell command: show the lines, rewrite them, or submit."""
    change = next_change(now, goal)
    if change is None:
        return f"echo {tools.SUBMIT}"
    path, before, after = change
    hunk = first_hunk(path, before, after) if before and after else None
    if hunk is None or before is None:
        return _overwrite(path, after)
    quoted = shlex.quote(path)
    if not any(action.startswith("sed -n ") and quoted in action for action in seen):
        first = max(1, hunk.start - 10)
        return f"sed -n {first},{hunk.start + len(hunk.old) + 10}p {quoted}"
    old, new = "".join(hunk.old), "".join(hunk.new)
    if before.data.decode("utf-8", "surrogateescape").count(old) != 1 or not (old + new).isascii():
        return _overwrite(path, after)
    script = (
        "from pathlib import Path\n"
        f"path = Path({path!r})\n"
        f"old = {old!r}\n"
        f"new = {new!r}\n"
        "path.write_text(path.read_text().replace(old, new))"
    )
    return f"python - <<'END_OF_SCRIPT'\n{script}\nEND_OF_SCRIPT"


def terse_action(now: Tree, goal: Tree, seen: list[str]) -> str:
    """Return the next terse command; submit if the rest needs more or fewer lines."""
    change = next_change(now, goal)
    if change is None or change[1] is None or change[2] is None:
        return "submit"
    path, before, after = change[0], change[1], change[2]
    old, new = (file.data.decode("utf-8", "replace").split("\n") for file in (before, after))
    if len(old) != len(new):
        return "submit"
    # After an edit by tokens a line may differ only in its blanks, so compare tokens.
    wrong = [
        number
        for number, (one, two) in enumerate(zip(old, new, strict=True), start=1)
        if terse.code_tokens(one) != terse.code_tokens(two)
    ]
    if not wrong:
        return "submit"
    line = wrong[0]
    if not any(action.startswith(f"view {path} ") for action in seen):
        return f"view {path} {line}"
    return f"edit {path} {line} : {' '.join(terse.code_tokens(new[line - 1]))}"


ACTIONS = {"functions": function_action, "bash": bash_action, "terse": terse_action}


def _survives(text: str) -> bool:
    """Return whether a call keeps the text unchanged; one line break at each end belongs to the markup."""
    return not text.startswith("\n") and text == tools.clean(text, len(text))


def _overwrite(path: str, file: File | None) -> str:
    quoted = shlex.quote(path)
    if file is None:
        return f"rm -f {quoted}"
    data = base64.b64encode(file.data).decode()
    mode = "755" if file.mode & 0o100 else "644"
    folder = shlex.quote(path.rpartition("/")[0] or ".")
    return f"mkdir -p {folder} && echo {data} | base64 -d > {quoted} && chmod {mode} {quoted}"
