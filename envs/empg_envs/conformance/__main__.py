"""Episodes of an environment in a process of its own, as JSON; `check_other_process` starts it."""

from __future__ import annotations

import json
import os
import sys

from empg_envs.conformance.subject import Subject, play
from empg_envs.worker import take_channel


def tell(request: str) -> str:
    """Play the episodes of a request; return them, and the packages that are loaded, as JSON."""
    target, options, tasks = json.loads(request)
    with Subject(target, options).open() as env:
        episodes = [play(env, split, index) for split, index in tasks]
    return json.dumps([episodes, sorted({name.partition(".")[0] for name in sys.modules})])


if __name__ == "__main__":
    # As in a worker, what an environment prints goes elsewhere, at exit too.
    _, sink = take_channel()
    with os.fdopen(sink, "w") as answer:
        answer.write(tell(sys.argv[1]))
