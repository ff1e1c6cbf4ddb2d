"""Commands that measure: eval, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from empg_jax.cli.app import Overrides, app, check_environment, reporting, say
from empg_jax.config.model_source import is_address, load_for_model
from empg_jax.errors import ConfigError
from empg_jax.files import as_json
from empg_jax.run.folder import check_run, split_checkpoint


@app.command("eval")
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="POLICY",
            help="Folder of a run or of a checkpoint; with --env or --config a Hugging Face folder, hub id, "
            "preset (random weights), or address of a server (http://127.0.0.1:8000); with --base-url the "
            "name of a model there.",
        ),
    ],
    overrides: Overrides = None,
    *,
    tasks: Annotated[int | None, typer.Option(help="Held-out tasks (eval.tasks).")] = None,
    split: Annotated[
        str | None, typer.Option(help="Panel of tasks, several with + (env.eval_split).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature (eval.temperature).")
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts at each task: mean@k and pass@k.")] = 1,
    env: Annotated[
        str | None,
        typer.Option(help="For a model: environment, with the prompts of its packaged configuration."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="For a model: configuration that says how prompts are built.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for eval.json, eval.md and episodes.jsonl (default RUN/eval, of a checkpoint "
            "RUN/eval/step-STEP; of others none)."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For a server with several models: the name of one.")
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(help="Address of a server, of which POLICY then names a model."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EMPG_API_KEY", show_envvar=True, help="For a server: its bearer token."),
    ] = None,
) -> None:
    """Evaluate a policy on held-out tasks; the result is one JSON object on stdout.

    Finished attempts are kept beside eval.json: after an interruption the same command goes on.

    Intervals are of 95 %, over tasks: Wilson's where a task is solved or not, else a bootstrap.
    Groups of tasks that the environment names have estimates of their own, and so have several panels.

    empg-jax eval runs/NAME --attempts 4 --tasks 64

    empg-jax eval Qwen/Qwen2.5-0.5B-Instruct --env household rollout.slots=16 --out results

    empg-jax eval http://127.0.0.1:8000 --env household rollout.slots=16 --out results
    """
    with reporting():
        # Options are short forms of overrides, so there is one path and one set of checks.
        options = {"eval.tasks": tasks, "env.eval_split": split, "eval.temperature": temperature}
        changes = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
        changes = [*(overrides or []), *changes]
        from empg_jax.report.evaluation import check_out

        if out is not None:
            check_out(out, is_chosen=True)
        if base_url is not None:
            source, model = _name_on_server(source, base_url, model)
        if model is not None and not is_address(source):
            raise ConfigError(f"--model {model} names one of a server's models, and {source} is no server")
        is_run = env is None and config is None and not is_address(source)
        if is_run:
            check_run(Path(source))
            run_dir, step = split_checkpoint(Path(source))
            if out is None:
                out = run_dir / "eval" / ("" if step is None else f"step-{step}")
                check_out(out, is_chosen=False)
        # Only what is given, so that plain calls stay plain.
        more: dict[str, Any] = {"out": out} | ({} if attempts == 1 else {"attempts": attempts})
        if is_run:
            from empg_jax.evaluate import evaluate_run

            result = evaluate_run(Path(source), changes, **more)
        else:
            result = _evaluate_other(source, changes, env, config, more, {"model": model, "key": api_key})
        if out is not None:
            say(f"{out / 'eval.json'} and {out / 'eval.md'} are written")
        typer.echo(json.dumps(as_json(result), allow_nan=False))


def _name_on_server(name: str, base_url: str, model: str | None) -> tuple[str, str]:
    """Return the address that --base-url gives and the model that POLICY names there."""
    if not is_address(base_url):
        raise ConfigError(f"--base-url {base_url} is no address: give one like http://127.0.0.1:8000")
    if is_address(name):
        raise ConfigError(f"--base-url {base_url} takes the name of a model there, and {name} is an address")
    if model is not None:
        raise ConfigError(f"--model {model} and {name} both name a model of {base_url}: leave out --model")
    return base_url, name


def _evaluate_other(
    source: str,
    changes: list[str],
    env: str | None,
    config: str | None,
    more: dict[str, Any],
    access: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate a model or a server with the prompts of a configuration."""
    from empg_jax.hf.presets import PRESETS

    if env is None and config is None:
        raise ConfigError(f"{source} is a server, which has no environment: add --env NAME or --config")
    resolved = load_for_model(
        source,
        changes,
        env=env,
        config=config,
        presets=list(PRESETS),
        say=say,
        hint="--config chooses others, KEY=VALUE changes them",
    )
    if is_address(source):
        from empg_jax.evaluate import evaluate_endpoint

        return evaluate_endpoint(source, resolved, **more, **access)
    for note in check_environment(resolved):
        say(f"note: {note}")
    from empg_jax.evaluate import evaluate_model

    return evaluate_model(source, resolved, **more)


@app.command("compare")
def compare(
    first: Annotated[
        Path, typer.Argument(metavar="FIRST", help="A run with an evaluation, or a folder of eval --out.")
    ],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another, on the same tasks.")],
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a table in place of the JSON object.")
    ] = False,
) -> None:
    """Compare two evaluations task by task: the gain of the second, its 95 % interval and an exact test.

    With one attempt at each task the interval is that of the score test (Tango) and the test is McNemar's;
    with several the interval is a bootstrap over tasks (if six changed) and the test a sign test. Evaluations
    of different environments are refused, and of different env.options, unless all tasks begin alike.
    """
    with reporting():
        from empg_jax.report.pairing import compare as compare_folders
        from empg_jax.report.pairing import render_comparison

        found = compare_folders(first, second)
        for note in found["notes"]:
            say(f"note: {note}")
        typer.echo(render_comparison(found) if as_markdown else json.dumps(found), nl=not as_markdown)
