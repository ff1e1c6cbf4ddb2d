"""Bad input of commands: one readable message, exit code 2, nothing written."""

import json
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from empg_envs.alfworld.files import find_root
from empg_envs.rows import find_files
from empg_envs.task_lines import read_tasks
from empg_envs.template import read_template
from empg_jax.cli import app
from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.hf.hub import find_folder
from empg_jax.run import parts
from empg_jax.run.lock import locked
from empg_jax.run.process import cache_folder
from empg_jax.run.splits import check_splits
from tests import runs

OWN = ["env.name=null", "env.entry_point=mine:Env"]
ENV = "class Env:\n    def __init__(self, length=3, *, width=1): pass\n"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The current folder, on no path yet; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("mine", None)


def refuse(*arguments):
    """Runs a command line that must be refused; returns its message."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2 and result.stdout == "", result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("name", "override", "says"),
    [
        (
            "quickstart",
            "env.options.levle=tiny",
            "env.options: environment household has no option 'levle' (did you mean 'level'?); "
            "its options are level, style, max_turns\n",
        ),
        (
            "alfworld_verl",
            "env.prompt_options.stile=verl",
            "env.prompt_options: environment alfworld has no prompt option 'stile' (did you mean 'style'?); "
            "its prompt options are style, list_admissible, parser, template\n",
        ),
        ("deepsearch_tiny", "env.options.topn=1", "deepsearch has no option 'topn' (did you mean 'topk'?)"),
        ("webshop_tiny", "env.options.qqq=1", "webshop has no option 'qqq'; its options are level, style,"),
        ("swe_tiny", "env.options.bakend=docker", "swe has no option 'bakend' (did you mean 'backend'?)"),
    ],
)
def test_an_option_that_does_not_exist_is_named(tmp_path, name, override, says):
    line = refuse("train", name, override, f"run_dir={tmp_path / 'run'}")
    assert says in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "options", "prompt_options"),
    [
        ("alfworld", "{}", "{}"),
        ("webshop", "{level: tiny, style: page}", "{style: page, parser: tags}"),
        ("household", "{style: alfworld}", "{style: alfworld, parser: tags}"),
    ],
)
def test_a_warm_start_that_the_parser_of_tags_rejects_is_refused(tmp_path, name, options, prompt_options):
    changes = (f"env.name={name}", f"env.options={options}", f"env.prompt_options={prompt_options}")
    line = refuse("train", "quickstart", *changes, f"run_dir={tmp_path / 'run'}")
    assert (
        f"env.prompt_options.parser=tags: the expert of {name} shows bare actions with sft.updates=130"
        in line
    )
    assert not (tmp_path / "run").exists()


def test_options_of_an_environment_of_ones_own_are_checked(folder):
    (folder / "mine.py").write_text(ENV)
    line = refuse("train", "quickstart", *OWN, "env.options.lenght=2")
    assert "mine:Env has no option 'lenght' (did you mean 'length'?); its options are length, width" in line
    line = refuse("train", "quickstart", *OWN, "env.prompt_options.style=a")
    assert "mine:Env has no prompt option 'style'; it has no prompt options" in line


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            None,
            "cannot import 'mine'; expected 'package.module:attribute', in the current folder or installed",
        ),
        ("class Env(:\n", "mine cannot be imported: SyntaxError: "),
        ("\n\nundefined\n", "mine cannot be imported: NameError: name 'undefined' is not defined ("),
        ("class Evn: pass\n", "module 'mine' has no attribute 'Env'; did you mean 'Evn'?"),
        ("Env = 3\n", "is a int; expected an EnvSpec or a callable"),
        ("import no_such_thing\n", "cannot import 'no_such_thing'"),
    ],
)
def test_what_is_wrong_with_an_entry_point_is_told(folder, source, says):
    if source is not None:
        (folder / "mine.py").write_text(source)
    line = refuse("train", "quickstart", *OWN)
    assert line.startswith("error: env.entry_point=mine:Env: ") and says in line


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def __init__(self): raise OSError('no licence')", "OSError: no licence"),
        ("def reset(self, seed, split, index): pass", "'Env' object has no attribute 'list_splits'"),
    ],
)
def test_an_environment_that_no_worker_can_open_leaves_no_run_behind(folder, body, says):
    (folder / "mine.py").write_text(f"class Env:\n    {body}\n")
    line = refuse_last("train", "quickstart", *runs.TINY, *OWN, "sft.updates=0", "model.tokenizer=bytes")
    assert "(environment 'mine:Env') failed to start 3 times in a row" in line and says in line
    assert not list((folder / "runs").iterdir())


def test_an_open_vocabulary_is_read_as_bytes_and_said_first(folder):
    (folder / "mine.py").write_text(ENV)
    done = CliRunner().invoke(app, ["config", "quickstart", *OWN])
    assert done.exit_code == 0
    first, second = done.stderr.splitlines()
    assert "env.options of the configuration are left out" in first
    assert "mine:Env has no closed vocabulary" in second and "model.tokenizer=bytes" in second
    assert CliRunner().invoke(app, ["config", "quickstart", *OWN, "model.tokenizer=bytes"]).stderr == (
        first + "\n"
    )


def test_a_style_without_closed_vocabulary_names_the_byte_tokenizer(tmp_path):
    run = ["train", "quickstart", f"run_dir={tmp_path / 'run'}"]
    assert "model.tokenizer=bytes reads any text" in refuse(*run, "env.options.style=alfworld")
    assert list(tmp_path.iterdir()) == []


def test_missing_devices_are_counted_before_a_folder_is_made(tmp_path):
    run = ["train", "quickstart", f"run_dir={tmp_path / 'run'}", "train.micro_tokens=4096"]
    line = refuse(*run, "mesh.data=16")
    assert "mesh.data=16 needs 16 devices, but 8 devices are there (cpu)" in line
    line = refuse(*run, "rollout.data=16")
    assert "rollout.data=16 needs 16 devices" in line and list(tmp_path.iterdir()) == []


def test_a_place_of_checkpoints_that_cannot_be_had_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["train", "quickstart", "log.progress=false"]
    said = refuse_last(*run, "run_dir=run", "checkpoint.dir=/proc/new/x")
    assert "checkpoint.dir=/proc/new/x cannot be written: " in said
    with locked(tmp_path / "busy"):
        assert "is being trained by process" in refuse_last(*run, "checkpoint.dir=busy")
    assert [path.name for path in tmp_path.iterdir()] == ["busy"]


def test_brackets_without_end_are_refused():
    assert "seed=...: the value has too many levels" in refuse("train", "quickstart", f"seed={'[' * 2000}")


def test_a_folder_that_is_no_run(tmp_path):
    for command in (["eval"], ["export", "--out", tmp_path / "out"]):
        assert "is neither a run folder" in refuse(command[0], tmp_path, *command[1:])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_a_configuration(folder):
    (folder / "run").mkdir()
    assert "run is a folder, not a configuration" in refuse("train", "run")
    (folder / "run" / "config.yaml").write_text("{}")
    says = "run is a folder; its configuration is run/config.yaml (to go on with the run: empg-jax train "
    for command in ("train", "plan", "config"):
        assert f"{says}--resume run)" in refuse(command, "run")


@pytest.mark.parametrize(
    "key",
    [
        "run_dir",
        "checkpoint.dir",
        "rollout.stored",
        "rollout.schedule",
        "sft.data",
        "model.path",
        "model.tokenizer",
        "model.chat_template",
    ],
)
def test_a_home_folder_that_is_not_known(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    lag = ["train.max_lag=1", "rollout.deterministic=true"] if key == "rollout.schedule" else []
    says = "~nosuchuser/x: no home folder is known for ~nosuchuser: write the whole path"
    assert says in refuse_last("train", "quickstart", "run_dir=run", *lag, f"{key}=~nosuchuser/x")
    assert list(tmp_path.iterdir()) == []


def refuse_last(*arguments):
    """As `refuse`, after notes, and with a line for each mistake; returns the last line."""
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.exception
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("key", ["sft.split", "env.split", "env.eval_split"])
def test_a_split_that_does_not_exist_leaves_the_folder_as_it_was(tmp_path, monkeypatch, key):
    """Nothing is compiled before, the folder's name is free again, and what lay in it stays."""
    monkeypatch.setattr(parts, "start_learner", None)
    for place, kept in (("new", None), ("mine", "notes.txt")):
        if kept:
            (tmp_path / place).mkdir()
            (tmp_path / place / kept).write_text("mine")
        command = ("train", "quickstart", *runs.TINY, *runs.HOUSE, f"run_dir={tmp_path / place}")
        said = refuse_last(*command, f"{key}=nosplit")
        assert said == f"error: {key}=nosplit does not exist; the environment has train, valid, test"
        assert sorted(path.name for path in tmp_path.rglob("*")) == (["mine", kept] if kept else [])


