"""Times the page of `empg-jax view` in headless Chromium with made-up episodes.

    python scripts/bench_view.py [--episodes 10000] [--turns 15] [--tokens 0] [--screenshot page.png]

Prints one JSON object: seconds to write the page, its size, milliseconds to the first paint, to the list and
to the first transcript, and of filters (median and largest over several). The goal: first paint below 1 s,
filters below 100 ms, 60 MiB at most.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from browser import chromium

from empg_jax.run.rollouts import write_rollouts
from empg_jax.run.view import view_run
from empg_jax.text.builtin import build_byte_tokenizer

GROUP, EPISODES_PER_UPDATE = 8, 128
PLACES = [
    *("countertop", "diningtable", "bed", "desk", "sofa", "coffeetable", "shelf"),
    *("drawer", "fridge", "sinkbasin", "cabinet", "garbagecan"),
]
THINGS = [
    *("apple", "mug", "laptop", "book", "egg", "plate", "knife"),
    *("watch", "cloth", "candle", "soapbar", "tomato", "lettuce", "pan", "kettle"),
]
FILTERS = {
    "f-success": "1",
    "f-reason": "turn_limit",
    "f-update": "20-40",
    "f-low": "0.5",
    "search": "laptop",
    "order": "highest entropy",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=0, help="numbers of that many tokens a turn")
    parser.add_argument("--screenshot", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "made-up"
        make_run(run_dir, arguments.episodes, arguments.turns, arguments.tokens)
        began = time.perf_counter()
        page = view_run(run_dir, out=None, what_if={}, say=lambda line: None)
        wrote = time.perf_counter() - began
        found = {"episodes": arguments.episodes, "turns": arguments.turns, "tokens": arguments.tokens}
        found |= {"seconds_to_write": round(wrote, 1), "mib": round(page.stat().st_size / 2**20, 1)}
        print(json.dumps(found | measure(page, arguments.screenshot)))


def measure(page: Path, screenshot: Path | None) -> dict[str, float]:
    """Milliseconds of the page in a browser."""
    with chromium() as browser:
        browser.open(page.as_uri())
        browser.wait("performance.getEntriesByName('ready').length && document.querySelector('.turn')")
        browser.wait("performance.getEntriesByType('paint').length > 1")
        found = {
            "first_paint_ms": browser.run(
                "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            ),
            "list_ms": browser.run("performance.getEntriesByName('list')[0].startTime"),
            "transcript_ms": browser.run("performance.getEntriesByName('ready')[0].startTime"),
        }
        browser.run("new Promise((done) => setTimeout(done, 500))")
        times = [each for name, value in FILTERS.items() for each in time_filter(browser, name, value)]
        found |= {"filter_median_ms": statistics.median(times), "filter_max_ms": max(times)}
        found["open_far_ms"] = browser.run(OPEN_FAR)
        if screenshot is not None:
            browser.screenshot(screenshot)
    return {name: round(value, 1) for name, value in found.items()}


# From a key to the transcript of an episode whose chunk was not open before.
OPEN_FAR = """(async () => {
  document.querySelector('#filters').reset();
  await new Promise((done) => setTimeout(done, 300));
  const list = document.querySelector('#list');
  list.scrollTop = list.scrollHeight / 2;
  await new Promise((done) => setTimeout(done, 300));
  const before = document.querySelector('h2').innerText, began = performance.now();
  document.querySelectorAll('.option')[8].click();
  while (document.querySelector('h2').innerText === before) await new Promise((done) => setTimeout(done, 1));
  return performance.now() - began;
})()"""


def time_filter(browser, name: str, value: str) -> list[float]:
    """Sets one filter three times, to the next frame on the screen; the first search also loads its text."""
    script = f"""(async () => {{
      const times = [], field = document.getElementById({json.dumps(name)}), before = field.value;
      for (let n = 0; n < 4; n++) {{
        const count = performance.getEntriesByName('filter').length, began = performance.now();
        field.value = n % 2 ? before : {json.dumps(value)};
        field.dispatchEvent(new Event('input', {{ bubbles: true }}));
        while (performance.getEntriesByName('filter').length === count)
          await new Promise((done) => setTimeout(done, 1));
        await new Promise((done) => requestAnimationFrame(done));
        times.push(performance.now() - began);
        await new Promise((done) => setTimeout(done, 100));
      }}
      return times;
    }})()"""
    times = browser.run(script)
    return times[1:] if name == "search" else times


def make_run(run_dir: Path, episodes: int, turns: int, tokens: int = 0) -> None:
    """Write a run of made-up episodes: random texts, so that they compress no better than real ones."""
    rng = random.Random(0)
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("algorithm: {name: grpo, modulation: empg}\n")
    if tokens:
        build_byte_tokenizer().save(run_dir / "tokenizer")
    lines = []
    for update in range(1, -(-episodes // EPISODES_PER_UPDATE) + 1):
        count = min(EPISODES_PER_UPDATE, episodes - (update - 1) * EPISODES_PER_UPDATE)
        records = [make_episode(rng, update, number, turns, tokens) for number in range(count)]
        write_rollouts(run_dir, update, records)
        names = (
            "success_rate",
            "episode_return",
            "entropy",
            "modulation_mean",
            "advantage_positive",
            "grad_norm",
        )
        lines.append(json.dumps({"update": update} | {name: rng.random() for name in names}))
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def make_episode(rng: random.Random, update: int, number: int, turns: int, tokens: int) -> dict:
    success = rng.random() < 0.5
    group = update * EPISODES_PER_UPDATE + number // GROUP
    return {
        "update": update,
        "group_id": group,
        "member": number % GROUP,
        "task": group,
        "split": "train",
        "status": "trained",
        "reason": "won" if success else "turn_limit",
        "return": float(success),
        "success": success,
        "terminated": success,
        "truncated": not success,
        "metrics": {"steps": turns},
        "turns": [make_turn(rng, update, k, tokens) for k in range(turns)],
    }


def make_turn(rng: random.Random, update: int, k: int, tokens: int) -> dict:
    base, factor, bonus = rng.uniform(-1, 1), rng.uniform(0.5, 2), rng.uniform(0, 0.05)
    seen = ", ".join(f"a {rng.choice(THINGS)} {rng.randint(1, 9)}" for _ in range(rng.randint(3, 14)))
    place = f"{rng.choice(PLACES)} {rng.randint(1, 9)}"
    return {
        "observation": f"You arrive at {place}. On the {place}, you see {seen}. Your task: put a "
        f"{rng.choice(THINGS)} in the {rng.choice(PLACES)}.",
        "response": f"<think>The {rng.choice(THINGS)} may be near the {rng.choice(PLACES)}; look at step "
        f"{k}.</think><action>go to {rng.choice(PLACES)} {rng.randint(1, 9)}</action>",
        "reward": 0.0,
        "valid": rng.random() < 0.95,
        "finish_reason": "stop",
        "version": update - 1,
        "tokens": tokens or 30,
        "entropy": rng.uniform(0, 2),
        "logprob": -rng.uniform(0, 2),
        "anchor": f"{rng.getrandbits(64):016x}",
        "factor": factor,
        "bonus": bonus,
        "advantage_base": base,
        "advantage": base * factor + bonus,
        **({"token_ids": [rng.randrange(200) for _ in range(tokens)]} if tokens else {}),
        **({name: [rng.random() for _ in range(tokens)] for name in TOKEN_ARRAYS} if tokens else {}),
    }


TOKEN_ARRAYS = ("token_logprobs", "token_entropies", "token_advantages")

if __name__ == "__main__":
    main()
