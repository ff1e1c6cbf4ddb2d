"""``empg-jax credit``: the numbers of training, from a file, without a model and without an environment."""

import gzip
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from tests import runs
from tests.algorithms import step_oracles

TURN = {"reward": 0.0, "valid": True, "tokens": 3, "entropy": 0.5}
PLAIN = ["algorithm.modulation=none"]


def call(*arguments):
    result = CliRunner().invoke(app, ["credit", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def credit(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def column(records, name):
    return np.array([turn[name] for record in records for turn in record["turns"]])


# ------------------------------------------------------------------------------------ hand-made episodes


SUCCESS, STATE = "episodes without success count as failures", "turns without observation or anchor: no two"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("graft", [SUCCESS, STATE, "turns without action or response: no two moves"]),
        ("graph_gpo", [SUCCESS, STATE]),
        ("beacon", ["turns without milestone: no turn reached one"]),
        ("gigpo", [STATE]),
        ("grpo", []),
    ],
)
def test_what_a_method_needs_and_no_record_has_is_said(tmp_path, name, said):
    bare = [{"turns": [TURN]}, {"turns": [TURN | {"reward": 1.0}]}]
    path = write(tmp_path / "e.jsonl", bare)
    found = call("quickstart", path, *PLAIN, f"algorithm.name={name}")
    lines = found.stderr.splitlines()
    assert found.exit_code == 0 and len(lines) == len(said)
    assert all(map(str.startswith, lines, said))
    for turn in ({"action": "go", "anchor": "00ff"}, {"response": "go", "observation": "a room"}):
        told = [{"success": True, "turns": [TURN | turn | {"milestone": True}]}, bare[1]]
        assert not call("quickstart", write(path, told), *PLAIN, f"algorithm.name={name}").stderr


def test_two_episodes_by_hand(tmp_path):
    """Returns 1 and 0: mean 0.5, standard deviation (ddof 1) 0.7071, so the advantages are ±0.7071."""
    won = {"turns": [TURN, TURN | {"reward": 1.0}], "note": "mine"}
    lost = {"turns": [TURN | {"valid": False, "wording": 3}]}
    first, second = credit("quickstart", write(tmp_path / "e.jsonl", [won, lost]), *PLAIN)
    assert [(r["group_id"], r["member"]) for r in (first, second)] == [(0, 0), (0, 1)]
    assert first["note"] == "mine" and second["turns"][0]["wording"] == 3  # what it does not know it keeps
    assert column([first], "advantage") == pytest.approx([0.70711, 0.70711], abs=1e-4)
    assert column([second], "advantage") == pytest.approx([-0.70711], abs=1e-4)
    assert set(column([first, second], "factor")) == {1.0} and set(column([first], "bonus")) == {0.0}
    assert column([first], "advantage_base").tolist() == column([first], "advantage").tolist()


def test_the_order_of_the_file_is_kept_and_changes_nothing(tmp_path):
    rng = np.random.default_rng(0)
    made = [
        {
            "group_id": i // 4,
            "turns": [
                TURN | {"reward": float(rng.integers(3)), "entropy": float(rng.random())} for _ in range(3)
            ],
        }
        for i in range(8)
    ]
    order = rng.permutation(8)
    forwards = credit("quickstart", write(tmp_path / "a.jsonl", made))
    mixed = credit("quickstart", write(tmp_path / "b.jsonl", [made[i] for i in order]))
    assert [record["group_id"] for record in mixed] == [made[i]["group_id"] for i in order]
    for place, i in enumerate(order):
        found, wanted = (column([record], "advantage") for record in (mixed[place], forwards[i]))
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_record_without_a_group_is_not_compared_with_a_given_one(tmp_path):
    records = [{"group_id": 0, "task": 7, "turns": [TURN | {"reward": 1.0}]}, {"task": 0, "turns": [TURN]}]
    found = credit("quickstart", write(tmp_path / "e.jsonl", records), *PLAIN)
    assert [r["group_id"] for r in found] == [0, 8] and column(found, "advantage").tolist() == [0.0, 0.0]


def test_out_takes_the_records(tmp_path):
    path = write(tmp_path / "e.jsonl", [{"turns": [TURN]}, {"turns": [TURN]}])
    result = call("quickstart", path, "--out", tmp_path / "credited.jsonl.gz")
    assert (result.exit_code, result.stdout) == (0, "")
    lines = gzip.decompress((tmp_path / "credited.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line)["turns"][0]["advantage"] for line in lines] == [0.0, 0.0]
    assert call("quickstart", path, "--out", tmp_path / "no" / "folder.jsonl").exit_code == 2


def test_a_critic_is_taken_as_zero_and_that_is_said(tmp_path):
    path = write(tmp_path / "e.jsonl", [{"turns": [TURN, TURN | {"reward": 1.0}]}, {"turns": [TURN]}])
    result = call("quickstart", path, "algorithm.name=ppo", *PLAIN)
    assert result.exit_code == 0 and "values are taken as 0" in result.stderr


@pytest.mark.parametrize("keys", ["name=grpo_empg", "name=grpo_aem aem.scope=batch"])
def test_groups_that_a_filter_drops_do_not_enter_the_modulation(tmp_path, keys):
    """A group of equal returns has the extreme entropies; without it, the other has the same credit."""
    mixed = [
        {"group_id": 0, "turns": [TURN | {"entropy": 0.4 + 0.1 * i}, TURN | {"reward": float(i)}]}
        for i in range(2)
    ]
    uniform = [
        {"group_id": 1, "turns": [TURN | {"entropy": 3.0 * i}, TURN | {"reward": 1.0}]} for i in range(2)
    ]
    changes = [f"algorithm.{key}" for key in ("drop_uniform=group", *keys.split())]
    alone = credit("quickstart", write(tmp_path / "a.jsonl", mixed), *changes)
    both = credit("quickstart", write(tmp_path / "b.jsonl", mixed + uniform), *changes)
    for name in ("factor", "bonus", "advantage"):
        np.testing.assert_allclose(column(both[:2], name), column(alone, name), atol=1e-6)
    assert set(column(both[2:], "factor")) == {1.0} and set(column(both[2:], "bonus")) == {0.0}
    without = credit("quickstart", tmp_path / "b.jsonl", *changes[1:])
    assert np.abs(column(without[:2], "factor") - column(alone, "factor")).max() > 0.01


@pytest.mark.parametrize("turn", [TURN | {"entropy": None, "logprob": None}, {**TURN, "entropy": None}])
def test_entropies_that_a_server_did_not_tell_are_needed_by_a_modulation_alone(tmp_path, turn):
    """Evaluations of a policy behind a server write null where they know none."""
    known = credit("quickstart", write(tmp_path / "k.jsonl", [{"turns": [TURN]}] * 2), *PLAIN)
    path = write(tmp_path / "e.jsonl", [{"turns": [turn | {"token_entropies": [None] * 3}]}] * 2)
    found = credit("quickstart", path, *PLAIN)
    assert column(found, "advantage").tolist() == column(known, "advantage").tolist()
    refused = call("quickstart", path)
    assert refused.exit_code == 2
    assert "line 1, turns[0].entropy: missing" in refused.stderr and "modulation=none" in refused.stderr


@pytest.mark.parametrize("reward", [1e39, -1e300, 10**400])
def test_a_reward_beyond_float32_is_refused(tmp_path, reward):
    path = write(tmp_path / "e.jsonl", [{"turns": [TURN | {"reward": reward}]}])
    result = call("quickstart", path, *PLAIN)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert f"{path}, line 1, turns[0].reward: expected a number within float32" in result.stderr
    twice = write(tmp_path / "t.jsonl", [{"turns": [TURN | {"reward": 3e38}] * 2}])
    assert "the sum of their rewards is 6e+38" in call("quickstart", twice, *PLAIN).stderr


@pytest.mark.parametrize("name", ["ppo", "turn_ppo"])
def test_whitened_advantages_are_told_as_the_loss_uses_them(tmp_path, name):
    """All turns have as many tokens, so the mean of their advantages is 0."""
    path = write(tmp_path / "e.jsonl", [{"turns": [TURN, TURN | {"reward": 1.0}]}, {"turns": [TURN]}])
    found = credit("quickstart", path, f"algorithm.name={name}", *PLAIN)
    assert column(found, "advantage").mean() == pytest.approx(0, abs=1e-5)
    assert column(found, "advantage")[-1] < -0.5 and column(found, "advantage_base")[-1] == 0


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"turns": [{"reward": 1.0, "valid": True, "tokens": 2}]}, "line 1, turns[0].entropy: missing"),
        ({"turns": [TURN | {"reward": "much"}]}, "line 1, turns[0].reward: expected a number"),
    ],
)
def test_bad_records_end_with_one_message(tmp_path, record, says):
    path = write(tmp_path / "e.jsonl", [record])
    result = call("quickstart", path)
    assert result.exit_code == 2 and f"{path}, {says}" in result.stderr and "Traceback" not in result.output


