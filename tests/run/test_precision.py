"""The precision of matrix products: what the type promises, unless the configuration says another."""

import jax
import pytest

from empg_jax.run.process import find_precision, prepare_jax
from tests import runs


@pytest.mark.parametrize(
    "asked, dtype, platform, found",
    [
        (None, "float32", "gpu", "highest"),
        (None, "float32", "tpu", "highest"),
        (None, "float32", "cpu", None),  # it computes all bits anyway
        (None, "bfloat16", "gpu", None),
        ("default", "float32", "gpu", "default"),
        ("high", "bfloat16", "tpu", "high"),
    ],
)
def test_the_default_is_what_the_type_promises(asked, dtype, platform, found):
    assert find_precision(asked, dtype, platform) == found


def test_the_configuration_reaches_the_programs(tmp_path, monkeypatch):
    def precision():
        return str(jax.make_jaxpr(lambda a: a @ a)(jax.numpy.ones((2, 2))).eqns[0].params["precision"])

    before = jax.config.jax_default_matmul_precision
    try:
        prepare_jax(runs.configure(tmp_path))
        assert jax.config.jax_default_matmul_precision == before
        prepare_jax(runs.configure(tmp_path, "model.matmul_precision=highest"))
        assert "HIGHEST" in precision()
        # What JAX was told stays where the configuration is silent.
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        jax.config.update("jax_default_matmul_precision", "high")
        prepare_jax(runs.configure(tmp_path))
        assert "HIGH" in precision() and "HIGHEST" not in precision()
    finally:
        jax.config.update("jax_default_matmul_precision", before)
