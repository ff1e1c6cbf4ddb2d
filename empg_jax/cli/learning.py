"""Commands that make or use weights: train, sft, rollout, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from empg_jax.cli.app import (
    ConfigArgument,
    Overrides,
    app,
    load_checked,
    load_run,
    reporting,
    say,
)
from empg_jax.cli.completing import complete_config
from empg_jax.config.load import RESUMABLE_KEYS
from empg_jax.errors import ConfigError
from empg_jax.run.folder import check_run, is_finished, names_run


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A packaged name (quickstart) or the path of a YAML file.",
            autocompletion=complete_config,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(help=f"Go on with the run in this folder; only {', '.join(RESUMABLE_KEYS)} may change."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="With --resume: the checkpoint to go on from (default: the newest)."),
    ] = None,
) -> None:
    """Train an agent (warm start first when sft.updates > 0) and print the run's folder."""
    with reporting():
        changes = list(overrides or [])
        if resume is not None and config is not None:
            changes.insert(0, config)  # --resume takes no CONFIG, so the first word is an override
        if resume is not None:
            resolved = load_run(resume, changes)
            if step is None and is_finished(resume, resolved):
                from empg_jax.run.view import draw_results

                told = f"{resume} is finished: all {resolved.train.updates} updates are made"
                say(f"{told}; more with train.updates=N")
                for line in draw_results(resume, has_page=resolved.log.transcripts > 0):
                    say(line)
                typer.echo(resume.absolute())
                return
        elif step is not None:
            raise ConfigError(f"--step {step} names a checkpoint of a run: give --resume RUN, too")
        elif config is None:
            raise ConfigError("name a configuration (empg-jax train quickstart), or go on with --resume RUN")
        else:
            resolved = load_checked(config, changes)
        from empg_jax.trainer import train as run_training

        options = {} if step is None else {"step": step}
        typer.echo(run_training(resolved, resume=resume, **options).absolute())


@app.command()
def sft(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train on expert demonstrations or on chat files (sft.data=FILE.jsonl) only; print the run's folder."""
    with reporting():
        resolved = load_checked(config, overrides or [])
        if resolved.sft.updates == 0:
            raise ConfigError("sft.updates=0: nothing to do; set sft.updates, for example sft.updates=200")
        from empg_jax.trainer import run_sft

        typer.echo(run_sft(resolved).absolute())


@app.command()
def rollout(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CONFIG", help="Folder of a run or of a checkpoint; or a configuration, untrained."
        ),
    ],
    overrides: Overrides = None,
    *,
    episodes: Annotated[int, typer.Option(help="Episodes, rounded up to whole groups.")],
    out: Annotated[
        Path, typer.Option(help="File to write: JSON lines (FILE.gz compressed), or FILE.npz to train on.")
    ],
) -> None:
    """Play training episodes without learning; write records for 'empg-jax credit', or .npz to train on."""
    with reporting():
        changes = list(overrides or [])
        resolved = None if names_run(Path(source)) else load_checked(source, changes)
        from empg_jax.run.play import play_new, play_run

        if resolved is None:
            play_run(Path(source), changes, episodes, out, say)
        else:
            play_new(resolved, episodes, out, say)
        typer.echo(out.absolute())


@app.command()
def export(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Folder of a run or of a checkpoint.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist or be empty.")],
    overrides: Overrides = None,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter/--merged", help="The adapter alone (PEFT), or the whole model with it merged in."
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default model.param_dtype).")
    ] = None,
) -> None:
    """Write a trained policy as a folder that transformers and vLLM load, and print the folder."""
    with reporting():
        check_run(path)
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"--dtype {dtype} is unknown; choose float32, bfloat16 or float16")
        from empg_jax.run.export import export_run

        written = export_run(
            path,
            out,
            adapter=adapter,
            dtype=dtype,
            overrides=overrides or [],
            say=say,
        )
        typer.echo(written.absolute())
