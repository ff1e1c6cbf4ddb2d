"""Commands that show: configurations, plans, simulations, runs and their credit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from empg_jax.cli.app import ConfigArgument, Overrides, app, load_checked, load_run, reporting, say
from empg_jax.cli.completing import complete_config, complete_env
from empg_jax.config import Config, describe, list_choices, load_config
from empg_jax.config.hosts import seats_of
from empg_jax.config.yaml import find_packaged
from empg_jax.errors import ConfigError
from empg_jax.report.console import make_console


@app.command("config")
def show_config(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", help="A packaged name or a YAML file.", autocompletion=complete_config
        ),
    ] = None,
    overrides: Overrides = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="List every key with its default, its choices and its meaning.")
    ] = False,
    packaged: Annotated[bool, typer.Option("--list", help="List the packaged configurations.")] = False,
) -> None:
    """Check a configuration and print it resolved."""
    with reporting():
        if keys:
            _print_keys()
        elif packaged:
            _print_packaged()
        elif config is None:
            raise ConfigError("name a configuration (empg-jax config quickstart), or ask for --list, --keys")
        else:
            resolved = load_checked(config, overrides or [], to_run=False)
            for note in resolved.notes:
                typer.echo(f"note: {note}", err=True)
            typer.echo(resolved.to_yaml(), nl=False)


@app.command()
def credit(
    config: ConfigArgument,
    episodes: Annotated[
        Path, typer.Argument(metavar="EPISODES", help="Episode records (.jsonl or .jsonl.gz): one batch.")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="File to write in place of stdout.")] = None,
) -> None:
    """Recompute the credit of recorded or hand-made episodes, and print the records with it."""
    with reporting():
        resolved = load_config(config, overrides or [])
        # The batch is small and there is no model: starting an accelerator would take longer than the work.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from empg_jax.run.credit import print_credit

        print_credit(resolved, episodes, out, say=lambda line: typer.echo(line, err=True))


@app.command()
def view(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write, or folder to write it into (default RUN/view.html).")
    ] = None,
    what_if: Annotated[
        str,
        typer.Option(
            help="Other algorithms to compute the credit of, for example grpo,grpo_aem; module:function is "
            "one of your own."
        ),
    ] = "",
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine; it follows a run that trains.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: 0 takes a free one.")] = 0,
) -> None:
    """Write a run as one page: episodes with the credit of every turn, groups side by side, curves.

    The page opens without a network and can be mailed. It shows the files in RUN/rollouts
    (log.rollouts_every); with log.rollouts_tokens=true every token has its color. Press ? in it for its keys.
    """
    with reporting():
        from empg_jax.run.view import serve_run, view_run

        if serve and out is not None:
            raise ConfigError("--serve writes no file: give --out or --serve")
        others = {}
        for name in filter(None, what_if.split(",")):
            key = "algorithm.entry_point" if ":" in name else "algorithm.name"
            others[name] = load_config(run / "config.yaml", [f"{key}={name}"], drop_unused=True)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # as for credit
        if serve:
            serve_run(run, port=port, what_if=others, tell=typer.echo)
        else:
            typer.echo(view_run(run, out=out, what_if=others, say=say).absolute())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, of several seeds.")],
    out: Annotated[Path, typer.Option(help="Folder to write into; it is made.")] = Path("report"),
) -> None:
    """Compare runs over seeds: report.html, report.png and report.csv.

    Runs with equal settings but another seed form an arm; the arm of the first run is what the others are
    compared with, paired by seed. Means, interquartile means, 95 % bootstrap intervals, areas under curves.
    Runs short of their train.updates are drawn and named, and count in no number; where no run is finished,
    those that got as far as the longest are compared.
    """
    with reporting():
        from empg_jax.report.comparison_page import report_runs

        typer.echo(report_runs(runs, out, warn=say).absolute())


@app.command()
def metrics() -> None:
    """Print every metric that a run logs, with its meaning."""
    from empg_jax.metrics import format_glossary

    typer.echo(format_glossary())


@app.command()
def envs() -> None:
    """List the environments: what they are, their levels, and their panels of tasks with default options."""
    from empg_jax.run.lists import format_list, list_envs

    typer.echo(format_list(list_envs()))


@app.command()
def configs() -> None:
    """List the packaged configurations."""
    from empg_jax.run.lists import format_list, list_configs

    typer.echo(format_list(list_configs()))


@app.command()
def algorithms() -> None:
    """List the algorithms (algorithm.name) with their recipes."""
    from empg_jax.run.lists import format_list, list_algorithms

    typer.echo(format_list(list_algorithms()))


@app.command()
def play(
    env: Annotated[
        str,
        typer.Argument(
            metavar="ENV",
            help="A name ('empg-jax envs') or package.module:attribute.",
            autocompletion=complete_env,
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Options of the environment, for example level=easy."),
    ] = None,
    *,
    expert: Annotated[bool, typer.Option("--expert", help="Let the environment's expert act.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed; it also draws the task.")] = 0,
    task: Annotated[int | None, typer.Option(help="Number of the task in its panel.")] = None,
    split: Annotated[str | None, typer.Option(help="Panel of tasks (default the first).")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_OR_MODEL", help="Watch this policy play (default panel env.eval_split of its run)."
        ),
    ] = None,
) -> None:
    """Be the agent: play one episode in the terminal, with actions from the keyboard or a pipe.

    empg-jax play household level=easy --task 3

    empg-jax play household --policy runs/NAME rollout.temperature=0.5

    empg-jax play alfworld < actions.txt
    """
    with reporting():
        if policy is not None:
            if expert:
                raise ConfigError("--expert and --policy are two agents: give one of them")
            from empg_jax.run.watching import watch_episode

            watch_episode(env, policy, options or [], split=split, task=task, seed=seed, say=typer.echo)
            return
        from empg_jax.run.terminal import play_episode

        play_episode(env, options or [], split=split, task=task, seed=seed, is_expert=expert, say=typer.echo)


@app.command("check-env")
def check_env(
    env: Annotated[
        str, typer.Argument(metavar="ENV", help="package.module:attribute, or a name ('empg-jax envs').")
    ],
    options: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the environment; may be repeated."),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Tasks of each split that are played.")] = 3,
) -> None:
    """Check that an environment does what training relies on; exit code 1 where it does not.

    empg-jax check-env my_module:MyEnv --options size=3 --episodes 10
    """
    with reporting():
        from empg_jax.run.check_env import check_env as check

        if not check(env, options or [], episodes, say=typer.echo):
            raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Devices to plan for, of all hosts, by mesh.fsdp (default: those of mesh)."),
    ] = None,
    hosts: Annotated[
        int | None, typer.Option(min=1, help="Hosts to plan for (default: hosts.num, else one).")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory of a device in GiB, to compare with.")
    ] = None,
    chip: Annotated[
        str | None,
        typer.Option(help="a100, h100, h200, b200, v5e, v5p or v6e: expected times too, and its memory."),
    ] = None,
) -> None:
    """Print the memory that a run needs on each device, without weights and without running."""
    with reporting():
        from empg_jax.plan.explain import explain

        def load(changes: Sequence[str]) -> Config:
            return load_config(config, [*(overrides or []), *seats_of(hosts), *changes])

        memory = None if memory_gib is None else memory_gib * 2**30
        lines = explain(load, devices, memory, chip)
        typer.echo("\n".join(lines))


@app.command()
def bench(
    config: ConfigArgument,
    overrides: Overrides = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Updates to measure, after one that warms up; medians are told.")
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the engine and the learner of a configuration on this machine, without environments.

    Made-up episodes, each of which fills its row, are sampled and trained on as in a run. Nothing is written.
    """
    with reporting():
        resolved = load_checked(config, overrides or [], to_run=False)
        from empg_jax.plan.bench import as_lines
        from empg_jax.plan.bench import bench as measure
        from empg_jax.report.progress import Progress

        with Progress(resolved.log.progress) as progress:
            found = measure(resolved, repeats, progress)
        source = [str(config), *(overrides or [])]
        typer.echo(json.dumps(found) if as_json else "\n".join(as_lines(found, source)))


