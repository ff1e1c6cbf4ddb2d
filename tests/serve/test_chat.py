"""`empg-jax chat`: lines in, answers out, through the engine in this process."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.errors import RunError
from empg_jax.serve.chat import Chat
from empg_jax.serve.driver import Driver, Job
from empg_jax.serve.server import run_server
from empg_jax.serve.wire import ApiError
from tests.serve.conftest import OPTIONS
from tests.serve.servers import CALL

KEEP = ("compile_cache", "model.")
MODEL = [*(option for option in OPTIONS if option.startswith(KEEP)), "serve.max_tokens=64"]


def chat(source, *options, stdin):
    result = CliRunner().invoke(app, ["chat", str(source), *MODEL, *map(str, options)], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
def test_a_conversation_goes_on_begins_anew_and_tells_entropies(talker):
    lines = "red green\n\nblue\n/new\nred green\n"
    code, out, err = chat(talker, "--entropy", "--temperature", 0, stdin=lines)
    assert code == 0 and "model: a conversation has at most 64 tokens" in err and "Ctrl-D ends" in err
    asked = [line for line in out.splitlines() if line.startswith("> ")]
    assert asked == ["> red green", "> ", "> blue", "> /new", "> red green"]
    answers = [line for line in out.splitlines() if line.startswith("<tool_call>")]
    assert len(answers) == 3 and CALL in answers[0]
    told = re.findall(r"\[(\d+) tokens, mean entropy (\d\.\d{3}) nats, stop\]", out)
    assert len(told) == 3 and told[0] == told[2]  # the same question again
    assert 0 < float(told[0][1]) < 5


@pytest.mark.slow
def test_a_limit_and_a_seed(talker):
    code, out, _ = chat(talker, "--max-tokens", 3, "--seed", 5, "--entropy", stdin="one\n")
    assert code == 0 and "[3 tokens, " in out
    assert chat(talker, "--max-tokens", 3, "--seed", 5, "--entropy", stdin="one\n")[1] == out


@pytest.mark.slow
def test_a_conversation_that_is_full_is_told_and_stays(talker):
    code, out, _ = chat(talker, "--max-tokens", 2, stdin=("one two " * 40) + "\none\n")
    assert code == 0 and "maximum context length is 64" in out and "/new begins a new conversation]" in out
    assert out.count("[this model's maximum") == 1


@pytest.mark.slow
def test_a_model_without_a_template_goes_on_with_the_text(talker, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(talker, base)
    for path in base.glob("chat_template*"):
        path.unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    options = [option for option in MODEL if "chat_template" not in option]
    result = CliRunner().invoke(
        app, ["chat", str(base), *options, "--temperature", "0", "--max-tokens", "4"], input="north\n"
    )
    assert result.exit_code == 0, result.stderr
    assert "there is no chat template, so it goes on with your text" in result.stderr
    assert result.stdout.splitlines()[1].split() == ["south", "north", "south", "north"]


def test_lines_that_were_cut_off_leave_the_queue():
    driver = Driver(SimpleNamespace(config=SimpleNamespace(slots=1)), max_waiting=1)  # its thread is busy
    asked = SimpleNamespace(
        make_job=lambda index, notify: Job(np.zeros(1, np.int32), 1, 0.0, 0, index, notify),
        decode=None,
        sampling=SimpleNamespace(stops=[]),
    )
    chat_ = Chat(SimpleNamespace(read_completion=lambda body: asked), driver, {}, None, has_template=False)
    for _ in range(3):
        job = asked.make_job(0, print)
        driver.submit([job])
        driver.cancel([job])
    driver.submit([asked.make_job(0, print) for _ in range(2)])
    with pytest.raises(ApiError, match="is busy with lines that were cut off"):
        chat_.ask("more", print)
    driver._is_closed = True
    with pytest.raises(RunError, match="the engine failed: the server is stopping"):
        chat_.ask("more", print)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_signal_does_not_wait_for_a_busy_thread(error, code, monkeypatch):
    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr("os._exit", leave)
    closed = []
    for is_busy, expected in ((False, type(error)), (True, Left)):
        work = SimpleNamespace(is_busy=is_busy, close=lambda: closed.append(error))
        server = SimpleNamespace(run=lambda sockets: (_ for _ in ()).throw(error))
        with pytest.raises(expected) as found:
            run_server(server, None, [work])
    assert found.value.args == (code,) and len(closed) == 2


def test_mistakes_are_one_message():
    result = CliRunner().invoke(app, ["chat", "nowhere"], input="hello\n")
    assert result.exit_code == 2 and result.stdout == ""
    assert "nowhere is no run, no Hugging Face folder, no preset and no configuration" in result.stderr
    result = CliRunner().invoke(app, ["chat", "quickstart", "--temperature", "-1"])
    assert (result.exit_code, result.stdout) == (2, "") and "--temperature" in result.stderr
