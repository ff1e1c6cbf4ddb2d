"""The command line: what it calls, what it prints, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.config import load_config
from empg_jax.config.load import RESUMABLE_KEYS
from empg_jax.errors import RunError, Stopped
from empg_jax.metrics import METRICS
from empg_jax.run.folder import write_run_info
from tests import runs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch):
    """Runs a command line in this process; returns exit code, stdout, stderr."""

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


def _fake(monkeypatch, name, **attributes):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**attributes))


def _fake_trainer(monkeypatch, train):
    _fake(monkeypatch, "empg_jax.trainer", train=train)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A trainer that only remembers how it was called."""
    calls = []

    def train(config, *, resume=None):
        calls.append((config, resume))
        return tmp_path

    _fake_trainer(monkeypatch, train)
    return calls


def test_the_help_of_resume_names_every_key_that_may_change():
    (option,) = (o for o in get_command(app).commands["train"].params if o.name == "resume")
    assert option.help.endswith(f"; only {', '.join(RESUMABLE_KEYS)} may change.")


def test_train_hands_over_the_config_and_prints_the_folder_last(run, trained, tmp_path):
    code, out, err = run("train", "quickstart", "algorithm.modulation=aem", "seed=3")
    config, resume = trained[0]
    assert (code, resume, config.seed, config.algorithm.modulation) == (0, None, 3, "aem")
    assert (out, err) == (f"{tmp_path}\n", "")


def test_resume_takes_the_config_of_the_run(run, trained, tmp_path):
    write_run_info(tmp_path, load_config("quickstart", ["seed=5"]))
    code, _, _ = run("train", "--resume", tmp_path, "train.updates=300", "log.progress=false")
    config, resume = trained[0]
    assert (code, resume, config.seed, config.train.updates) == (0, tmp_path, 5, 300)
    assert config.name == "quickstart" and not config.log.progress


def test_resume_refuses_to_become_another_experiment(run, trained, tmp_path):
    write_run_info(tmp_path, load_config("quickstart"))
    code, _, err = run("train", "--resume", tmp_path, "seed=5")
    assert code == 2 and "seed=5: a resumed run may change only" in err and not trained


def _made(run_dir, *, updates, finished):
    """A run folder that says so many updates were made."""
    write_run_info(run_dir, load_config("quickstart", ["train.updates=5", "train.warmup_updates=0"]))
    (run_dir / "checkpoints" / str(updates)).mkdir(parents=True)
    if finished:
        (run_dir / "summary.json").write_text(json.dumps({"updates": updates}))


def test_a_finished_run_is_not_begun_again(run, trained, tmp_path):
    _made(tmp_path, updates=5, finished=True)
    code, out, err = run("train", "--resume", tmp_path)
    assert (code, out) == (0, f"{tmp_path}\n") and not trained
    assert "is finished: all 5 updates are made" in err
    assert run("train", "--resume", tmp_path, "train.updates=6")[0] == 0 and len(trained) == 1


def test_a_run_cut_off_at_its_last_update_goes_on(run, trained, tmp_path):
    _made(tmp_path, updates=5, finished=False)
    assert run("train", "--resume", tmp_path)[0] == 0 and len(trained) == 1


def test_updates_cannot_be_unmade(run, trained, tmp_path):
    _made(tmp_path, updates=5, finished=True)
    code, out, err = run("train", "--resume", tmp_path, "train.updates=2")
    assert (code, out) == (2, "") and not trained
    assert "train.updates=2" in err and "has made 5 updates already" in err


