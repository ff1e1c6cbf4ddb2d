"""Python source to syntax trees, from several threads."""

from __future__ import annotations

import ast
import threading

_LOCK = threading.Lock()


def parse(source: str | bytes) -> ast.Module:
    """Parse like `ast.parse`, one thread at a time.

    Python 3.11 counts the depth of the tree under construction once for all threads. Two that parse at the
    same time can end with ``SystemError: AST constructor recursion depth mismatch``.
    """
    with _LOCK:
        return ast.parse(source)
