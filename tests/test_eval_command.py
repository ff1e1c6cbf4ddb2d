"""`empg-jax eval` as a person calls it: a run, a checkpoint, an exported model; attempts, groups, files."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from serving import serving
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.config import load_config
from empg_jax.config.model_source import FOR_LANGUAGE_MODELS, load_for_model
from empg_jax.errors import ConfigError
from empg_jax.report.evaluation import estimate_success, render_evaluation
from empg_jax.rollout.record import read_episodes
from empg_jax.run.attempts import Attempts
from empg_jax.run.lock import locked
from tests import runs
from tests.episodes import Episodes

PRESETS = ["qwen2.5-0.5b", "qwen3-0.6b"]
EPISODES = Episodes()


def call(*arguments):
    """Runs a command line; returns exit code, stdout, stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    short = ["train.updates=1", "sft.updates=0", "eval.tasks=4"]
    return runs.train(tmp_path_factory.mktemp("eval") / "run", *runs.HOUSE, *short)


@pytest.fixture(scope="module")
def attempted(run_dir):
    """The result of four attempts at each of six tasks."""
    code, out, err = call("eval", run_dir, "--attempts", 4, "--tasks", 6)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.slow
def test_attempts_differ_and_are_averaged_over_tasks(attempted):
    assert (attempted["attempts"], attempted["eval_tasks"], attempted["eval_missing"]) == (4, 6, 0)
    assert attempted["mean@k"].keys() == {"4"} and attempted["pass@k"].keys() == {"1", "2", "4"}
    assert attempted["mean@k"]["4"]["value"] == pytest.approx(attempted["eval_success"], abs=1e-6)
    assert attempted["pass@k"]["1"]["value"] == attempted["mean@k"]["4"]["value"]
    passes = [attempted["pass@k"][k]["value"] for k in ("1", "2", "4")]
    assert passes == sorted(passes)
    # Every third text wins: with equal sampling keys all attempts at a task would end alike.
    assert passes[0] < passes[-1]
    for found in (*attempted["mean@k"].values(), *attempted["pass@k"].values()):
        low, high = found["interval"]
        assert low < high and low <= found["value"] <= high and found["tasks"] == 6


def test_groups_of_the_environment_have_rows(run_dir, attempted):
    groups = attempted["groups"]
    assert groups and sum(each["mean@k"]["4"]["tasks"] for each in groups.values()) == 6
    table = (run_dir / "eval" / "eval.md").read_text()
    records = read_episodes(run_dir / "rollouts" / "update-000001.jsonl.gz")
    assert all(record["group"] for record in records)  # those of training say it, too
    for name in groups:
        assert f"| {name} | " in table
    assert "| group | tasks | mean@4, 95 % interval | pass@1, 95 % interval |" in table


def test_files_lie_in_the_runs_folder_or_where_one_says(run_dir, attempted, tmp_path):
    assert json.loads((run_dir / "eval" / "eval.json").read_text()) == attempted
    assert attempted["env_options"] == load_config(run_dir / "config.yaml").env.options
    code, out, err = call("eval", run_dir / "checkpoints" / "1", "--tasks", 2, "--out", tmp_path / "new")
    assert code == 0 and json.loads((tmp_path / "new" / "eval.json").read_text()) == json.loads(out)
    assert str(tmp_path / "new" / "eval.md") in err
    assert json.loads((run_dir / "eval" / "eval.json").read_text()) == attempted
    assert attempted["env_options"] == load_config(run_dir / "config.yaml").env.options


def test_the_same_command_goes_on(run_dir, attempted, tmp_path, monkeypatch):
    command = ["eval", run_dir, "--attempts", 4, "--tasks", 6, "--out", tmp_path / "new"]

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Attempts, "finish", die)
        assert call(*command)[0] == 130
    (partial,) = (tmp_path / "new").iterdir()
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 24
    partial.write_text("".join(lines[:9]) + lines[9][:50])  # what a kill leaves
    code, out, err = call(*command)
    assert code == 0 and "going on: 9 of 24 attempts were finished before" in err
    entropy = json.loads(out)["eval_entropy"]
    unequal = {"eval_entropy": 0, "eval_resumed": 9}
    assert {**json.loads(out), "eval_entropy": 0} == {**attempted, **unequal}
    # A turn is kept with its mean, not with every token.
    assert entropy == pytest.approx(attempted["eval_entropy"], rel=1e-5)
    assert json.loads(call("compare", run_dir, tmp_path / "new")[1])["gained"] == 0


def test_a_checkpoint_has_a_folder_of_its_own_and_the_runs_evaluation_stays(run_dir, attempted):
    code, out, err = call("eval", run_dir / "checkpoints" / "1", "--tasks", 2)
    assert code == 0 and str(run_dir / "eval" / "step-1" / "eval.md") in err
    assert json.loads((run_dir / "eval" / "step-1" / "eval.json").read_text()) == json.loads(out)
    assert json.loads((run_dir / "eval" / "eval.json").read_text()) == attempted
    assert "gained" in json.loads(call("compare", run_dir / "eval" / "step-1", run_dir)[1])


