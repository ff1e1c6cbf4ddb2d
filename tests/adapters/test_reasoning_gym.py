"""Reasoning Gym's questions, with the real package."""

import pytest

from empg_envs import ENVS, make_env
from tests.adapters.needs import need

need("reasoning_gym")

SUMS = {"dataset": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}


def test_one_turn_scored_by_the_package():
    env = make_env("reasoning_gym", dataset="countdown")
    question, info = env.reset(split="train", index=3)
    assert "target" in question and info["group"] == "countdown" and not info["won"]
    observation, reward, terminated, truncated, info = env.step(f" {env.expert_action()}\n")
    assert (observation, reward, terminated, truncated) == ("", 1.0, True, False)
    assert info["won"] and info["metrics"] == {"score": 1.0, "scorer_error": 0.0}
    env.reset(split="train", index=3)
    assert 0 < env.step("1 + 1")[1] < 0.1  # the package pays a little for a wrong answer
    env.reset(split="train", index=3)
    assert env.step("__import__('os')")[1] < 0.1


def test_a_scorer_that_fails_scores_nothing():
    env = make_env("reasoning_gym", dataset="prime_factorization")
    env.reset(split="train", index=0)
    _, reward, terminated, _, info = env.step("look ()[] **")
    assert reward == 0.0 and terminated and info["metrics"]["scorer_error"] == 1.0


PROGRAMS = [
    "__import__('os')",
    "exec('import reasoning_gym.games.countdown as c; c.CountdownDataset.score_answer=lambda *a, **k: 1.0')",
    "(exec)('1')",
    "[f('1') for f in [exec]]",
    "exec \\\n('1')",
    "\N{FULLWIDTH LATIN SMALL LETTER E}xec('1')",
    "f\"{exec('1')}\"",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_no_answer(program, monkeypatch):
    """SymPy would run it in the worker, where it can replace the scorer of all later episodes."""
    env = make_env("reasoning_gym", dataset="countdown")
    env.reset(split="train", index=3)
    with monkeypatch.context() as patched:
        patched.setattr("reasoning_gym.games.countdown.parse_expr", pytest.fail)
        _, reward, terminated, _, info = env.step(program)
    assert reward == 0.0 and terminated and info["metrics"]["scorer_error"] == 1.0
    env.reset(split="train", index=3)
    assert env.step(env.expert_action())[1] == 1.0


COMPUTING = """binary_matrix countdown intermediate_integration n_queens polynomial_multiplication
propositional_logic puzzle24 simple_integration spiral_matrix string_insertion"""


@pytest.mark.parametrize("dataset", COMPUTING.split())
def test_scorers_that_compute_take_the_packages_answers(dataset):
    env = make_env("reasoning_gym", dataset=dataset)
    for index in range(20):
        env.reset(split="train", index=index)
        answer = env.get_task("train", index)["answer"]
        assert env.step(answer)[4]["metrics"]["scorer_error"] == 0.0, answer


@pytest.mark.parametrize("answer", ["nan", "nan+nanj", " NaN"])
def test_what_is_no_number_is_no_answer(answer):
    """The package takes a distance that is no number for none."""
    env = make_env("reasoning_gym", dataset="complex_arithmetic")
    env.reset(split="train", index=0)
    _, reward, _, _, info = env.step(answer)
    assert reward == 0.0 and not info["won"] and info["metrics"]["scorer_error"] == 1.0
    env.reset(split="train", index=0)
    assert env.step(env.expert_action())[1] == 1.0


def test_splits_share_no_question_though_there_are_few():
    """Of 200 sums many are asked twice, but never in two splits."""
    env = make_env("reasoning_gym", **SUMS, tasks=300, held_out=40)
    asked = {
        split: {env.get_task(split, index)["question"] for index in range(env.num_tasks(split))}
        for split in env.list_splits()
    }
    assert {split: len(found) > 15 for split, found in asked.items()} == {
        "train": True,
        "valid": True,
        "test": True,
    }
    assert sum(map(len, asked.values())) == len(set().union(*asked.values()))


def test_a_dataset_too_small_to_hold_out_is_told():
    env = make_env("reasoning_gym", dataset="coin_flip", params={"min_trials": 3, "max_trials": 3})
    with pytest.raises(ValueError, match="has too few different ones with these parameters"):
        for index in range(3):
            for split in env.list_splits():
                env.reset(split=split, index=index)


def test_several_datasets_at_levels_of_their_curricula():
    entries = [
        {"name": "chain_sum", "weight": 3, "level": 0},
        "gcd",
        {"name": "lcm", "params": {"max_numbers": 2}},
    ]
    env = make_env("reasoning_gym", dataset=entries, level=1)
    groups = [env.reset(split="train", index=index)[1]["group"] for index in range(60)]
    assert set(groups) == {"chain_sum", "gcd", "lcm"} and groups.count("chain_sum") > 20
    for index in range(60):
        question, info = env.reset(split="train", index=index)
        assert info["group"] != "chain_sum" or len(question.split()) <= 13  # level 0 has two terms
        assert env.step(env.expert_action())[1] == 1.0


def test_the_whole_answer_counts_without_the_thought():
    parser = ENVS["reasoning_gym"].parser()
    parsed = parser("<think>1 + 1</think>\n3 1\n2 4\n", {})
    assert parsed.action == "3 1\n2 4" and parsed.is_valid
    assert ENVS["reasoning_gym"].timeout_outcome == "zero"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "chain_sums"}, "reasoning_gym has no dataset 'chain_sums'; did you mean 'chain_sum'"),
        ({"dataset": []}, "reasoning_gym cannot make : Must specify at least one dataset"),
        ({"dataset": ["gcd", "gcd"]}, "Duplicate dataset names"),
        (
            {"dataset": [{"name": "gcd", "levle": 1}]},
            "unknown key 'levle'; its keys are name, weight, params, level",
        ),
        ({"params": {"max_terms": 0}}, "reasoning_gym cannot make chain_sum: max_terms must be"),
        ({"params": {"terms": 0}}, "reasoning_gym cannot make chain_sum: .*'terms'"),
        ({"level": "easy"}, "level='easy' of dataset chain_sum: expected a number from 0"),
        ({"dataset": "composite", "level": 1}, "dataset composite has no curriculum"),
        ({"held_out": 0}, "valid must have 1 to"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        make_env("reasoning_gym", **options)
