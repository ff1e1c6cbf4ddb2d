"""Stands for ``empg_jax`` where a study's runs shall take no time."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(words):
    """Train or evaluate: ``broken`` fails, ``deadly`` kills itself, ``slow`` waits for a file ``go``.

    A file ``alive`` keeps the deadly from it.
    """
    if words[0] == "eval":
        print(json.dumps({"eval_success": 0.75, "eval_tasks": int(words[3])}))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    is_resumed = words[1] == "--resume"
    folder = Path(words[2]) if is_resumed else Path(words[-1].removeprefix("run_dir="))
    with (folder.parent / "journal").open("a") as file:
        file.write(json.dumps([folder.name, is_resumed]) + "\n")
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("")
    if "broken" in folder.name:
        print("error: no such luck", file=sys.stderr)
        return 1
    if "deadly" in folder.name and not (folder.parent / "alive").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    while "slow" in folder.name and not (folder.parent / "go").exists():
        time.sleep(0.02)
    git = {"commit": "c" * 40, "dirty": True}
    about = {"git": git, "python": "3", "packages": {}, "cpus": 1, "devices": ["cpu"], "platform": "Linux"}
    (folder / "environment.json").write_text(json.dumps(about))
    updates = [{"update": n, "environment_steps": 5.0, "cpu_seconds": 0.5} for n in range(1, 21)]
    updates[9] |= {"entropy": 0.5, "eval_success": 0.5}
    updates[19] |= {"entropy": 0.25}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in updates))
    summary = {"updates": 20, "eval_tasks": 256, "wall_seconds": {"total": 2.0}, "weights_before": "w"}
    summary |= {"eval_success_before": 0.25, "eval_success_after": 0.75}
    (folder / "summary.json").write_text(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