def test_a_policy_to_watch_is_found_before_its_prompts_are_told():
    assert "nowhere is neither a folder, nor a hub id" in refuse("play", "household", "--policy", "nowhere")
    done = CliRunner().invoke(app, ["play", "household", "--policy", "smollm2-135m", "levle=tiny"])
    told = "prompts and lengths are those of household_qwen2.5_7b (KEY=VALUE changes them)\n"  # no --config
    assert (done.exit_code, done.stdout) == (2, told) and "has no option 'levle'" in done.stderr


def test_too_few_tasks_for_the_hosts_are_told_with_the_splits():
    config, pool = load_config("quickstart", ["env.sampler=adaptive"]), SimpleNamespace(splits={"train": 2})
    with pytest.raises(ConfigError, match=r"env\.sampler=adaptive: 2 tasks cannot be shared by 3 hosts"):
        check_splits(config, pool, SimpleNamespace(index=0, num=3))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["config", "~nosuchuser/x.yaml"], "error: ~nosuchuser/x.yaml: no home folder is known"),
        (["serve", "~nosuchuser/x"], "error: ~nosuchuser/x: no home folder is known"),
        (["eval", "~nosuchuser/x", "--env", "household"], "error: ~nosuchuser/x: no home folder is known"),
        (
            ["config", "quickstart", "hosts.coordinator=a:99999"],
            "hosts.coordinator=a:99999 must be HOST:PORT",
        ),
        (["config", "quickstart", "hosts.coordinator=a:65535"], "with a PORT from 1 to 65534"),
        (["config", "quickstart", "hosts.coordinator=a:0"], "hosts.coordinator=a:0 must be HOST:PORT"),
        (["config", "quickstart", "hosts.coordinator=:80"], "hosts.coordinator=:80 must be HOST:PORT"),
        (
            ["config", "quickstart", "hosts.coordinator=a..b:80"],
            "hosts.coordinator=a..b:80 must be HOST:PORT",
        ),
        (["config", "quickstart", "hosts.coordinator=a:80/b"], "hosts.coordinator=a:80/b must be HOST:PORT"),
        (
            ["config", "quickstart", "rollout.engine=openai", "rollout.url=http://127.0.0.1:99999"],
            "rollout.url=http://127.0.0.1:99999 is no address (Port out of range 0-65535)",
        ),
        (
            ["config", "quickstart", "rollout.engine=openai", "rollout.url='http://[::1'"],
            "rollout.url=http://[::1 is no address (Invalid IPv6 URL): expected something like http://",
        ),
        (["eval", "http://[::1", "--env", "household"], "http://[::1 is no address (Invalid IPv6 URL)"),
        (["eval", "http://a:99999", "--env", "household"], "http://a:99999 is no address (Port out of range"),
    ],
)
def test_places_that_cannot_be_are_named(arguments, says):
    assert says in refuse_last(*arguments)


