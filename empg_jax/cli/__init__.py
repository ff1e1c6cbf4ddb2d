"""The ``empg-jax`` command: train, evaluate, export, warm-start, look at a configuration, check the install.

Modules that load JAX are imported inside the commands, so that ``--help`` and configuration errors appear
quickly. Results go to stdout (the run's folder is the last line), everything else to stderr. Exit codes: 0
done, 1 the run failed, 2 the configuration or the command line is wrong, 130 and 143 ended by SIGINT and
SIGTERM.
"""

from empg_jax.cli import checking, evaluating, learning, serving, showing, starting  # registers the commands
from empg_jax.cli.app import app, main

__all__ = ["app", "checking", "evaluating", "learning", "main", "serving", "showing", "starting"]
