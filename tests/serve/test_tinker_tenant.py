"""Who has the model of the training API, with a trainer that only notes what is asked of it."""

import asyncio
from types import SimpleNamespace

import pytest

from empg_jax.serve.tinker.futures import Futures
from empg_jax.serve.tinker.tenant import Patience, Tenant
from empg_jax.serve.tinker.worker import Worker
from empg_jax.serve.wire import ApiError, refuse


def make_tenant(worker, futures, calls):
    def refuse_path(path):
        raise refuse(f"there is no {path}")

    trainer = SimpleNamespace(
        reset=lambda: calls.append("reset"),
        load=lambda *_: calls.append("load"),
        start=SimpleNamespace(model=SimpleNamespace(lora=None)),
    )
    return Tenant(
        trainer,
        worker,
        futures,
        SimpleNamespace(forget=lambda session: None),
        SimpleNamespace(load=refuse_path, load_moments=refuse_path),
        patience=Patience(gap=60, session=60),
        say=calls.append,
    )


def test_a_failed_load_leaves_no_model_and_no_training_of_others():
    async def play():
        calls, futures = [], Futures()
        with Worker() as worker:
            tenant = make_tenant(worker, futures, calls)
            first = tenant.create_session()
            created = tenant.create_model(first, 0, None)
            assert await futures.wait(created, 60) and created.error is None
            tenant.finish_session(first)
            calls.clear()
            second = tenant.create_session()
            loaded = tenant.create_model(second, 0, None, ("tinker://x", False))
            assert await futures.wait(loaded, 60)
            assert "there is no tinker://x" in loaded.error.message and calls == ["reset"]
            with pytest.raises(ApiError, match="is not in training; none is"):
                tenant.find(f"{second}:train:0")
            again = tenant.create_model(tenant.create_session(), 0, None)  # nobody holds it
            assert await futures.wait(again, 60) and again.error is None

    asyncio.run(play())


def test_a_session_of_no_kind_is_refused():
    tenant = make_tenant(None, Futures(), [])
    with pytest.raises(ApiError, match="session_id must be a text") as refused:
        tenant.touch(["session"])
    assert refused.value.status == 400
