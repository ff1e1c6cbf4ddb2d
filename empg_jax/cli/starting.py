"""Commands that write a folder to start from: new-env, new-algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from empg_jax.cli.app import app, reporting, say


def _name_argument(example: str) -> Any:
    text = f"Name of the folder: a Python identifier, such as {example}."
    return typer.Argument(metavar="NAME", help=text)


@app.command("new-env")
def new_env(name: Annotated[str, _name_argument("my_world")]) -> None:
    """Write a folder NAME with an environment of your own: code, configuration, test, README.

    It trains as it stands, from the folder that NAME is in:

    empg-jax new-env my_world

    empg-jax train my_world/config.yaml
    """
    _write("env", name)


@app.command("new-algorithm")
def new_algorithm(name: Annotated[str, _name_argument("my_credit")]) -> None:
    """Write a folder NAME with an algorithm of your own: recipe, configuration, test, README.

    It trains as it stands, from the folder that NAME is in:

    empg-jax new-algorithm my_credit

    empg-jax train my_credit/config.yaml
    """
    _write("algorithm", name)


def _write(kind: str, name: str) -> None:
    with reporting():
        from empg_jax.run.starting import write_starter

        folder = write_starter(kind, name, Path())
        say(f"train it with: empg-jax train {folder / 'config.yaml'}")
        say(f"{folder / 'README.md'} tells what else")
        typer.echo(folder.absolute())
