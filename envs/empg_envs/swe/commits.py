"""The gold patch of R2E-Gym's rows, which hold the commit that repairs the task instead of a patch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from empg_envs.rows import DataError
from empg_envs.swe import patches
from empg_envs.swe.tree import File, Tree, is_test

COLUMN = "parsed_commit_content"
# What a commit tells its readers. The images need not have these files as the commit had them.
DOCUMENTS = (".md", ".rst", ".txt")


def read_gold(content: str | Mapping[str, Any], name: str) -> str:
    """Return the part of a commit that repairs the program: no tests, no documents, no binary files.

    Args:
      content: value of the row's `COLUMN`, JSON or its value; ``file_diffs`` has each file before and after.
      name: name of the task, for messages.

    Raises:
      DataError: it has another form.
    """
    before: Tree = {}
    after: Tree = {}
    try:
        commit = json.loads(content) if isinstance(content, str) else content
        for change in commit["file_diffs"]:
            path = str(change["header"]["file"]["path"])
            if change.get("is_binary_file") or is_test(path) or path.endswith(DOCUMENTS):
                continue
            kind = str(change["header"].get("misc_line") or "").partition(" ")[0]
            if kind != "new":
                before[path] = File(change["old_file_content"].encode())
            if kind != "deleted":
                after[path] = File(change["new_file_content"].encode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"task {name}: {COLUMN} has no file_diffs as in R2E-Gym ({error!r})") from None
    return patches.diff(before, after)[0]
