"""Runs that were made up, and what a test does with their pages."""

import json

from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.run.rollouts import write_rollouts


def view(*arguments):
    result = CliRunner().invoke(app, ["view", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def turn(k, **changes):
    credit = {
        "factor": 1.5,
        "bonus": 0.25,
        "advantage_base": 1.0,
        "advantage": 1.5,
        "entropy": 0.5,
        "logprob": -0.1,
    }
    values = {"observation": f"room {k}", "response": f"go {k}", "reward": 0.0, "valid": True, "tokens": 3}
    return values | {"finish_reason": "stop", "version": 0} | credit | changes


def episode(update, group, member, *, success=False, turns=None, **changes):
    values = {"update": update, "group_id": group, "member": member, "task": group, "split": "train"}
    values |= {"reason": "won" if success else "turn_limit", "return": float(success), "success": success}
    return values | {"turns": turns or [turn(0), turn(1)]} | changes


def make_run(folder, files, metrics=True):
    """A run folder with these episodes by update."""
    folder.mkdir()
    (folder / "config.yaml").write_text("algorithm: {name: grpo, modulation: empg}\n")
    for update, records in files.items():
        write_rollouts(folder, update, records)
    if metrics:
        lines = [{"update": n, "success_rate": n / 10, "entropy": 1.0} for n in range(1, 6)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def made_up(folder):
    files = {
        update: [
            episode(
                update,
                group,
                member,
                success=member == 1,
                turns=[turn(k, response=f"go {group}") for k in range(3)],
            )
            for group in (2 * update, 2 * update + 1)
            for member in range(3)
        ]
        for update in (1, 5)
    }
    return make_run(folder, files)


def show(browser, run, *options):
    """Writes the page of a run and opens it."""
    result = view(run, *options)
    assert result.exit_code == 0, result.stderr
    browser.problems.clear()
    browser.run("sessionStorage.clear()") if browser.run("location.protocol") == "http:" else None
    browser.call("Page.navigate", url="about:blank")
    browser.open("file://" + result.stdout.strip())
    return result.stderr


def count(browser):
    return int(browser.text("#count").split(" of ")[0].replace(",", ""))


def set_field(browser, name, value):
    before = browser.run("performance.getEntriesByName('filter').length")
    browser.run(
        f"(() => {{ const f = document.getElementById('{name}'); f.value = {json.dumps(value)};"
        "f.dispatchEvent(new Event('input', { bubbles: true })) })()"
    )
    browser.wait(f"performance.getEntriesByName('filter').length > {before}")