def test_a_stdout_that_takes_nothing_costs_no_evaluation(run_dir, tmp_path):
    command = [sys.executable, "-c", "from empg_jax.cli import main; main()", "eval", str(run_dir)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--tasks", "2", "--out", str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=runs.ROOT,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.endswith("error: the result cannot be written to stdout: No space left on device\n")
    assert json.loads((tmp_path / "eval.json").read_text())["eval_tasks"] == 2
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_behind_our_own_server_a_run_does_the_same(run_dir, tmp_path):
    greedy = ["--tasks", 4, "--temperature", 0]
    here = json.loads(call("eval", run_dir, *greedy, "--out", tmp_path / "here")[1])
    with serving(tmp_path, "serve", run_dir, "serve.slots=2", "serve.warm_up=false") as server:
        given = ["--config", "quickstart", *runs.TINY, *runs.HOUSE]
        code, out, err = call("eval", server.url, *given, *greedy, "--out", tmp_path / "there")
    there = json.loads(out)
    assert code == 0 and there["model"] == server.model, err
    for name in ("eval_success", "eval_return", "eval_turns", "eval_invalid_actions", "eval_env_steps"):
        assert there[name] == here[name], name
    assert there["eval_entropy"] == pytest.approx(here["eval_entropy"], rel=1e-3)
    assert json.loads(call("compare", tmp_path / "here", tmp_path / "there")[1])["gained"] == 0


def test_one_attempt_is_what_it_was_before(run_dir, tmp_path):
    result = json.loads(call("eval", run_dir, "--out", tmp_path)[1])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert result["eval_success"] == summary["eval_success_after"]
    assert (result["step"], result["split"], result["eval_tasks"], result["attempts"]) == (1, "test", 4, 1)
    assert result["mean@k"]["1"] == result["pass@k"]["1"] and result["mean@k"]["1"]["method"] == "wilson"
    assert (
        "mean@1" in (tmp_path / "eval.md").read_text() and "pass@" not in (tmp_path / "eval.md").read_text()
    )


def test_a_split_that_does_not_exist_makes_no_folder(run_dir, tmp_path):
    code, out, err = call("eval", run_dir, "--split", "nosplit", "--out", tmp_path / "new")
    assert (code, out) == (2, "") and "error: env.eval_split=nosplit does not exist" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["eval", "rollout"])
