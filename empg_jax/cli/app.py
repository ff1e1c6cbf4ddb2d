"""The application itself: its entry point, arguments that commands share, and how failures are told."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO, cast

import typer

from empg_jax import __version__
from empg_jax.cli.completing import complete_config, complete_override
from empg_jax.config import Config, check_resumable, load_config
from empg_jax.errors import ConfigError, Stopped, UserError
from empg_jax.run.flags import set_flags

app = typer.Typer(
    name="empg-jax",
    help="Train multi-turn LLM agents in JAX with entropy-modulated policy gradients.\n\n"
    "--install-completion makes the Tab key complete commands, configurations, environments and keys.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A packaged name (quickstart) or the path of a YAML file.",
        autocompletion=complete_config,
    ),
]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, for example train.updates=200; 'empg-jax config --keys' lists all.",
        autocompletion=complete_override,
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; the entry point of the console script."""
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, _Results(sys.stdout))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, _Messages(sys.stderr))
    # Training handles both signals itself. Before and after it, SIGTERM unwinds like Ctrl-C.
    signal.signal(signal.SIGTERM, _terminate)
    # Orbax logs its housekeeping, which is noise to the user; its failures are raised as CheckpointError.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    set_flags()  # JAX reads them when it is imported
    try:
        app()
    finally:  # all is said and saved: a further signal ends the process, and not with a traceback
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


class _Stream:
    """A standard stream whose failures are treated in one way, which the kinds of it define."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._guarded():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            self._stream.flush()

    def _guarded(self) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError


class _Messages(_Stream):
    """Standard error, which nobody may read: a closed pipe or terminal ends no run, and changes no code."""

    def _guarded(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.suppress(OSError)


class _Results(_Stream):
    """Standard output: that it cannot be written, on a full disk, is told in a line and ends the command."""

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # nobody reads any more, which is no failure; Click ends the command
            raise
        except OSError as error:
            # What Python still holds would fail once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            say(f"error: the result cannot be written to stdout: {error.strerror}")
            raise SystemExit(1) from None


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def say(line: str) -> None:
    """Print a message for the user to stderr; stdout is for results."""
    typer.echo(line, err=True)


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Turn expected failures into one message and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except UserError as error:
        typer.echo(str(error) if isinstance(error, Stopped) else f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def load_checked(config: str, overrides: list[str], *, to_run: bool = True) -> Config:
    """Load a configuration by name or path, with the notes on its environment.

    Args:
      config: packaged name or path.
      overrides: dotted overrides.
      to_run: whether a run follows, which needs what the environment needs.
    """
    resolved = load_config(config, overrides)
    if to_run:
        from empg_jax.run.environment import check_warm_start, find_spec, try_options

        spec = find_spec(resolved)
        try_options(resolved, spec)
        check_warm_start(resolved, spec)
    return resolved.with_notes(check_environment(resolved))


def load_run(run: Path, overrides: list[str], *, option: str = "--resume") -> Config:
    """Load the configuration of a run's folder, which ``option`` names; not all of it may change."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{option} {run}: no run there (no {path})")
    check_resumable(overrides)
    return load_config(path, overrides)


def check_environment(config: Config) -> Iterator[str]:
    """Check the environment and its options before the model is built; yield notes for the person."""
    from empg_jax.run.environment import find_spec, reads_bytes

    if reads_bytes(config, find_spec(config)):
        yield (
            f"{config.env.target} has no closed vocabulary and no tokenizer is named: a token is a byte "
            "(model.tokenizer=bytes), of which rollout.max_tokens and rollout.max_response_tokens are counted"
        )
