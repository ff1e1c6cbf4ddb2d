"""Episodes of an environment in a process of its own, as JSON; `check_other_process` starts it."""

from __future__ import annotations

import json
import sys

from empg_envs import make_env
from empg_envs.conformance.subject import play


def tell(request: str) -> str:
    """Play the episodes of a request; return them, and the packages that are loaded, as JSON."""
    target, options, tasks = json.loads(request)
    env = make_env(target, **options)
    episodes = [play(env, split, index) for split, index in tasks]
    return json.dumps([episodes, sorted({name.partition(".")[0] for name in sys.modules})])


if __name__ == "__main__":
    print(tell(sys.argv[1]))
