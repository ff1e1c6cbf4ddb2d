"""The engine benchmark runs on a bare accelerator image and keeps its promises at a tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = "--hidden 16 --heads 2 --kv-heads 1 --layers 1 --intermediate 16 --vocab 32 --slots 2 --repeats 1"
WORK = "--turns 3 --observation 5 --first-prompt 7 --responses 2 9 --only agent occupancy"
# Without what an accelerator image lacks.
BARE = (
    "import runpy, sys; sys.modules |= dict.fromkeys(('pydantic', 'typer'));"
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.slow
def test_a_tiny_benchmark(tmp_path):
    requests, out = tmp_path / "requests.json", tmp_path / "out.json"
    script = str(ROOT / "scripts" / "bench_engine.py")
    occupancies = [{"slot_occupancy": share} for share in (0.5, 0.25, 0.75)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in occupancies))
    options = [*TINY.split(), *WORK.split(), "--requests", str(requests), "--out", str(out)]
    options += ["--run", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", BARE, script, *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    turns = [turn for conversation in json.loads(requests.read_text()) for turn in conversation]
    sampled = sum(length for _, length in turns)
    new = sum(len(tokens) for tokens, _ in turns)
    # Both ways sample the same; with kept KV only new tokens are prefilled.
    assert result["agent"]["sampled_tokens"] == result["one_slot_no_reuse"]["sampled_tokens"] == sampled
    assert result["prefilled_tokens"] == new - 2
    assert result["one_slot_no_reuse"]["prefilled_tokens"] > 2 * new
    assert result["recompiles"] == 0 and 0 < result["slot_occupancy"] <= 1
    assert result["slot_occupancy_of_run"] == {"updates": 3, "median": 0.5, "least": 0.25, "most": 0.75}
    assert result["agent_tokens_per_cpu_s"] > 0 and result["agent_speedup"] > 0


def measure_prefixes(tmp_path, options):
    """What `scripts/bench_prefix.py` writes, without the packages of the command line."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", BARE, str(ROOT / "scripts" / "bench_prefix.py"), *options.split()]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.long
def test_a_tiny_benchmark_of_shared_prefixes(tmp_path):
    """A group costs one prefill of what is common; a pool that overflows loses its hits gently."""
    shape = "--hidden 16 --heads 2 --layers 1 --vocab 64 --slots 8 --attempts 4 --repeats 1 --response 4"
    work = "--prompt 64 --shares 0.5 --turns 3 --instructions 40 --observation 8"
    result = measure_prefixes(tmp_path, f"{shape} {work}")
    group, pool = result["group"]["0.5"], result["pool"]
    assert group["prefilled_tokens_without"] == 8 * 63 and group["prefilled_tokens"] == 2 * 63 + 6 * 31
    assert pool["recompiles"] == 0
    for order in ("random", "in turn"):
        fits, overflows = pool[f"{order}, 1x"], pool[f"{order}, 0.5x"]
        assert overflows["evicted_tokens"] > 0 and fits["hit_rate"] > fits["hit_rate_without"]
        assert fits["hit_rate"] > overflows["hit_rate"] > 0.5


@pytest.mark.slow
@pytest.mark.long
def test_a_tiny_benchmark_of_pages(tmp_path):
    """A pool for a quarter of the conversations still keeps most of what it found."""
    shape = "--hidden 16 --heads 2 --layers 1 --vocab 64 --slots 4 --attempts 4 --response 4 --page-tokens 8"
    work = "--only pool memory --prompt 64 --turns 3 --instructions 40 --observation 8"
    result = measure_prefixes(tmp_path, f"{shape} {work}")
    pool, memory = result["pool"], result["memory"]
    assert pool["recompiles"] == 0 == pool["in turn, 1x"]["evicted_tokens"]
    for order in ("random", "in turn"):
        overflows = pool[f"{order}, 0.25x"]
        assert overflows["evicted_tokens"] > 0 and overflows["page_use"] == 1
        assert overflows["hit_rate"] > 0.5
    assert memory["tokens_of_pages"] < memory["tokens_of_conversations"] < memory["tokens_of_rows"]
