"""Measure WebShop: steps per second with searches, and the memory of eight workers together.

Print one JSON object. ``--data FOLDER`` adds the official 1,000-product set; ``--products N`` builds the
catalog of a made-up file of N products in the official format, to see it shared at size. Memory is the
proportional set size (PSS) of worker processes after each has played some episodes.

    python scripts/bench_webshop.py --data FOLDER --products 100000
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "envs")]

from empg_envs import make_env
from empg_envs.webshop.assortment import BRANDS, COLORS, DEPARTMENTS
from scripts.opening import measure_building, measure_opening, open_when_told, read_pss


def policy(rng: random.Random, info: dict[str, Any]) -> str:
    """Search for words of the task on a search page, and sometimes elsewhere; else click at random."""
    if info["has_search"] or rng.random() < 0.2:
        words = info["task"].split()
        return f"search[{' '.join(rng.sample(words, min(8, len(words))))}]"
    return rng.choice(info["admissible"])


def measure_steps(options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Measure random episodes on one core; almost every search is new."""
    env, rng = make_env("webshop", style="page", **options), random.Random(0)
    started = time.perf_counter()
    num_tasks = env.num_tasks("train")
    opened = time.perf_counter() - started
    steps = searches = episodes = 0
    started = time.process_time()
    while time.process_time() - started < seconds:
        _, info = env.reset(split="train", index=episodes % num_tasks)
        episodes += 1
        is_done = False
        while not is_done:
            action = policy(rng, info)
            searches += action.startswith("search")
            _, _, terminated, truncated, info = env.step(action)
            steps += 1
            is_done = terminated or truncated
    cpu = time.process_time() - started
    return {
        "opened_seconds": round(opened, 2),
        "steps_per_cpu_second": round(steps / cpu),
        "searches_share": round(searches / steps, 2),
        **{key: env.describe()[key] for key in ("products", "goals", "tagger")},  # type: ignore[attr-defined]
    }


class Worker:
    """One environment worker process, driven over its pipes."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "empg_envs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT / "envs",
        )
        self._ask({"env": "webshop", "options": {"style": "page", **options}, "memory_limit_mb": None})
        self._number = 0

    def _ask(self, message: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def call(self, op: str, **args: Any) -> dict[str, Any]:
        self._number += 1
        reply = self._ask([{"id": self._number, "env": 0, "op": op, "args": args}])
        assert reply["ok"], reply
        return reply

    def play(self, episodes: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(episodes):
            reply = self.call("reset", seed=rng.randrange(10**6), split="train", index=rng.randrange(1000))
            while not (reply.get("terminated") or reply.get("truncated")):
                reply = self.call("step", action=policy(rng, reply["info"]))

    def pss(self) -> float:
        return read_pss(self._process.pid)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def measure_memory(options: dict[str, Any], episodes: int) -> dict[str, float]:
    """Measure the PSS of eight workers together, and of one alone."""
    workers = [Worker(options) for _ in range(8)]
    for seed, worker in enumerate(workers):
        worker.play(episodes, seed)
    together = sum(worker.pss() for worker in workers)
    for worker in workers[1:]:
        worker.close()
    alone = workers[0].pss()
    workers[0].close()
    return {"workers_8_pss_mb": round(together, 1), "worker_1_pss_mb": round(alone, 1)}


def write_made_up_files(folder: Path, count: int) -> None:
    """Write ``count`` products and attributes in the official format."""
    rng = random.Random(0)
    kinds = [(d, shelf, k) for d in DEPARTMENTS for shelf, names in d.kinds.items() for k in names]
    with open(folder / "items_shuffle.json", "w") as products, open(folder / "items_ins_v2.json", "w") as ins:
        products.write("[")
        ins.write("{")
        for number in range(count):
            department, shelf, kind = kinds[number % len(kinds)]
            asin, attributes = f"M{number:09d}", rng.sample(department.attributes, 3)
            material, use = rng.choice(department.materials), rng.choice(department.uses)
            row = {
                "asin": asin,
                "name": f"{rng.choice(BRANDS)} {number} {material} {kind} for {use}",
                "full_description": f"{kind} {attributes[0]} {attributes[1]} {use}. " * 8,
                "small_description": [f"{attribute}: {material} {kind}" for attribute in attributes],
                "pricing": f"${rng.randrange(5, 300)}.99",
                "product_category": f"{department.path} \u203a {shelf} \u203a {kind}",
                "category": department.name,
                "query": kind,
                "customization_options": {"color": [{"value": c} for c in rng.sample(COLORS, 3)]},
            }
            about: dict[str, Any] = {"attributes": attributes}
            if number % 3 == 0:
                about |= {"instruction": f"Find me {kind}", "instruction_attributes": attributes[:2]}
            comma = "," if number else ""
            products.write(comma + json.dumps(row))
            ins.write(f"{comma}{json.dumps(asin)}:{json.dumps(about)}")
        products.write("]")
        ins.write("}")


def measure_large(count: int, seconds: float, episodes: int, parent: str | None) -> dict[str, Any]:
    """Build a catalog of ``count`` products by the users' command, and measure it like the others."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        write_made_up_files(folder, count)
        files = round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20)
        cache = folder / "cache"
        options = {"level": "official", "data": name, "size": "full", "cache_dir": str(cache)}
        command = [
            sys.executable,
            "-m",
            "empg_envs.webshop",
            name,
            "--size",
            "full",
            "--cache-dir",
            str(cache),
        ]
        built = measure_building(command, cache, PYTHONPATH=str(ROOT / "envs"))
        said = {"files_mb": files, "built": built}
        print(json.dumps(said), file=sys.stderr, flush=True)
        opener = [sys.executable, __file__, "--open", json.dumps(options)]
        return {
            **said,
            "opened": [measure_opening(opener, workers) for workers in (1, 8)],
            **measure_steps(options, seconds),
            **measure_memory(options, episodes),
        }


def open_shop(options: dict[str, Any]) -> object:
    """Open a catalog as a worker does, and see the first goal."""
    env = make_env("webshop", style="page", **options)
    env.reset(split=env.list_splits()[0], index=0)
    return env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of the official files")
    parser.add_argument("--products", type=int, default=0, help="size of a made-up catalog")
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU seconds per measurement of steps")
    parser.add_argument(
        "--episodes", type=int, default=20, help="episodes per worker before its memory is read"
    )
    parser.add_argument("--folder", help="where the files of --products are written and removed again")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.open:
        open_when_told(lambda: open_shop(json.loads(chosen.open)))
        return
    shops: dict[str, dict[str, Any]] = {"tiny": {"level": "tiny"}, "standard": {"level": "standard"}}
    if chosen.data:
        shops["official"] = {"level": "official", "data": str(Path(chosen.data).resolve())}
    found = {
        name: {**measure_steps(options, chosen.seconds), **measure_memory(options, chosen.episodes)}
        for name, options in shops.items()
    }
    if chosen.products:
        large = measure_large(chosen.products, chosen.seconds, chosen.episodes, chosen.folder)
        found[f"made_up_{chosen.products}"] = large
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
