"""``empg-jax bench``: its table and JSON, what it measures for which configuration, and what it refuses."""

import json
import shlex

import numpy as np
import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.plan import bench
from empg_jax.plan.episodes import choose_form, make_prompt
from empg_jax.report.progress import Progress
from tests import runs


def call(*overrides, options=()):
    result = CliRunner().invoke(app, ["bench", "quickstart", *runs.TINY, *overrides, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def measure(tmp_path, *overrides):
    with Progress(False) as progress:
        return bench.bench(runs.configure(tmp_path / "never", *overrides), 1, progress)


@pytest.mark.slow
def test_the_command_tells_rates_in_a_table_or_as_json_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(options=["--json", "--repeats=1"])
    assert done.exit_code == 0 and done.stdout.count("\n") == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["recompiles"] == 0
    assert found["logprob_gap_max"] < 1e-4
    # Four episodes of four turns share rows of 96: 20 new tokens and 4 sampled in each.
    assert (found["episodes"], found["turns"], found["prompt_tokens"], found["response_tokens"]) == (
        4,
        4,
        20,
        4,
    )
    assert found["sampled_tokens"] == 4 * 4 * 4
    assert found["trained_tokens"] == 4 * 96
    assert found["tokens_per_second"]["rollout"] == pytest.approx(64 / found["seconds"]["rollout"])
    assert found["tokens_per_second"]["update"] == pytest.approx(384 / found["seconds"]["update"])
    assert 0 < found["product_share"] < 1
    assert found["planned_bytes"] > 0 and found["peak_bytes"] is None  # a CPU does not report it
    source = ["quickstart", *runs.TINY, "env.options={level: tiny, style: terse}"]
    table = "\n".join(bench.as_lines(found, source))
    for told in (
        *bench.PARTS,
        "prefill",
        "empg-jax simulate quickstart compile_cache=null ",
        "log-probs of engine and learner",
    ):
        assert told in table
    assert not list(tmp_path.iterdir())
    # What the last line proposes can be run as it stands, also where prefill hides the time of decode.
    rollout = found["tokens_per_second"]["rollout"]
    for rates, rate in (({"decode": 500.0}, 500), ({}, rollout)):
        known = {name: each for name, each in found["tokens_per_second"].items() if name != "decode"} | rates
        proposed = bench.as_lines(found | {"tokens_per_second": known}, source)[-1]
        assert ("--prefill-rate" in proposed) == bool(rates)
        command = shlex.split(proposed[proposed.index("empg-jax") :])[1:]
        done = CliRunner().invoke(app, [*command, "--latency=0.1", "--turns=4", "--updates=8", "--json"])
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["world"]["decode_rate"] == pytest.approx(rate, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        # A row for each of the four turns; two epochs train each twice, beside a frozen reference; the engine
        # gives up its memory meanwhile.
        (
            ["env.context=window", "train.epochs=2", "algorithm.kl_coef=0.1", "rollout.release=true"],
            4 * 4 * 96,
        ),
        # Adapters over a quantized base, the reference; fewer slots than episodes; pages; and a device
        # of the engine's own.
        (
            [
                *("model.lora.rank=2", "model.quantize=int8", "sft.updates=0", "algorithm.kl_coef=0.1"),
                *("rollout.slots=2", "rollout.page_tokens=16", "rollout.devices=1", "train.max_lag=1"),
            ],
            4 * 96,
        ),
        # Every turn tells what it knows of the answer. Credit uses the engine's records: a run seldom scores.
        (["algorithm.name=igpo", "algorithm.entropy_source=engine", "env.max_turns=2"], 4 * 96),
    ],
    ids=["window", "adapters", "answers"],
)
def test_it_measures_what_a_run_would_do(tmp_path, overrides, trained):
    found = measure(tmp_path, *overrides)
    assert found["recompiles"] == 0
    assert found["trained_tokens"] == trained
    assert found["logprob_gap_max"] < 1e-3
    seconds = found["seconds"]
    assert min(seconds.values()) > 0
    seldom = 25 if "algorithm.entropy_source=engine" in overrides else 1
    assert seconds["learning"] == pytest.approx(seconds["score"] / seldom + seconds["update"])
    beside = max if "train.max_lag=1" in overrides else lambda *each: sum(each)
    cycle = seconds["pause"] + beside(seconds["rollout"], seconds["learning"])
    assert seconds["update_cycle"] == pytest.approx(cycle)


def test_episodes_fill_their_rows_and_a_group_begins_alike(tmp_path):
    config = runs.configure(tmp_path, "rollout.max_response_tokens=40", "env.max_turns=1")
    form = choose_form(config)
    assert (form.turns, form.prompt, form.response) == (1, 56, 40)
    config = runs.configure(tmp_path, "env.max_turns=60")
    form = choose_form(config)
    assert (form.turns, form.prompt, form.response) == (48, 1, 1)
    first, second = (make_prompt(form, 50, 1, member, 0) for member in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_what_another_program_samples_is_refused():
    done = call("rollout.engine=openai", "rollout.url=http://127.0.0.1:9")
    assert done.exit_code == 2
    assert "rollout.engine=openai" in done.stderr and "builtin" in done.stderr
