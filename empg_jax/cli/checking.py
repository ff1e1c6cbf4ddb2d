"""Commands that look for faults: doctor in an installation, inspect in an update."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from empg_jax.cli.app import app, reporting
from empg_jax.report.console import make_console

if TYPE_CHECKING:
    from empg_jax.run.doctor import Finding


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this installation, and say what to do about each finding; nothing is left behind.

    Packages, devices, memory, attention kernels, the cache of compiled programs, extras, the sandbox,
    arithmetic, an environment worker, a checkpoint, an optimizer step. Exit code 1 if something failed.
    """
    with reporting():
        from empg_jax.run.doctor import as_report, examine

        console, findings = make_console(), []
        for finding in examine():
            findings.append(finding)
            if not as_json:
                console.print(_describe_finding(finding), soft_wrap=True)
        found = as_report(findings)
        if as_json:
            typer.echo(json.dumps(found))
        if not found["ok"]:
            raise typer.Exit(1)


def _describe_finding(finding: Finding) -> str:
    color = {"ok": "green", "note": "yellow", "failed": "red"}[finding.status]
    line = f"[{color}]{finding.status:<6}[/{color}] {finding.name}: {escape(finding.said)}"
    return f"{line}\n       → {escape(finding.todo)}" if finding.todo else line


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_FILE", help="A run (its first dump), or RUN/debug/bad_batch_N.npz."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with all episodes.")
    ] = False,
) -> None:
    """Tell what was not finite in an update whose steps were left out: scores, credit, parameters."""
    with reporting():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # as for credit
        from empg_jax.report.debug import dump_as_json, format_dump, inspect_dump

        found = inspect_dump(path)
        typer.echo(json.dumps(dump_as_json(found)) if as_json else "\n".join(format_dump(found)))
