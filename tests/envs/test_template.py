"""Prompts from a file of the user's: what the policy reads, what a run keeps, and what is refused."""

import pytest
import yaml
from typer.testing import CliRunner

from empg_envs import ENVS, make_env
from empg_envs.base import quote_turns
from empg_envs.template import LATER
from empg_jax.cli import app
from empg_jax.config import load_config
from empg_jax.run.keeping import keep_texts

# In the form of published prompts: a text for the first turn, and one with the past.
ALFWORLD = f"""
You act in a house. It says: {{current_observation}}
You may: [{{admissible_actions}}]. Answer in {{{{json}}}}.
{LATER}
Your task: {{task_description}} After {{step_count}} steps, the last {{history_length}}: {{action_history}}
Step {{current_step}}: {{current_observation}}
[{{admissible_actions}}]
"""
WEBSHOP = (
    "Buy {task_description}. Page: {current_observation}\n[\n{available_actions}\n]\nPast: {action_history}"
)


def write(folder, text):
    path = folder / "prompt.txt"
    path.write_text(text)
    return path


def refuse(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and result.stderr.startswith("error: "), result.stderr
    return result.stderr


def test_alfworlds_prompts_are_the_files(tmp_path):
    prompts = ENVS["alfworld"].prompts(template=str(write(tmp_path, ALFWORLD)))
    env = make_env("alfworld")
    seen, info = env.reset(split="train", index=0)
    (first,) = prompts.window([], seen, info, 0)
    commands = [command for command in info["admissible"] if command != "help"]
    assert first["content"].startswith(f"\nYou act in a house. It says: {seen}\nYou may: ['{commands[0]}'")
    assert first["content"].endswith(f"'{commands[-1]}']. Answer in {{json}}.")
    assert prompts.start(seen, info) == [first]
    now, *_, info = env.step(commands[0])
    history = [(seen, commands[0])]
    (later,) = prompts.window(history, now, info, 1)
    said = f"Your task: {info['task']} After 1 steps, the last 1: {quote_turns(history, 1)}\nStep 2: {now}\n"
    assert later["content"].startswith(said) and later["content"].endswith("]")
    assert prompts.follow(now, info).startswith(f"Observation: {now}")  # the style's, in a transcript


def test_webshops_prompts_are_the_files_and_stay_short(tmp_path):
    prompts = ENVS["webshop"].prompts(style="page", template=str(write(tmp_path, WEBSHOP)))
    env = make_env("webshop", level="standard")
    seen, info = env.reset(split="train", index=0)
    (first,) = prompts.window([], seen, info, 0)
    assert first["content"] == (f"Buy {info['task']}. Page: 'Search'\n[\n'search[<your query>]',\n]\nPast: ")
    (later,) = prompts.window([(seen, "search[x]")], seen, info, 1)
    assert later["content"].endswith("Past: [Observation 1: ''Search'', Action 1: 'search[x]']")
    (long,) = prompts.window([("x" * 13_000, "search[x]")], seen, info, 1)
    assert long == first


def test_a_run_keeps_the_text_and_needs_the_file_no_more(tmp_path):
    path = write(tmp_path, "One line: {current_observation}")
    config = load_config("alfworld_transcript", [f"env.prompt_options.template={path}"])
    kept = keep_texts(config)
    path.unlink()
    again = tmp_path / "config.yaml"  # as a run's folder holds it
    again.write_text(kept.to_yaml())
    resumed = keep_texts(load_config(again))
    assert resumed == kept and yaml.safe_load(again.read_text())["env"]["prompt_options"]["template"]
    prompts = ENVS["alfworld"].prompts(**resumed.env.prompt_options)
    assert prompts.start("a room", {"task": "t", "admissible": []})[0]["content"] == "One line: a room"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("alfworld_verl", None, r"template={path} cannot be read: No such file or directory"),
        (
            "alfworld_verl",
            "{task_descripton}",
            "has the placeholder {task_descripton}; did you mean 'task_desc",
        ),
        (
            "webshop_verl",
            "{admissible_actions}",
            "has the placeholder {admissible_actions}; did you mean 'avail",
        ),
        ("alfworld_verl", "{task_description.__class__}", "has the placeholder {task_description.__class__}"),
        ("alfworld_verl", "{current_step:>9}", "has the placeholder {current_step:>9}"),
        (
            "alfworld_verl",
            "{",
            "single '{' encountered in format string; a brace that is meant is doubled: {{ or }}",
        ),
        ("webshop_tiny", "a", "a webshop template goes with style 'page', not 'terse'"),
        ("quickstart", "a", "environment household has no prompt option 'template'"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_before_a_run_is_made(tmp_path, name, text, says):
    path = tmp_path / "prompt.txt"
    if text is not None:
        path.write_text(text)
    line = refuse("train", name, f"env.prompt_options.template={path}", f"run_dir={tmp_path / 'run'}")
    assert says.replace("{path}", str(path)) in line.lower() or says.replace("{path}", str(path)) in line
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()