def test_the_glossary_is_printed(run):
    code, out, _ = run("metrics")
    assert code == 0 and len(out.splitlines()) == len(METRICS)
    for line, (name, meaning) in zip(out.splitlines(), METRICS.items(), strict=True):
        assert line.split(maxsplit=1) == [name, meaning]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "name a configuration"),
        (["train", "quickstat"], "did you mean quickstart?"),
        (["train", "quickstart", "train.updats=1"], "did you mean train.updates?"),
        (["train", "quickstart", "env.name=houshold"], "did you mean 'household'?"),
        (
            ["train", "quickstart", "env.name=null", "env.entry_point=no.such:Env"],
            "env.entry_point=no.such:Env",
        ),
        (["train", "--resume", "nowhere"], "--resume nowhere: no run there"),
        (["sft", "quickstart", "sft.updates=0"], "sft.updates=0: nothing to do"),
        (["eval", "nowhere"], "nowhere is not a folder"),
        (["config"], "name a configuration"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_exit_code_2(run, trained, arguments, says):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and not trained
    assert says in err and err.startswith("error: ") and "Traceback" not in err


def _failing(error):
    def train(config, *, resume=None):
        raise error

    return train


def test_a_failed_run_is_one_message_and_exit_code_1(run, monkeypatch):
    _fake_trainer(monkeypatch, _failing(RunError("the loss of update 7 is not finite")))
    assert run("train", "quickstart") == (1, "", "error: the loss of update 7 is not finite\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(run, monkeypatch, signum, code):
    _fake_trainer(monkeypatch, _failing(Stopped(signum, Path("there"))))
    exit_code, out, err = run("train", "quickstart")
    assert (exit_code, out) == (code, "") and "empg-jax train --resume there" in err


def test_an_unexpected_failure_keeps_its_traceback(run, monkeypatch):
    _fake_trainer(monkeypatch, _failing(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        run("train", "quickstart")


def test_eval_turns_options_into_overrides(run, monkeypatch, tmp_path):
    calls = []
    result = {"eval_success": 0.5, "eval_tasks": 10}

    def evaluate(*arguments, out):
        calls.append(arguments)
        return result

    _fake(monkeypatch, "empg_jax.evaluate", evaluate_run=evaluate)
    code, out, _ = run("eval", tmp_path, "seed=1", "--tasks", 10, "--split", "valid", "--temperature", 0)
    assert code == 0 and json.loads(out) == result
    path, overrides = calls[0]
    assert path == tmp_path
    assert overrides == ["seed=1", "eval.tasks=10", 'env.eval_split="valid"', "eval.temperature=0.0"]
    assert load_config("quickstart", overrides).env.eval_split == "valid"


def test_sft_prints_the_folder(run, monkeypatch, tmp_path):
    _fake(monkeypatch, "empg_jax.trainer", run_sft=lambda config: tmp_path / str(config.sft.updates))
    assert run("sft", "quickstart", "sft.updates=7")[:2] == (0, f"{tmp_path / '7'}\n")


def test_config_prints_what_will_run(run, tmp_path):
    code, out, _ = run("config", "quickstart", "seed=9")
    (tmp_path / "quickstart.yaml").write_text(out)
    assert code == 0 and load_config(tmp_path / "quickstart.yaml") == load_config("quickstart", ["seed=9"])


def test_config_lists_every_key(run):
    code, out, _ = run("config", "--keys")
    assert code == 0 and "algorithm.empg.zeta" in out and "log.transcripts" in out
    (line,) = [line for line in out.splitlines() if line.startswith("train.schedule ")]
    assert line.split()[1] == "linear" and line.endswith("Choices: linear, cosine, constant.")
    (line,) = [line for line in out.splitlines() if line.startswith("hosts.enabled ")]
    assert line.endswith("Choices: auto, true, false.")
    code, _, err = run("config", "quickstart", "hosts.enabled=flase")
    assert code == 2 and err.splitlines()[1:] == [
        "  hosts.enabled='flase': unknown choice (did you mean false?); choose auto or true or false"
    ]


def _python(code, *arguments, stderr=subprocess.PIPE):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["config", "quickstart"], ["train", "nope"]]
)
def test_quick_answers_load_no_jax(arguments):
    code = (
        "import sys, empg_jax.cli as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'flax', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    process = _python(code, *arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.endswith("[]\n")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_exit_code(sent, code):
    trainer = (
        "import signal, sys, time, types\n"
        # A shell that starts the tests in the background lets everything below it ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def train(config, *, resume=None):\n"
        "    try:\n"
        "        print('training', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally: print('saved', flush=True)\n"
        "sys.modules['empg_jax.trainer'] = types.SimpleNamespace(train=train)\n"
        "from empg_jax.cli import main\n"
        "main()"
    )
    process = _python(trainer, "train", "quickstart")
    assert process.stdout.readline() == "training\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "saved\n"), err
    assert "Traceback" not in err


@pytest.mark.parametrize("make", [os.pipe, os.openpty])
def test_a_run_whose_messages_nobody_reads_ends_as_any_other(make):
    trainer = (
        "import pathlib, sys, types\n"
        "from empg_jax.errors import Stopped\n"
        "from empg_jax.report.progress import Progress\n"
        "def train(config, *, resume=None):\n"
        "    with Progress() as progress:\n"
        "        for phase in ('warm start', 'RL'):\n"
        "            progress.phase(phase, 2, 'updates')\n"
        "            progress.message('a message')\n"
        "            progress.advance(1, {})\n"
        "    print('saved', flush=True)\n"
        "    raise Stopped(2, pathlib.Path('there'))\n"
        "sys.modules['empg_jax.trainer'] = types.SimpleNamespace(train=train)\n"
        "from empg_jax.cli import main\n"
        "main()"
    )
    ends = make()
    process = _python(trainer, "train", "quickstart", stderr=ends[1])
    for end in ends:  # long before the first message
        os.close(end)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "saved\n")


def test_a_signal_at_the_very_end_is_no_traceback():
    late = "import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    process = runs.start(["config", "--list"], code=f"from empg_jax.cli import main; {late}; main()")
    out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT and out and "Traceback" not in err, err