def test_a_missing_file_and_a_bad_key_end_with_one_message(tmp_path):
    assert call("quickstart", tmp_path / "none.jsonl").exit_code == 2
    path = write(tmp_path / "e.jsonl", [{"turns": [TURN]}])
    result = call("quickstart", path, "algorithm.nam=ppo")
    assert result.exit_code == 2 and "algorithm.nam" in result.stderr


def test_it_is_quick_and_loads_no_model(tmp_path):
    """128 episodes of 12 turns, start included. The limit is 5 s; a busy machine gets twelve times that."""
    rng = np.random.default_rng(1)
    turns = [TURN | {"entropy": float(rng.random()), "tokens": int(rng.integers(1, 30))} for _ in range(12)]
    path = write(tmp_path / "e.jsonl", [{"group_id": i // 8, "turns": turns} for i in range(128)])
    code = (
        "import sys; sys.argv[0] = 'empg-jax'; from empg_jax.cli import app; app(standalone_mode=False); "
        "print([name for name in ('transformers', 'orbax') if name in sys.modules], file=sys.stderr)"
    )
    began = time.monotonic()
    command = [sys.executable, "-c", code, "credit", "quickstart", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    assert len(done.stdout.splitlines()) == 128
    assert done.stderr.splitlines()[-1] == "[]"


# -------------------------------------------------------------------------------- records of training


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["env.context=window", "env.history=1", "algorithm.modulation=aem", "env.invalid_penalty=0.1"],
        ["algorithm.name=gigpo", "env.context=window", "env.history=1", "algorithm.entropy_source=learner"],
        ["algorithm.name=reinforce_pp", "algorithm.reward_kl_coef=0", "log.rollouts_tokens=true"],
    ],
    ids=["transcript, empg", "window, aem, penalty", "window, gigpo", "tokens"],
)
@pytest.mark.slow
def test_credit_gives_what_training_used(tmp_path, options):
    """Every file that a run wrote, credited again with the run's own configuration."""
    run = runs.train(tmp_path / "run", *runs.HOUSE, "sft.updates=0", "rollout.group_size=4", *options)
    files = sorted((run / "rollouts").iterdir())
    assert [file.name for file in files] == ["update-000001.jsonl.gz", "update-000003.jsonl.gz"]
    spread = 0.0
    for file in files:
        trained = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        again = credit(run / "config.yaml", file)
        assert [r["member"] for r in trained] == [0, 1, 2, 3] * 2
        for name in ("factor", "bonus", "advantage_base", "advantage"):
            np.testing.assert_allclose(column(again, name), column(trained, name), atol=1e-5, err_msg=name)
        spread = max(spread, float(np.ptp(column(trained, "advantage"))))
        if "log.rollouts_tokens=true" in options:
            check_tokens(trained)
    assert spread > 0.1


@pytest.mark.slow
def test_records_hold_the_environments_rewards_whatever_the_penalty(tmp_path):
    """Every response of a policy that knows nothing is invalid; a short context breaks some episodes."""
    options = ["env.invalid_penalty=0.25", "rollout.max_tokens=64", "train.micro_tokens=256", "eval.tasks=1"]
    run = runs.train(tmp_path / "run", *runs.HOUSE, "sft.updates=0", "train.updates=2", *options)
    found = [
        json.loads(line)
        for file in (run / "rollouts").iterdir()
        for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    assert not any(turn["valid"] for record in found for turn in record["turns"])
    for record in found:
        rewards = [turn["reward"] for turn in record["turns"]]
        assert rewards == [0.0] * (len(rewards) - 1) + [float(record["success"])]
        assert record["return"] == sum(rewards)
        assert (record["status"] == "scored_zero") == (record["reason"] == "context_limit")
    assert {record["status"] for record in found} == {"trained", "scored_zero"}


def check_tokens(records):
    """Token arrays agree with what the turn says of itself."""
    for turn in (turn for record in records for turn in record["turns"]):
        arrays = [turn[f"token_{name}"] for name in ("ids", "logprobs", "entropies", "advantages")]
        assert {len(array) for array in arrays} == {turn["tokens"]}
        means = [np.mean(array) for array in arrays[1:]]
        assert means == pytest.approx([turn["logprob"], turn["entropy"], turn["advantage"]], abs=1e-5)


def as_tables(records):
    """The episodes of a file as the loops take them."""
    shape = (len(records), max(len(record["turns"]) for record in records))
    names = {name: {} for name in ("anchor", "action")}

    def table(name, kind):
        found = np.full(shape, -1 if name in names else 0, kind)
        for i, record in enumerate(records):
            for t, turn in enumerate(record["turns"]):
                value = turn.get(name, 0)
                found[i, t] = names[name].setdefault(value, len(names[name])) if name in names else value
        return found

    last = [names["anchor"].setdefault(r["last_anchor"], len(names["anchor"])) for r in records]
    lengths = np.array([len(record["turns"]) for record in records])
    data = {"last": np.array(last)}
    data |= {"anchors": table("anchor", int), "actions": table("action", int)}
    data |= {"rewards": table("reward", float), "milestones": table("milestone", bool)}
    data |= {"mask": np.arange(shape[1]) < lengths[:, None], "groups": [r["group_id"] for r in records]}
    data["groups"] -= np.min(data["groups"])
    data |= {"success": np.array([r["success"] for r in records])}
    data |= {"returns": np.array([r["return"] for r in records])}
    return data | {"turn_returns": step_oracles.backwards(data, data["rewards"], 0.95)}


@pytest.mark.slow
def test_step_credit_of_a_run_is_that_of_the_loops(tmp_path):
    """A run with CRBC; its episodes credited again, and by other methods, against plain loops."""
    options = ["algorithm.name=crbc_aem", "rollout.group_size=4", "sft.updates=0", "eval.tasks=2"]
    run = runs.train(tmp_path / "run", *runs.HOUSE, *options, "train.updates=1")
    (file,) = (run / "rollouts").iterdir()
    trained = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert all(isinstance(turn["action"], str) for record in trained for turn in record["turns"])
    data = as_tables(trained)
    again = credit(run / "config.yaml", file)
    np.testing.assert_allclose(column(again, "advantage"), column(trained, "advantage"), atol=1e-4)
    assert np.ptp(column(trained, "factor")) > 0
    ends = {"last": data["last"]}
    for name, options in (("crbc", {}), ("graft", {}), ("hgpo", {}), ("beacon", {}), ("graph_gpo", ends)):
        oracle = step_oracles.ORACLES[name]
        words = [f"algorithm.name={name}", *(["algorithm.graph.fail_node=observation"] if options else [])]
        found = column(credit(run / "config.yaml", file, *words), "advantage_base")
        expected = oracle(data, **options)[data["mask"]]
        assert np.ptp(expected) > 0.1, name
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=name)
