"""New weights while the server runs: where they are read to, and what happens where there is no room."""

import asyncio
import json
import queue
import shutil
from types import SimpleNamespace

import httpx
import jax
import numpy as np
import pytest

from empg_jax.engine.engine import Engine, EngineConfig, Response
from empg_jax.hf.load import load_hf
from empg_jax.parallel.mesh import make_mesh
from empg_jax.serve import reload
from empg_jax.serve.answers import PROCESS
from empg_jax.serve.app import make_app
from empg_jax.serve.driver import Driver, Job, Weights

PATH = "/update_weights_from_disk"


def send(engine, driver, path):
    """Publish a folder's weights by HTTP; return the status and the body."""
    route = reload.make_reload(engine, driver, has_key=True)
    reads = ("read_chat", "read_completion", "read_generate", "describe_models", "describe_model")
    service = SimpleNamespace(**dict.fromkeys(reads))
    app = make_app(service, driver, api_key=None, max_body_bytes=1 << 20, more=[route])

    async def post():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post(PATH, content=json.dumps({"model_path": str(path)}))

    answer = asyncio.run(post())
    return answer.status_code, answer.json()


def publish(engine, driver, path):
    """Publish a folder's weights by HTTP; return the status and the message."""
    status, body = send(engine, driver, path)
    return status, body["message"] if status == 200 else body["error"]["message"]


class Tight:
    """An engine that says one token, and has no room for weights that are called ``large``."""

    config, base, version, has_work = SimpleNamespace(slots=1), None, 0, False

    def place(self, params):
        if params == "large":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return params

    def swap(self, placed, version):
        self.version = version

    def cut(self, slot, length):
        pass

    def submit(self, slot, prompt, **options):
        self.has_work, self._prompt = True, prompt

    def step(self):
        self.has_work, one = False, np.zeros(1, np.float32)
        said = np.asarray([7], np.int32)
        return [Response(0, self._prompt, said, one, one, said, finish_reason="stop")]


def test_weights_are_read_beside_the_devices_of_the_engine(talker):
    model, params = load_hf(talker)
    mesh = make_mesh(tensor=2, devices=jax.devices()[2:4])
    sizes = EngineConfig(slots=1, max_tokens=16, max_response_tokens=8, stop_ids=(1,))
    engine = Engine(model, sizes, seed=0, mesh=mesh)
    published = []
    driver = SimpleNamespace(version=0, publish=published.append)
    status, told = send(engine, driver, talker)
    assert status == 200 and told["empg"] == {"process": PROCESS}
    read = published[0].read()
    held = {device for leaf in jax.tree.leaves(read) for device in leaf.devices()}
    assert held == {jax.devices("cpu")[0]} and not held & set(mesh.devices.flat)
    jax.tree.map(np.testing.assert_array_equal, engine.place(read), engine.place(params))


@pytest.mark.parametrize("error", [MemoryError("no"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no")])
def test_a_folder_that_cannot_be_read_is_refused(error, talker, monkeypatch):
    def fail(*_, **__):
        raise error

    engine = SimpleNamespace(base=None, model=load_hf(talker)[0])
    status, message = publish(engine, SimpleNamespace(), "/" + "a" * 5000)
    assert status == 400 and "must be a folder that this server sees" in message and len(message) < 300
    monkeypatch.setattr(reload, "load_hf", fail)
    engine.config = SimpleNamespace(max_tokens=64)
    status, message = publish(engine, SimpleNamespace(), talker)
    assert status == 503 and "no memory for the weights" in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_theta": 77.0, "rope_parameters": None}, r"rope_theta is 77.0, here"),
        ({"rms_norm_eps": 0.01}, r"norm_eps is 0.01, here 1e-06"),
        ({"model_type": "gpt2"}, "gpt2"),
    ],
)
def test_weights_of_a_model_that_computes_something_else_are_refused(changes, told, talker, tmp_path):
    """Their tensors have the same shapes."""
    folder = tmp_path / "other"
    shutil.copytree(talker, folder)
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | changes))
    config = SimpleNamespace(max_tokens=64)
    engine = SimpleNamespace(base=None, model=load_hf(talker)[0], config=config)
    status, message = publish(engine, SimpleNamespace(version=0), folder)
    assert status == 400 and told in message


def test_requests_for_weights_that_have_no_room_are_refused_and_the_engine_goes_on():
    news = queue.Queue()

    def ask(driver, **options):
        driver.submit([Job(np.ones(2, np.int32), 1, 0.0, 0, 0, news.put, **options)])
        return news.get(timeout=60)

    first = Weights(0, lambda: "small")
    with Driver(Tight(), max_waiting=4) as driver:
        assert ask(driver).response.tokens.tolist() == [7]
        driver.publish(Weights(1, ["large"].pop))
        for _ in range(2):
            assert "no memory for the weights of version 1" in ask(driver).error
        assert ask(driver, weights=first).error is None
        driver.publish(Weights(2, ["small"].pop))
        assert ask(driver).error is None and driver.engine.version == 2 and driver.failure is None
