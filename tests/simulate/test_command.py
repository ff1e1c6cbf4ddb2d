"""``empg-jax simulate``: its table and JSON, the numbers of a run, and what it refuses."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.simulate.run import simulate
from empg_jax.simulate.spread import Spread
from empg_jax.simulate.world import World
from tests import runs

# Environments of 0.1 s, a rollout of 6 x 0.1 + 5 x 10 / 50 s, and an update as long.
SIZES = ["rollout.tasks_per_update=4", "rollout.group_size=4"]
SPEEDS = {
    "latency": 0.1,
    "turns": 5,
    "turns-kind": "constant",
    "tokens": 10,
    "tokens-kind": "constant",
    "decode-rate": 800,
    "update-seconds": 1.6,
    "updates": 40,
}


def call(*arguments, **speeds):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in speeds.items()]
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments), *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def plan(*arguments, **speeds):
    done = call(*arguments, "--json", **speeds)
    assert done.exit_code == 0 and done.stdout.count("\n") == 1, done.stderr
    return json.loads(done.stdout)


def test_a_row_per_lag_and_split_in_json():
    found = plan("quickstart", *SIZES, **SPEEDS, lags="0,2", splits="1,1:1,1:7")
    rows = {(row["max_lag"], row["split"]): row for row in found["rows"]}
    assert list(rows) == [(lag, split) for lag in (0, 2) for split in ("1 shared", "1:1", "1:7")]
    # One after the other; then the slower one alone; then an update on seven devices.
    assert rows[0, "1:1"]["seconds_per_update"] == pytest.approx(3.2)
    assert rows[0, "1 shared"]["seconds_per_update"] == pytest.approx(3.2)
    assert rows[0, "1:7"]["seconds_per_update"] == pytest.approx(1.6 + 1.6 / 7)
    assert rows[2, "1:1"]["seconds_per_update"] == pytest.approx(1.6, rel=0.05)
    assert rows[2, "1:1"]["learner_idle"] < 0.10
    assert rows[2, "1:7"]["learner_idle"] > 0.8
    assert 1.6 < rows[2, "1 shared"]["seconds_per_update"] < 3.0
    assert rows[2, "1:1"]["lag_max"] <= 2 and rows[2, "1:1"]["updates"] == 40
    assert found["world"]["groups_per_update"] == 4 and "a model, not a measurement" in found["notes"][-1]
    assert plan("quickstart", *SIZES, **SPEEDS, lags="0,2", splits="1,1:1,1:7") == found


def test_more_engine_devices_decode_in_proportion():
    found = plan("quickstart", *SIZES, **(SPEEDS | {"latency": 0}), lags="0", splits="1:1,2:1")
    assert [row["seconds_per_update"] for row in found["rows"]] == pytest.approx([1.0 + 1.6, 0.5 + 1.6])


def test_the_devices_of_the_configuration_are_the_default():
    apart = ["rollout.devices=2", "rollout.data=2", "mesh.fsdp=4", "train.micro_tokens=4096"]
    (row,) = plan("quickstart", *SIZES, *apart, **SPEEDS, lags="1")["rows"]
    assert (row["engine"], row["learner"], row["is_shared"]) == (2, 4, False)
    (row,) = plan("quickstart", *SIZES, **SPEEDS, lags="1")["rows"]
    assert (row["engine"], row["learner"], row["is_shared"]) == (1, 1, True)


def test_one_of_several_hosts_is_simulated_with_its_share():
    """Four hosts have a group of the four each, in four slots: a quarter of the tokens by an engine alike."""
    devices = ["mesh.fsdp=4", "train.micro_tokens=4096"]
    speeds = SPEEDS | {"latency": 0}
    (alone,) = plan("quickstart", *SIZES, *devices, **speeds, lags="0")["rows"]
    found = plan("quickstart", *SIZES, *devices, **speeds, lags="0", hosts=4)
    (row,) = found["rows"]
    assert (found["hosts"], found["world"]["groups_per_update"], found["world"]["slots"]) == (4, 1, 4)
    assert (alone["learner"], row["learner"], row["engine"]) == (4, 1, 1)
    assert alone["seconds_per_update"] == pytest.approx(1.0 + 1.6)
    assert row["seconds_per_update"] == pytest.approx(0.25 + 1.6)
    assert "40 updates of 1 x 4 episodes, 4 slots, seed 0; one of 4 hosts, all alike" in found["notes"][0]
    keys = ["hosts.num=4", "hosts.index=0", "hosts.coordinator=node0:8476"]
    assert plan("quickstart", *SIZES, *devices, *keys, **speeds, lags="0") == found
    for overrides, hosts, told in (
        (["rollout.slots=4"], 3, "rollout.tasks_per_update=4 groups cannot be shared by 3 hosts evenly"),
        (["mesh.data=3"], 2, "mesh.data=3 needs 3 devices, but 2 hosts with 2 each for the learner"),
    ):
        refused = call("quickstart", *SIZES, *overrides, **speeds, hosts=hosts)
        assert refused.exit_code == 2 and told in refused.stderr


def test_the_table_says_what_it_was_made_from():
    done = call("quickstart", *SIZES, lags="0,4", updates=5, long_share=0.25, long_stretch=8)
    text = " ".join(done.stdout.split())
    assert done.exit_code == 0, done.stderr
    assert "simulated, not measured: quickstart, 5 updates of 4 x 4 episodes, 16 slots, seed 0" in text
    assert "long episodes have 44 turns, which env.max_turns=10 would end" in text
    assert "assumed, because not given: --latency 0, --turns 5.5, --tokens 4.5, --decode-rate 1000" in text
    heads, *rows = [line.split() for line in done.stdout.splitlines() if line[:5].strip()][-4:]
    assert "idle" in heads or "idle" in rows[0]
    assert [row[:3] for row in rows[-2:]] == [["0", "1", "shared"], ["4", "1", "shared"]]
    assert all(row[-1].endswith("%") for row in rows[-2:])  # the share of long tasks


def test_a_row_that_never_ends_is_told_beside_the_others():
    # Environments answer one by one. Four devices sample so fast that all slots soon ask again, and wait.
    limits = ["quickstart", *SIZES, "rollout.episode_timeout=2"]
    speeds = SPEEDS | {"latency": 0.05, "at-once": 1, "decode-rate": 160, "updates": 5}
    ended, stuck = plan(*limits, **speeds, lags="0", splits="1:1,4:1")["rows"]
    assert stuck["problem"].startswith("update 1 never gets its episodes: ") and "updates" not in stuck
    assert ended["updates"] == 5
    done = call(*limits, **speeds, lags="0", splits="1:1,4:1")
    assert "never" in done.stdout.splitlines()[-2] and "train.max_lag=0, 4:1: update 1 never" in done.stdout


def test_episodes_do_not_age_while_they_are_sampled():
    """A rollout of 63 s, of which the environment takes 0.6 s; long tasks wait for theirs 4.1 s."""
    limits = [*SIZES, "rollout.episode_timeout=1", "rollout.min_group_size=2"]
    speeds = SPEEDS | {"decode-rate": 12.8, "updates": 3}
    (row,) = plan("quickstart", *limits, **speeds, lags="0")["rows"]
    assert row["seconds_per_update"] == pytest.approx(0.6 + 62.5 + 1.6)
    assert (row["waste"], row["groups_replaced"], row["episodes_discarded"]) == (0, {}, {})
    (row,) = plan("quickstart", *limits, **speeds, lags="0", long_share=0.25, long_stretch=8)["rows"]
    assert row["episodes_discarded"]["timeout"] > 0 and row["long_trained"] == 0


def test_options_of_the_configuration_reach_the_ledger():
    tight = plan("quickstart", *SIZES, "rollout.episode_timeout=1.7", **SPEEDS, lags="1", failures=0.05)
    assert tight["world"]["episode_timeout"] == 1.7
    burst = ["rollout.publish=burst", "train.max_lag=1"]
    kept = plan("quickstart", *SIZES, "rollout.filter_groups=true", *burst, **SPEEDS)
    assert kept["world"]["max_refills"] == 10 and kept["world"]["is_burst"]


def test_every_option_reaches_the_world():
    numbers = {"observation": 7.0, "long_share": 0.5, "long_stretch": 2.0, "failures": 0.1, "deaths": 0.05}
    numbers |= {"at_once": 3, "slot_rate": 70.0, "prefill_rate": 900.0, "publish_pause": 0.2}
    numbers |= {"reset_latency": 0.4, "decode_rate": 500.0, "update_seconds": 0.3, "updates": 3}
    spreads = {"latency": (0.2, "heavy"), "turns": (3.0, "exponential"), "tokens": (4.0, "lognormal")}
    options = {name: mean for name, (mean, _) in spreads.items()}
    options |= {f"{name}_kind": kind for name, (_, kind) in spreads.items()}
    world = plan("quickstart", *SIZES, "seed=5", **numbers, **options, lags="1")["world"]
    assert {name: world[name] for name in numbers} == numbers and world["seed"] == 5
    assert {name: (world[name]["mean"], world[name]["kind"]) for name in spreads} == spreads


def test_help_teaches_with_an_example():
    shown = " ".join(CliRunner().invoke(app, ["simulate", "--help"]).stdout.split())
    assert "empg-jax simulate quickstart --latency 0.1 --update-seconds 2" in shown


# ---------------------------------------------------------------------------------------- from a run


def write_run(folder, world, *overrides):
    """A folder as a run leaves it, whose updates took what the simulated world says."""
    config = runs.configure(folder, *overrides)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    seconds = simulate(world).seconds_per_update
    episodes = world.group_size * world.groups_per_update
    line = {
        "seconds_cycle": seconds,
        "seconds_update": world.update_seconds,
        "seconds_publish": world.publish_pause,
        "episode_turns": world.turns.mean,
        "response_tokens": world.tokens.mean,
        "tokens_prefilled": 7.0 * episodes * world.turns.mean,
        "episodes_trained": episodes,
        "episodes_discarded": 0.0,
        "mixed_groups": 0.75,
        "recompiles": 0.0,
    }
    slow = line | {"seconds_cycle": 50 * seconds, "recompiles": 3.0}
    text = "".join(json.dumps({"update": n} | (line if n else slow)) + "\n" for n in range(4))
    (folder / "metrics.jsonl").write_text(text)
    return seconds


def test_a_run_of_several_hosts_tells_the_speed_of_each(tmp_path):
    """Two hosts of 4 groups each by 800 tokens/s, on a device each; one host has all 8 and both devices."""
    config = ["rollout.tasks_per_update=8", "rollout.group_size=4", "mesh.data=2"]
    shape = {"turns": Spread(5.0, "constant"), "tokens": Spread(10.0, "constant"), "latency": Spread(0.0)}
    host = World(
        group_size=4, groups_per_update=4, slots=16, decode_rate=800.0, update_seconds=1.0, **shape, updates=6
    )
    write_run(tmp_path / "run", host, *config)
    (tmp_path / "run" / "environment.json").write_text('{"processes": 2}')
    kinds = {"turns_kind": "constant", "tokens_kind": "constant", "latency": 0, "lags": 0, "updates": 6}
    found = plan(tmp_path / "run" / "config.yaml", **{"from": tmp_path / "run"}, **kinds, hosts=2)
    assert found["world"]["decode_rate"] == pytest.approx(800, rel=0.05)
    assert found["rows"][0]["seconds_per_update"] == pytest.approx(1.0 + 1.0, rel=0.05)
    alone = plan(tmp_path / "run" / "config.yaml", **{"from": tmp_path / "run"}, **kinds, hosts=1)
    assert alone["world"]["decode_rate"] == found["world"]["decode_rate"]
    assert alone["rows"][0]["seconds_per_update"] == pytest.approx(2.0 + 1.0, rel=0.05)
    assert any("a host's part of an update has 2 times the tokens" in note for note in alone["notes"])


@pytest.fixture
def known():
    """The world of a run of 2 x 2 episodes: what `write_run` tells of it must lead back to it."""
    return World(
        group_size=2,
        groups_per_update=2,
        slots=4,
        latency=Spread(0.05),
        turns=Spread(3.0, "uniform"),
        tokens=Spread(3.5, "uniform"),
        decode_rate=120.0,
        update_seconds=0.4,
        publish_pause=0.02,
        is_shared=True,
        updates=6,
    )


@pytest.mark.parametrize("lag", [0, 1])
def test_the_speed_of_a_run_is_found_again(tmp_path, known, lag):
    run = tmp_path / "run"
    seconds = write_run(run, dataclasses.replace(known, max_lag=lag), f"train.max_lag={lag}")
    config, source = run / "config.yaml", ["--from", run]
    found = plan(config, *source, latency=0.05, lags=lag, updates=6)
    assert found["world"]["decode_rate"] == pytest.approx(120, rel=0.05)
    assert found["rows"][0]["seconds_per_update"] == pytest.approx(seconds, rel=0.02)
    assert found["world"]["mixed"] == 0.75 and found["world"]["observation"] == 7
    found = plan(config, *source, decode_rate=120, lags=lag, updates=6)
    assert found["world"]["latency"]["mean"] == pytest.approx(0.05, rel=0.05)
    # Without either, all the time is the sampler's, and that is said.
    found = plan(config, *source, lags=lag, updates=6)
    assert found["rows"][0]["seconds_per_update"] == pytest.approx(seconds, rel=0.02)
    assert any("does not measure how long environments take" in note for note in found["notes"])
    assert any("measures better" in note for note in found["notes"]) == bool(lag)


def test_episodes_discarded_are_those_of_all_updates_between_two_lines(tmp_path, known):
    """Of log.every=5: five updates of 4 episodes, during which 5 were discarded, one of five attempts."""
    run = tmp_path / "run"
    write_run(run, known)
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {"update": 5 * line["update"], "episodes_discarded": 5.0} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plan(run / "config.yaml", "--from", run, latency=0.05, decode_rate=120, updates=2, lags=0)
    assert found["world"]["failures"] == pytest.approx(0.2)
    # Dynamic sampling replaced as many episodes as were trained: those were prefilled, and could fail, too.
    counts = {
        "environment_steps": 5 * 2 * lines[0]["episodes_trained"] * lines[0]["episode_turns"],
        "tokens_prefilled": 2 * lines[0]["tokens_prefilled"],
        "outcome_won": 40.0,
        "outcome_env_error": 10.0,
        "episodes_discarded": 10.0,
    }
    path.write_text("".join(json.dumps(line | counts) + "\n" for line in lines))
    found = plan(run / "config.yaml", "--from", run, latency=0.05, decode_rate=120, updates=2, lags=0)
    assert found["world"]["failures"] == pytest.approx(0.2)
    assert found["world"]["observation"] == pytest.approx(7.0)


def test_another_batch_takes_an_update_in_proportion(tmp_path, known):
    run = tmp_path / "run"
    write_run(run, known)
    larger = plan(run / "config.yaml", "rollout.group_size=4", "--from", run, latency=0.05, lags=0)
    assert larger["world"]["update_seconds"] == pytest.approx(0.8)
    assert any("an update has 2 times the tokens of the run's" in note for note in larger["notes"])
    given = plan(run / "config.yaml", "rollout.group_size=4", "--from", run, latency=0.05, update_seconds=3)
    assert given["world"]["update_seconds"] == 3
    both = plan(run / "config.yaml", "--from", run, latency=0.05, decode_rate=300)
    assert both["world"]["decode_rate"] == 300 and both["world"]["update_seconds"] == pytest.approx(0.4)


@pytest.mark.slow
def test_a_real_run_is_planned_from(tmp_path):
    run = runs.train(tmp_path / "run", "train.updates=3", "sft.updates=0")
    lines = runs.lines(run)
    found = plan(run / "config.yaml", "--from", run, lags="0,1", updates=5)
    assert found["world"]["turns"]["mean"] == pytest.approx(
        sum(x["episode_turns"] for x in lines) / 3, rel=0.3
    )
    assert [row["max_lag"] for row in found["rows"]] == [0, 1]
    assert all(row["updates_per_hour"] > 0 for row in found["rows"])


# ---------------------------------------------------------------------------------------- bad input


def refuse(*arguments, **speeds):
    done = call(*arguments, **speeds)
    assert done.exit_code == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lags": "0,x"}, "--lags 0,x: expected whole numbers from 0 on, for example 0,1,4"),
        ({"lags": "-1"}, "--lags -1: expected"),
        ({"splits": "1:"}, "--splits 1:: expected ENGINE:LEARNER devices, or a number that both share"),
        ({"splits": "0:4"}, "--splits 0:4: expected"),
        ({"splits": "1:2:3"}, "--splits 1:2:3: expected"),
        ({"updates": 0}, "--updates 0: expected at least 1"),
        ({"latency": -1}, "--latency -1: expected 0 or more"),
        (
            {"latency_kind": "odd"},
            "--latency-kind odd: choose constant, uniform, exponential, lognormal, heavy",
        ),
        ({"decode_rate": 0}, "--decode-rate 0: expected above 0"),
        ({"failures": 2}, "--failures 2: expected between 0 and 1"),
        ({"latency": 1e6}, "update 1 never gets its episodes: "),
    ],
)
def test_bad_numbers_are_refused_in_one_line(options, says):
    assert says in refuse("quickstart", *SIZES, **options)


def test_bad_runs_and_configurations_are_refused_in_one_line(tmp_path, known):
    assert "no run there" in refuse("quickstart", "--from", tmp_path)
    assert "nope" in refuse("nope")
    run = tmp_path / "run"
    seconds = write_run(run, known)
    line = refuse(run / "config.yaml", "--from", run, latency=9)
    assert "--latency 9 does not agree with the run: an update would take " in line
    assert f"but took {seconds:.3g} s" in line
    (run / "metrics.jsonl").write_text('{"update": 1, "sft_loss": 2.0}\n')
    assert "has no update with seconds_cycle" in refuse(run / "config.yaml", "--from", run)
    (run / "metrics.jsonl").write_text("rubbish\n{}\n")
    damaged = call(run / "config.yaml", "--from", run)
    assert damaged.exit_code == 2 and "2 damaged lines are skipped" in damaged.stderr
    assert "has no update with seconds_cycle" in damaged.stderr.splitlines()[-1]
    (run / "metrics.jsonl").unlink()
    assert "no run there (no " in refuse(run / "config.yaml", "--from", run)
