"""``empg-jax rollout``: the episodes that training would play, in a file, without learning."""

import gzip
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.rollout.record import read_episodes
from empg_jax.run.rollouts import rollouts_path
from tests import runs

STEADY = [
    *runs.HOUSE,
    "rollout.deterministic=true",
    "log.rollouts_every=1",
    "sft.updates=0",
    "train.updates=1",
]


def call(*arguments):
    result = CliRunner().invoke(app, ["rollout", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("play") / "run", *STEADY)


def without_credit(record):
    """A record without what only learning adds."""
    added = ("factor", "bonus", "advantage_base", "advantage", "entropy")
    turns = [
        {k: v for k, v in turn.items() if k not in added and not k.startswith("token_")}
        for turn in record["turns"]
    ]
    return {k: v for k, v in record.items() if k != "update"} | {"turns": turns}


@pytest.mark.slow
def test_the_first_weights_play_the_episodes_of_the_first_update(run, tmp_path):
    out = tmp_path / "episodes.jsonl"
    done = call(run / "checkpoints" / "0", "--episodes", 4, "--out", out)
    assert (done.exit_code, done.stdout) == (0, f"{out}\n"), done.stderr
    assert "4 episodes of train with the weights of update 0: trained:" in done.stderr
    played, trained = read_episodes(out), read_episodes(rollouts_path(run, 1))
    assert [without_credit(record) for record in played] == [without_credit(record) for record in trained]
    for ours, theirs in zip(played, trained, strict=True):
        for turn, other in zip(ours["turns"], theirs["turns"], strict=True):
            assert turn["entropy"] == pytest.approx(other["entropy"], rel=1e-3) and "advantage" not in turn


def test_the_newest_weights_play_whole_groups(run, tmp_path):
    out = tmp_path / "episodes.jsonl.gz"
    done = call(run, "rollout.temperature=0.7", "--episodes", 7, "--out", out)
    assert done.exit_code == 0, done.stderr
    records = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    assert [(r["group_id"], r["member"]) for r in records] == [(g, m) for g in range(4) for m in range(2)]
    assert {turn["version"] for r in records for turn in r["turns"]} == {1}
    assert len({(r["group_id"], r["task"]) for r in records}) == 4
    # Its records are input of the credit command.
    config = run / "config.yaml"
    credit = CliRunner().invoke(app, ["credit", str(config), str(out)])
    assert credit.exit_code == 0 and credit.stdout.count('"advantage"') == sum(
        len(r["turns"]) for r in records
    )


def test_a_configuration_plays_with_the_weights_that_it_starts_from(run, tmp_path):
    paths = [tmp_path / name for name in ("run.jsonl", "config.jsonl")]
    assert call(run / "checkpoints" / "0", "--episodes", 2, "--out", paths[0]).exit_code == 0
    assert call(run / "config.yaml", "--episodes", 2, "--out", paths[1]).exit_code == 0
    assert paths[0].read_text() == paths[1].read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.jsonl", "run.jsonl"]  # no run begins


def test_a_run_that_repeats_a_schedule_plays_freely(run, tmp_path):
    """Its schedule belongs to training; the rounds in it are not those of these episodes."""
    copy = shutil.copytree(run, tmp_path / "run")
    schedule = tmp_path / "schedule.jsonl"
    schedule.write_text('{"start": 0}\n')
    repeats = ["train.max_lag=1", "algorithm.entropy_source=learner", f"rollout.schedule={schedule}"]
    paths = [tmp_path / name for name in ("run.jsonl", "repeat.jsonl")]
    assert call(run, "--episodes", 2, "--out", paths[0]).exit_code == 0
    assert call(copy, *repeats, "--episodes", 2, "--out", paths[1]).exit_code == 0
    played, repeated = (
        [(record["task"], [turn["response"] for turn in record["turns"]]) for record in read_episodes(path)]
        for path in paths
    )
    assert len(played) == 2 and repeated == played


def test_bad_input_is_refused_before_anything_is_played(run, tmp_path):
    def refuse(*arguments):
        done = call(*arguments)
        assert done.exit_code == 2 and done.stdout == "", done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    out = ["--out", tmp_path / "x.jsonl"]
    assert "--episodes 0: expected at least 1" in refuse(run, "--episodes", 0, *out)
    assert "expected a file in a folder that exists" in refuse(run, "--episodes", 2, "--out", tmp_path)
    assert "expected a file" in refuse(run, "--episodes", 2, "--out", tmp_path / "no" / "x")
    assert "--out /proc/x.npz cannot be written: " in refuse(run, "--episodes", 2, "--out", "/proc/x.npz")
    assert "is neither a run folder" in refuse(tmp_path, "--episodes", 2, *out)
    assert "nope" in refuse("nope", "--episodes", 2, *out)
    assert list(tmp_path.iterdir()) == []


def watch(*arguments):
    result = CliRunner().invoke(app, ["play", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
def test_a_policy_is_watched_turn_by_turn(run):
    house = "tests.houses:HOUSE"
    code, out, err = watch(house, "--policy", run, "--task", 1, "--seed", 4)
    assert (code, err) == (0, "")
    first, second, *_ = out.splitlines()
    assert first.startswith(f"{house}, task 1 of test: ")  # a held-out task
    assert second == "the policy acts, with the weights of update 1"
    entropies = re.findall(r"(?m)^  \d+ tokens, entropy (\d\.\d+) nats, at most (\d\.\d+)$", out)
    assert 1 <= len(entropies) <= 4 and all(0 < float(mean) <= float(most) for mean, most in entropies)
    assert len(re.findall(r"(?m)^> ", out)) == len(entropies)
    assert re.search(r"(?m)^(won|not won|out of turns|left) after ", out)
    assert watch(house, "--policy", run, "--task", 1, "--seed", 4)[1] == out
    code, out, _ = watch(house, "--policy", run, "--split", "train", "rollout.temperature=0.1")
    assert code == 0 and "of train: " in out
    # Of several panels the first one; a response ends where rollout.stop says.
    several = ["env.eval_split=valid+test", "rollout.stop=[a, e, i, o, u]"]
    code, out, _ = watch(house, "--policy", run, *several)
    counts = [int(count) for count in re.findall(r"(?m)^  (\d+) tokens, ", out)]
    assert code == 0 and "of valid: " in out
    assert counts and max(counts) < 4  # nearly every word has a vowel


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--expert"], "--expert and --policy are two agents: give one of them"),
        (["--task", "99999"], "--task 99999: test has the tasks 0 to "),
        (["levle=easy"], "levle"),
    ],
)
def test_what_cannot_be_watched_is_told(run, arguments, says):
    code, out, err = watch("tests.houses:HOUSE", "--policy", run, *arguments)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
