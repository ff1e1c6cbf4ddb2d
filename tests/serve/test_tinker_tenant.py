"""Who has the model of the training API, with a trainer that only notes what is asked of it."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from empg_jax.serve.tinker import tenant as tenant_module
from empg_jax.serve.tinker.futures import Futures
from empg_jax.serve.tinker.routes import Api
from empg_jax.serve.tinker.tenant import Patience, Tenant
from empg_jax.serve.tinker.worker import Worker
from empg_jax.serve.wire import ApiError, refuse


def make_tenant(worker, futures, calls, session_timeout=60):
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
        patience=Patience(gap=60, session=session_timeout),
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


def test_a_client_that_waits_for_its_results_or_samples_keeps_its_model(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tenant_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def play():
        futures = Futures()
        with Worker() as worker:
            tenant = make_tenant(worker, futures, [], session_timeout=60)
            samplers = SimpleNamespace(sample=lambda body: (sampled, 1))
            api = Api(tenant, samplers, futures, None)
            first, second = tenant.create_session(), tenant.create_session()
            created = tenant.create_model(first, 0, None)
            await futures.wait(created, 60)
            sampled, _ = futures.begin(f"{first}:sample:x:0", "asample")
            http = SimpleNamespace(headers={})
            for ask in (lambda: api._retrieve(http, {"request_id": created.id}), lambda: sample(api)):
                now[0] += 59
                await ask()
                now[0] += 59
                refused = tenant.create_model(second, 0, None)
                assert refused.error.status == 409
            now[0] += 61
            assert tenant.create_model(second, 0, None).error is None  # sent again, when the model is free

    async def sample(api):
        api._sample({})

    asyncio.run(play())


def test_a_request_to_unload_may_be_sent_twice():
    async def play():
        futures = Futures()
        with Worker() as worker:
            tenant = make_tenant(worker, futures, [])
            created = tenant.create_model(tenant.create_session(), 0, None)
            assert await futures.wait(created, 60)
            model_id = created.result["model_id"]
            assert tenant.unload(model_id) is tenant.unload(model_id)
            for _ in range(2):
                with pytest.raises(ApiError, match="is not in training"):
                    tenant.unload("another")

    asyncio.run(play())


def test_a_step_with_an_infinite_metric_is_answered():
    async def play():
        futures = Futures()
        with Worker() as worker:
            tenant = make_tenant(worker, futures, [])
            tenant._trainer.step = lambda settings: {"grad_norm": 1.0, "update_norm": float("inf")}
            api = Api(tenant, None, futures, None)
            created = tenant.create_model(tenant.create_session(), 0, None)
            assert await futures.wait(created, 60)
            stepped = tenant.step(created.result["model_id"], 1, lambda: None)
            answer = await api._retrieve(SimpleNamespace(headers={}), {"request_id": stepped.id})
            assert json.loads(answer.body) == {"metrics": {"grad_norm": 1.0}}

    asyncio.run(play())


def test_a_session_of_no_kind_is_refused():
    tenant = make_tenant(None, Futures(), [])
    with pytest.raises(ApiError, match="session_id must be a text") as refused:
        tenant.touch(["session"])
    assert refused.value.status == 400
