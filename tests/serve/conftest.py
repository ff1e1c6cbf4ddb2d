"""One server for the tests of this folder that a process runs."""

import signal

import httpx
import openai
import plain_tinker
import pytest
from serving import serving

from tests.serve import servers

OPTIONS = [
    "compile_cache=null",
    f"model.chat_template={servers.TEMPLATE}",
    "model.dtype=float32",
    "serve.slots=4",
    "serve.max_tokens=1024",
    "serve.max_waiting=8",
    "serve.max_body_mb=1",
    "serve.warm_up=false",
    "serve.name=talker",
]


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    return servers.save_talker(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="session")
def server(talker, tmp_path_factory):
    """The server, which expects the bearer token ``secret``."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "serve", talker, "--api-key", "secret", *OPTIONS) as server:
        yield server


@pytest.fixture(scope="session")
def http(server):
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="secret",
        max_retries=0,
        http_client=httpx.Client(timeout=120, trust_env=False),
    ) as client:
        yield client


@pytest.fixture(scope="session")
def studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio")
    options = [*plain_tinker.OPTIONS, f"serve.save_dir={folder}/saved"]
    command = ["serve", "quickstart", "--train", "--api-key", "tml-secret", *options]
    with serving(folder, *command) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=60)
        assert server.process.returncode == 143
