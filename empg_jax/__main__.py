"""``python -m empg_jax`` is the ``empg-jax`` command."""

from empg_jax.cli import main

main()