@app.command("simulate")
def show_simulation(
    config: ConfigArgument,
    overrides: Overrides = None,
    *,
    latency: Annotated[float | None, typer.Option(help="Seconds of an environment's answer.")] = None,
    latency_kind: Annotated[
        str | None, typer.Option(help="constant, uniform, exponential, lognormal or heavy.")
    ] = None,
    reset_latency: Annotated[float | None, typer.Option(help="Of a reset (default as of a step).")] = None,
    turns: Annotated[float | None, typer.Option(help="Mean turns of an episode.")] = None,
    turns_kind: Annotated[str | None, typer.Option(help="Their spread (default uniform).")] = None,
    tokens: Annotated[float | None, typer.Option(help="Mean tokens of a response.")] = None,
    tokens_kind: Annotated[str | None, typer.Option(help="Their spread (default uniform).")] = None,
    observation: Annotated[
        float | None, typer.Option(help="Prompt tokens that each turn adds; they cost with --prefill-rate.")
    ] = None,
    long_share: Annotated[float | None, typer.Option(help="Share of the tasks that are long.")] = None,
    long_stretch: Annotated[float | None, typer.Option(help="Their turns, as a multiple.")] = None,
    failures: Annotated[
        float | None, typer.Option(help="Share of the attempts whose environment fails.")
    ] = None,
    deaths: Annotated[float | None, typer.Option(help="Share that takes its worker down.")] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Environments that can answer at the same time (default all).")
    ] = None,
    decode_rate: Annotated[
        float | None, typer.Option(help="Tokens per second of all slots together.")
    ] = None,
    slot_rate: Annotated[
        float | None, typer.Option(help="Most tokens per second of one slot (default its share).")
    ] = None,
    prefill_rate: Annotated[float | None, typer.Option(help="Prompt tokens per second.")] = None,
    update_seconds: Annotated[float | None, typer.Option(help="Seconds of an update.")] = None,
    publish_pause: Annotated[float | None, typer.Option(help="Seconds of a swap of weights.")] = None,
    updates: Annotated[int, typer.Option(help="Updates to simulate.")] = 50,
    lags: Annotated[str, typer.Option(help="Values of train.max_lag, one row each.")] = "0,1,2,4",
    splits: Annotated[
        str | None,
        typer.Option(
            help="ENGINE:LEARNER devices (of each host), or a number that both share, for example 1:7,4:4,8."
        ),
    ] = None,
    hosts: Annotated[
        int | None, typer.Option(min=1, help="Hosts of the run (default: hosts.num, else one).")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Take what is not given from this run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Simulate rollout and learner on a clock, to choose train.max_lag and the split of devices.

    The rules of a run decide what is sampled and trained on; environments, sampler and learner only take
    time. What is not given is assumed, and the answer says so.

    Is it worth it to overlap, if environments take 0.1 s and an update takes 2 s?

    empg-jax simulate quickstart --latency 0.1 --update-seconds 2 --decode-rate 4000 --splits 1,1:1

    How would eight devices be split best, by the speeds of a run on one?

    empg-jax simulate quickstart --from runs/NAME --splits 1:7,2:6,4:4,8
    """
    given = dict(locals())
    for name in ("config", "overrides", "lags", "splits", "hosts", "measured", "as_json"):
        del given[name]
    with reporting():
        resolved = load_config(config, [*(overrides or []), *seats_of(hosts)])
        run = None if measured is None else (measured, load_run(measured, [], option="--from"))
        from empg_jax.simulate.plan import make_plan, read_lags, read_splits
        from empg_jax.simulate.table import print_plan

        plan = make_plan(
            resolved,
            {name: value for name, value in given.items() if value is not None},
            lags=read_lags(lags),
            splits=None if splits is None else read_splits(splits),
            run=run,
        )
        if as_json:
            typer.echo(json.dumps(plan.as_json()))
        else:
            print_plan(plan, make_console())


def _print_keys() -> None:
    from empg_envs import ENVS

    choices = {"env.name": list(ENVS), **list_choices()}
    rows = []
    for path, default, meaning in describe():
        choose = f" Choices: {', '.join(choices[path])}." if path in choices else ""
        rows.append((path, "null" if default is None else str(default), meaning + choose))
    if not make_console().is_terminal:  # one line each, which grep finds whole
        return typer.echo("\n".join(f"{key:<42} {default:<12} {meaning}" for key, default, meaning in rows))
    table = Table(Column("key", no_wrap=True), Column("default", overflow="fold"), "meaning")
    for row in rows:
        table.add_row(*row)
    make_console().print(table)


def _print_packaged() -> None:
    table = Table(Column("configuration", no_wrap=True), "what it is")
    for name, sentence in find_packaged().items():
        table.add_row(name, sentence)
    make_console().print(table)