@pytest.mark.parametrize("read", [read_template, read_tasks, find_files, find_root])
def test_files_of_environments_in_a_home_folder_that_is_not_known(read):
    with pytest.raises((ValueError, FileNotFoundError), match="~nosuchuser/x"):
        read("~nosuchuser/x")


@pytest.mark.parametrize("read", [read_template, read_tasks])
def test_files_of_environments_that_are_no_text(tmp_path, read):
    (tmp_path / "latin.jsonl").write_bytes(b'{"name": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"(?i)latin\.jsonl.*utf-8"):
        read(str(tmp_path / "latin.jsonl"))


def test_training_tasks_that_are_test_tasks_are_left_out(tmp_path, caplog):
    path, prompts = tmp_path / "tasks.jsonl", ["a", "b", "c", "d", "b", "e", "f", "g", "h", "i"]
    path.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts))
    panels = {split: [task["prompt"] for task in panel] for split, panel in read_tasks(str(path)).items()}
    assert panels == {"train": ["a", "c", "d", "e", "f", "g", "h"], "test": ["b", "i"]}
    assert f"tasks={path}: 1 training tasks are left out" in caplog.text
    path.write_text('{"prompt": "a"}\n' * 10)
    with pytest.raises(ValueError, match="no task to train on"):
        read_tasks(str(path))