def test_a_run_that_trains_through_its_server_keeps_its_weights_there(command, run_dir, tmp_path):
    run, url = tmp_path / "run", "http://127.0.0.1:1"
    shutil.copytree(run_dir, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["rollout"] |= {"engine": "openai", "url": url}
    config["algorithm"] |= {"entropy_source": "learner"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = ["--tasks", 1] if command == "eval" else ["--episodes", 1, "--out", tmp_path / "episodes.jsonl"]
    here = ["rollout.engine=builtin", "rollout.url=null"]
    with locked(run):
        code, said, err = call(command, run, *out)
        assert (code, said) == (2, "")
        assert f"{run} is being trained through {url}, whose weights this would replace: sample here" in err
        assert " ".join(here) in err
        elsewhere = call(command, run, *out, "rollout.url=http://127.0.0.1:2")[2]
        assert "being trained" not in elsewhere and "127.0.0.1:2" in elsewhere
        assert call(command, run, *out, *here)[0] == 0
    assert "being trained" not in call(command, run, *out)[2]  # nobody trains: only the server is missing


def test_where_no_first_prompt_fits_the_cause_is_named(run_dir, tmp_path):
    where = ("--split", "train", "--tasks", 2, "--out", tmp_path / "new")
    code, out, err = call("eval", run_dir, *where, "env.options.wordy=2")
    assert (code, out) == (1, "")
    assert (
        "error: none of the 2 tasks of train could be attempted; the last failure: prompt_too_long: " in err
    )
    assert err.endswith(" tokens, but rollout.max_tokens=96: no response fits\n")


def test_more_tasks_than_there_are_is_said_once(run_dir, tmp_path):
    options = ["env.options.level=tiny", "rollout.slots=64", "env.max_turns=1", "log.progress=true"]
    code, out, err = call("eval", run_dir, *options, "--tasks", 100_000, "--out", tmp_path)
    tasks = json.loads(out)["eval_tasks"]
    assert (
        code == 0
        and f"evaluation: {tasks} episodes" in err
        and err.count("eval.tasks=100000") == 1
        and f"test has {tasks} tasks" in err
    )


def test_an_exported_model_is_played_by_a_configuration(run_dir, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    assert call("export", run_dir, "--out", model)[0] == 0
    same = [*runs.TINY, *runs.HOUSE, f"model.tokenizer={model}"]
    given = ["--config", "quickstart", "--tasks", 4]
    code, said, err = call("eval", model, *same, *given, "--out", out)
    found = json.loads(said)
    assert code == 0 and (found["step"], found["source"], found["eval_tasks"]) == (0, str(model), 4), err
    # The weights are those of the run, and the sampling keys are those of an evaluation.
    run = json.loads(call("eval", run_dir, "--out", tmp_path / "run")[1])
    assert found["eval_success"] == run["eval_success"]
    assert found["eval_entropy"] == pytest.approx(run["eval_entropy"], rel=1e-3)
    assert json.loads((out / "eval.json").read_text()) == found
    assert not (model / "eval").exists()


def test_a_model_needs_an_environment(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, out, err = call("eval", tmp_path)
    assert (code, out) == (2, "") and "is a model, not a run" in err and "--env NAME or --config" in err


def test_a_run_has_its_configuration(run_dir):
    code, out, err = call("eval", run_dir, "--env", "household")
    assert (code, out) == (2, "") and "is a run, which has its configuration" in err


def test_a_model_in_an_environment_has_the_prompts_of_its_packaged_configuration(run_dir, tmp_path):
    model = tmp_path / "model"
    assert call("export", run_dir, "--out", model)[0] == 0
    small = ["rollout.max_tokens=512", "rollout.max_response_tokens=8", "train.micro_tokens=512"]
    small += ["env.max_turns=2", "workers.num=1", "model.dtype=float32", "compile_cache=null"]
    code, out, err = call("eval", model, "--env", "household", *small, "--tasks", 2, "--attempts", 2)
    found = json.loads(out)
    assert code == 0 and "prompts and lengths are those of household_qwen2.5_7b" in err, err
    assert (found["env"], found["eval_tasks"], found["attempts"]) == ("household", 2, 2)
    assert "eval.md" not in err  # nothing is written into a model's folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing", "--env", "household"], "neither a folder, nor a hub id"),
        (["qwen2.5-0.5", "--env", "household"], "did you mean qwen2.5-0.5b?"),
        (["qwen2.5-0.5b", "--env", "houshold"], "--env houshold: unknown (did you mean household?)"),
        (["qwen2.5-0.5b", "--config", "quickstart", "--env", "swe"], "quickstart is for household"),
        (["qwen2.5-0.5b", "--config", "quickstat"], "did you mean quickstart?"),
        (["qwen2.5-0.5b", "--env", "household", "--out", "no/such/folder"], "--out no/such/folder"),
    ],
    ids=" ".join,
)
def test_mistakes_are_refused_before_anything_is_loaded(arguments, says):
    code, out, err = call("eval", *arguments)
    assert (code, out) == (2, "") and says in err and "Traceback" not in err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "eval").touch()  # where the run's evaluation would lie
    code, out, err = call("eval", tmp_path)
    assert (code, out) == (2, "")
    assert err == (
        f"error: {tmp_path / 'eval'} cannot be written: Not a directory; --out FOLDER names another\n"
    )
    assert call("eval", tmp_path, "--out", "/proc")[2].startswith("error: --out /proc cannot be written: ")


@pytest.mark.parametrize("env", FOR_LANGUAGE_MODELS)
def test_every_environment_has_a_configuration_for_language_models(env):
    said = []
    config = load_for_model("owner/name", ["seed=3"], env=env, config=None, presets=PRESETS, say=said.append)
    assert (config.env.target, config.model.path, config.seed) == (env, "owner/name", 3)
    assert config.mesh.fsdp == config.mesh.tensor == config.rollout.tensor == config.rollout.data == 1
    assert config.env.eval_split == load_config(FOR_LANGUAGE_MODELS[env]).env.eval_split
    assert FOR_LANGUAGE_MODELS[env] in said[0]


def test_presets_and_entry_points(tmp_path):
    options = {"config": None, "presets": PRESETS, "say": print}
    config = load_for_model("qwen3-0.6b", [], env="tests.houses:HOUSE", **options)
    assert (config.env.target, config.model.preset) == ("tests.houses:HOUSE", "qwen3-0.6b")
    with pytest.raises(ConfigError, match=r"is no model: there is no config\.json"):
        load_for_model(str(tmp_path), [], env="household", **options)


def test_tasks_with_too_few_results_have_no_part_in_pass_at_k():
    outcomes = {0: [True, False], 1: [False], 2: [True, True]}  # one attempt of task 1 is missing
    episodes = [
        EPISODES.transcript([(2, 1)], task=task, is_success=won)
        for task, results in outcomes.items()
        for won in results
    ]
    found = estimate_success(episodes, 2)
    assert found["mean@k"]["2"]["value"] == 0.5 and found["mean@k"]["2"]["tasks"] == 3
    assert found["pass@k"]["1"]["value"] == 0.5 and found["pass@k"]["2"] | {"interval": 0} == {
        "value": 1.0, "interval": 0, "method": "wilson", "tasks": 2,
    }  # fmt: skip
    assert found["groups"] == {}
    rows = [line for line in render_evaluation(found).splitlines() if line.startswith("| all tasks")]
    assert len(rows) == 1 and "50.0% [" in rows[0]