def test_the_folder_of_compiled_programs_is_a_key_too():
    with pytest.raises(ConfigError, match="compile_cache=~nosuchuser/x: no home folder is known"):
        cache_folder("~nosuchuser/x")


def test_an_episode_with_more_tokens_than_fit(tmp_path):
    turn = {"reward": 1, "valid": True, "tokens": 99999999999, "entropy": 0.1}
    (tmp_path / "one.jsonl").write_text(json.dumps({"turns": [turn]}))
    line = refuse("credit", "quickstart", tmp_path / "one.jsonl")
    assert "line 1, turns[0].tokens: expected 1 to 1048576, got 99999999999" in line


def test_a_file_in_place_of_a_model(folder):
    (folder / "data").mkdir()
    (folder / "data" / "chats.jsonl").write_text("{}\n")
    line = refuse_last("train", "quickstart", "model.path=data/chats.jsonl")
    assert line.endswith(": data/chats.jsonl is a file; expected a folder")


@pytest.mark.parametrize(("command", "name"), [("new-env", "my_world"), ("new-algorithm", "my_credit")])
def test_what_is_begun_has_a_name_of_its_kind(command, name):
    said = CliRunner().invoke(app, [command, "--help"]).stdout.replace("\u2502", " ")
    assert f"a Python identifier, such as {name}." in " ".join(said.split())


@pytest.mark.parametrize("option", ["--index", "--encoder"])
def test_vectors_without_a_retriever_that_reads_them(folder, option):
    (folder / "corpus.jsonl").write_text('{"id": "0", "contents": "Oslo\\nA town."}\n')
    line = refuse("retrieve", "--corpus", "corpus.jsonl", option, "x")
    assert "--index and --encoder go with --retriever faiss or vectors, not auto" in line


def test_an_export_into_a_folder_with_contents(tmp_path):
    (tmp_path / "kept").write_text("mine")
    assert "is not empty" in refuse("export", tmp_path, "--out", tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"


def test_the_hub_out_of_reach_is_one_short_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "from empg_jax.hf.hub import find_folder\n"
        "try: find_folder('empg-jax/no-such-model', ['config.json'], 'model')\n"
        "except FileNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.stdout == (
        "no model folder at 'empg-jax/no-such-model', and the hub cannot be reached "
        "(nor is it in the cache)\n"
    )
    with pytest.raises(FileNotFoundError, match="and it is not a hub id"):
        find_folder("no-such-folder", [], "model")


def test_lists_of_configurations_and_choices():
    listed = CliRunner().invoke(app, ["config", "--list"])
    assert listed.exit_code == 0 and "quickstart" in listed.stdout and "household_qwen2.5_7b" in listed.stdout
    keys = " ".join(CliRunner().invoke(app, ["config", "--keys"]).stdout.replace("│", " ").split())
    assert "Choices: linear, cosine, constant." in keys and "model.intermediate_size" in keys
    assert json.dumps(keys).count("Choices: ") > 10


def test_help_of_the_theory_script_loads_no_jax():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['theory.py', '--help']\n"
        "try: runpy.run_path('scripts/theory.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'jax', 'matplotlib', 'empg_jax.hf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--samples" in done.stdout and done.stdout.endswith("[]\n"), done.stderr


def test_what_is_to_be_installed_can_be_installed_in_a_clone():
    extras = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = []
    for folder in ("empg_jax", "envs", "scripts", "configs"):
        for path in (runs.ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml"):
                text = path.read_text(encoding="utf-8")
                assert "install 'empg-jax" not in text, path
                found += re.findall(r"'?\.\[(\w+)\]'", text)
    assert {"deepsearch", "wandb", "swerex", "alfworld"} <= set(found) <= extras.keys()
