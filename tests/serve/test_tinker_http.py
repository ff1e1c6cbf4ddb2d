"""The training API by plain HTTP, against a server in another process."""

import httpx
import numpy as np
import pytest
from plain_tinker import Plain, datum

from empg_jax.serve.tinker.proto import message
from tests.serve.protos import as_proto

ROWS = [[65, 66, 67, 68, 69], [70, 71, 72], [80, 81, 82, 83, 84, 85, 86]]


@pytest.fixture
def plain(studio):
    with Plain(studio.url) as plain:
        assert "model_id" in plain.create()
        yield plain


def generate(plain, tokens, **params):
    """Tokens of the route that vLLM has."""
    body = {"token_ids": tokens, "sampling_params": params}
    answer = plain.http.post("/../../inference/v1/generate", json=body)
    return answer.json()["choices"][0]["token_ids"]


def test_batches_are_applied_in_order_and_make_one_step(plain):
    info = plain.ask("get_info", model_id=plain.model)
    assert (info["is_lora"], info["model_data"]["model_name"]) == (False, "pupil")
    data = [datum(row) for row in ROWS]
    whole = plain.wait(plain.batch(data))
    assert [len(output["logprobs"]["data"]) for output in whole["loss_fn_outputs"]] == [4, 2, 6]
    stepped = plain.wait(plain.step(learning_rate=0.1))["metrics"]
    # Sampled by a session from other weights, the routes of OpenAI still have those that were published.
    prompt, options = [65, 66], {"seed": 1, "max_tokens": 5}
    path = plain.wait(plain.begin("save_weights_for_sampler", path="named"))["path"]
    assert path == f"tinker://{plain.model}/sampler_weights/named"
    base = plain.ask("create_sampling_session", session_id=plain.session, base_model="pupil")
    named = plain.ask("create_sampling_session", session_id=plain.session, model_path=path)
    first, later = (
        plain.wait(plain.sample(sampler["sampling_session_id"], prompt, **options))["sequences"][0]
        for sampler in (named, base)
    )
    assert first["tokens"] != later["tokens"] and generate(plain, prompt, **options) == first["tokens"]
    # The same weights again, and the batch in two parts: the second arrives first, in protobuf.
    path = plain.wait(plain.begin("save_weights", path="after"))["path"]
    assert path == f"tinker://{plain.model}/weights/after"
    plain.wait(plain.create_again())
    body = as_proto(plain.model, 2, data[2:], "cross_entropy")
    headers = {"Content-Type": "application/x-protobuf"}
    later = plain.http.post("/forward_backward", content=body, headers=headers).json()
    earlier = plain.batch(data[:2], seq=1)
    plain.seq = 2
    parts = [plain.wait(earlier), plain.wait(later)]
    assert sum(part["metrics"]["loss:sum"] for part in parts) == pytest.approx(whole["metrics"]["loss:sum"])
    again = plain.wait(plain.step(learning_rate=0.1))["metrics"]
    assert again["grad_norm"] == pytest.approx(stepped["grad_norm"], rel=1e-5)
    after = plain.wait(plain.batch(data, forward_only=True))
    assert after["metrics"]["loss:sum"] < whole["metrics"]["loss:sum"]
    # Saved weights with their optimizer: the next step is the same one.
    plain.wait(plain.batch(data))
    plain.wait(plain.step())
    expected = plain.wait(plain.batch(data, forward_only=True))["metrics"]["loss:sum"]
    plain.wait(plain.begin("load_weights", path=path, optimizer=True))
    plain.wait(plain.batch(data))
    plain.wait(plain.step())
    found = plain.wait(plain.batch(data, forward_only=True))["metrics"]["loss:sum"]
    assert found == pytest.approx(expected, rel=1e-5) and found < after["metrics"]["loss:sum"]


def test_samples_carry_entropies_and_versions_of_the_weights_that_they_name(plain):
    old = plain.sampler()
    options = {"max_tokens": 6, "seed": 5, "temperature": 1.0}
    before = plain.wait(plain.sample(old, [65, 66], 2, prompt_logprobs=True, **options))
    assert before["prompt_logprobs"][0] is None and before["prompt_logprobs"][1] < 0
    plain.batch([datum([65, 66, 67, 68, 69])])
    plain.step(learning_rate=0.1)
    new = plain.sampler()
    promises = [plain.sample(name, [65, 66], 2, **options) for name in (new, old, new, old)]
    found = [plain.wait(promise)["sequences"] for promise in promises]
    assert found[1] == found[3] == before["sequences"] and found[0] == found[2] != found[1]
    for sequence in found[0] + found[1]:
        statistics = sequence["empg"]
        assert len(sequence["tokens"]) == len(sequence["logprobs"]) == len(statistics["entropies"]) <= 6
        assert min(statistics["entropies"]) > 0
    versions = [sequences[0]["empg"]["versions"][0] for sequences in found[:2]]
    assert versions[0] == versions[1] + 1
    # The learner says the same of each response as the sampler did.
    for sequence in found[0]:
        row = [65, 66, *sequence["tokens"]]
        scored = plain.wait(plain.batch([datum(row)], forward_only=True))["loss_fn_outputs"][0]
        for name, sampled in (
            ("logprobs", sequence["logprobs"]),
            ("entropies", sequence["empg"]["entropies"]),
        ):
            gap = np.abs(np.array(scored[name]["data"][1:]) - sampled)
            assert gap.max() <= 1e-5
    # In protobuf, too, where our fields stand beside those of the official schema.
    answer = message("SampleResponse")
    answer.ParseFromString(plain.wait(promises[0], accept="application/x-protobuf"))
    (entropies, _) = (np.frombuffer(s.empg_entropies, np.float32) for s in answer.sequences)
    np.testing.assert_array_equal(entropies, np.float32(found[0][0]["empg"]["entropies"]))
    # The other routes sample from what was saved last.
    assert generate(plain, [65, 66], seed=5, max_tokens=6) == found[0][0]["tokens"]
    # The server keeps two sets of weights: the third takes the place of that whose last use is longer ago.
    plain.batch([datum([65, 66, 67])])
    plain.step()
    assert plain.sampler()
    dropped = plain.http.post("/asample", json={"sampling_session_id": new, "seq_id": 99})
    assert dropped.status_code == 400 and "serve.snapshots" in dropped.json()["error"]["message"]
    assert plain.wait(plain.sample(old, [65, 66], 2, **options))["sequences"] == before["sequences"]


def test_saved_weights_are_read_again_where_they_were_dropped(plain):
    options = {"max_tokens": 6, "seed": 5, "temperature": 1.0}

    def open_at(path):
        answer = plain.ask("create_sampling_session", session_id=plain.session, model_path=path)
        return answer["sampling_session_id"]

    def draw(sampler):
        return plain.wait(plain.sample(sampler, [65, 66], 2, **options))

    paths = []
    for number in range(3):
        plain.batch([datum([65, 66, 67 + number, 68])])
        plain.step(learning_rate=0.1)
        paths.append(plain.wait(plain.begin("save_weights", path=f"kept-{number}"))["path"])
    # The server keeps two different weights, and two sessions with the same path have the same.
    copy, twins = plain.sampler(), [open_at(paths[0]) for _ in range(2)]
    assert draw(twins[0]) == draw(twins[1]) and "sequences" in draw(copy)
    samplers = [open_at(path) for path in (*paths, *paths)]
    found = [draw(sampler)["sequences"] for sampler in samplers]
    assert found[:3] == found[3:] and found[0] != found[1] != found[2]
    assert [draw(sampler)["sequences"] for sampler in samplers] == found
    # What was overwritten meanwhile is not what the session began with.
    plain.wait(plain.begin("save_weights", path="kept-0", overwrite=True))
    for sampler in samplers[1:3]:
        draw(sampler)
    assert draw(samplers[0])["error"] == (
        f"the weights of {paths[0]} were overwritten since this sampling session began: begin another"
    )
    assert draw(open_at(paths[0]))["sequences"] == found[2]


def refused(plain, promise):
    found = plain.wait(promise)
    assert found["category"] == "user", found
    return found["error"]


def test_bad_batches_name_what_was_wrong_and_leave_no_gradient(plain):
    good = datum([65, 66, 67])
    wrong = {
        "loss_fn='cross_entrop' is not known (did you mean cross_entropy?)": ([good], "cross_entrop"),
        "loss_fn='empg:grpo_emp' is not known (did you mean grpo_empg?)": ([good], "empg:grpo_emp"),
        "needs a critic": ([good], "empg:ppo"),
        "needs scored answers": ([good], "empg:igpo"),
        "datum 1: advantages has the shape [3]; expected [2]": (
            [
                datum([65, 66, 67], logprobs=[0.0, 0.0], advantages=[0.0, 1.0]),
                datum([65, 66, 67], logprobs=[0.0, 0.0], advantages=[0.0, 1.0, 1.0]),
            ],
            "importance_sampling",
        ),
        "datum 0: logprobs is missing": ([good], "ppo"),
        "cross_entropy has no input advantages": ([datum([65, 66], advantages=[1.0])], "cross_entropy"),
        "datum 0: 900 is no token id": ([datum([65, 900])], "cross_entropy"),
        "datum 0: 71 tokens (the last target included), but the context has 64": (
            [datum([65] * 71)],
            "cross_entropy",
        ),
        "datum 0: weights holds a number that is not finite": (
            [datum([65, 66], weights=[1e39])],
            "cross_entropy",
        ),
        "datum 0: turns must be spans": (
            [datum([65, 66, 67], logprobs=[0.0, 0.0], turns=[[1, 9]], rewards=[1.0], group=[0])],
            "empg:grpo",
        ),
        "the batch has no datum": ([], "cross_entropy"),
    }  # fmt: skip
    for text, (data, loss) in wrong.items():
        assert text in refused(plain, plain.batch(data, loss))
    shifted = datum([65, 66, 67])
    shifted["loss_fn_inputs"]["target_tokens"]["data"] = [1, 2]
    assert "targets must be the input shifted by one" in refused(plain, plain.batch([shifted]))
    assert "ppo has no clip" in refused(plain, plain.batch([good], "ppo", clip=1))
    # A step after a failed batch would lack its gradient, so it is not made; the next one is.
    error = refused(plain, plain.step())
    assert error.startswith("no step was made: forward_backward with seq_id=") and "ppo has no clip" in error
    assert "optim_step without a forward_backward" in refused(plain, plain.step())
    plain.batch([good])
    assert "adam_params.beta1=1 must be" in refused(plain, plain.step(beta1=1))
    assert "grad_norm" in plain.wait(plain.step())["metrics"]
    assert "there are no weights" in refused(
        plain, plain.begin("load_weights", path=f"tinker://{plain.model}/weights/no", optimizer=False)
    )
    assert "is no path of weights" in refused(
        plain, plain.begin("load_weights", path="../x", optimizer=False)
    )
    assert "is no name for weights" in refused(plain, plain.begin("save_weights", path="../x"))


def test_a_gap_in_the_numbers_is_told(plain):
    late = plain.batch([datum([65, 66, 67])], seq=3)
    again = plain.batch([datum([65, 66, 67])], seq=3)  # sent twice: the same request
    assert late == again
    assert "seq_id=3 waited 1 s for seq_id 1 to 2, which did not arrive" in refused(plain, late)
    assert "seq_id=1 comes too late: the next is 4" in refused(plain, plain.batch([datum([65, 66])], seq=1))
    plain.seq = 3
    assert "seq_id 1 never arrived" in refused(plain, plain.step())
    plain.batch([datum([65, 66, 67])])
    assert "grad_norm" in plain.wait(plain.step())["metrics"]


def test_bad_requests_have_a_status_and_a_message(studio, plain):
    http = plain.http
    chunks = {"chunks": [{"type": "encoded_text", "tokens": [65] * 64}]}
    sampler = plain.sampler()
    long = {"sampling_session_id": sampler, "seq_id": 0, "prompt": chunks, "sampling_params": {}}
    sample = long | {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [65]}]}}
    batch = {"data": [], "loss_fn": "cross_entropy"}
    zeroth = {"model_id": plain.model, "seq_id": 0, "forward_backward_input": batch}
    table = [
        ("optim_step", {"model_id": "other", "seq_id": 1}, 404, "model 'other' is not in training"),
        ("optim_step", {"model_id": plain.model}, 400, "seq_id is missing"),
        ("forward_backward", zeroth, 400, "from 1"),
        ("forward_backward", {}, 400, "forward_backward_input"),
        ("get_info", {"model_id": 3}, 404, "not in training"),
        ("session_heartbeat", {"session_id": "x"}, 404, "session 'x' does not exist"),
        ("retrieve_future", {"request_id": "x"}, 410, "request 'x' is not known"),
        ("create_model", {"session_id": plain.session, "base_model": "gpt"}, 404, "this server has 'pupil'"),
        ("create_sampling_session", {"session_id": plain.session, "base_model": "x"}, 404, "this server has"),
        ("asample", {"sampling_session_id": "x"}, 404, "sampling session 'x' does not exist"),
        ("asample", long, 400, "the prompt has 64 tokens"),
        ("asample", sample | {"topk_sample_logprobs": 3}, 400, "topk_sample_logprobs=3 is not supported"),
        ("asample", sample | {"sampling_params": {"temperature": -1}}, 400, "temperature=-1"),
        ("asample", sample | {"sampling_params": {"stop": []}}, 400, "stop=[]"),
        ("asample", sample | {"prompt": [65]}, 400, "prompt must be"),
    ]  # fmt: skip
    for path, body, status, text in table:
        answer = http.post(f"/{path}", json=body)
        assert (answer.status_code, text in answer.text) == (status, True), answer.text
    proto = {"Content-Type": "application/x-protobuf"}
    answer = http.post("/forward_backward", content=b"\xff\xff", headers=proto)
    assert answer.status_code == 400 and "ForwardBackwardRequest in protobuf" in answer.text
    answer = http.post("/forward_backward", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "not JSON" in answer.text
    answer = http.post("/forward_backward", content=b"x", headers={"Content-Encoding": "zstd"})
    assert answer.status_code == 415 and "zstd is not supported" in answer.text
    assert http.post("/forward_backward", content=b"x" * (2 << 20), headers=proto).status_code == 413
    for headers in ({}, {"X-API-Key": "tml-wrong"}):
        answer = httpx.post(f"{studio.url}/api/v1/create_session", json={}, headers=headers, trust_env=False)
        assert answer.status_code == 401 and "wrong or missing bearer token" in answer.text
    assert http.get("/get_server_capabilities").json()["supported_models"][0]["max_context_length"] == 64


def test_one_client_trains_at_a_time(studio, plain):
    with Plain(studio.url) as other:
        error = other.create()
        assert error["category"] == "user" and f"{plain.model} is in training" in error["error"]
        assert other.sample_base()  # sampling from the base model is for everyone
        plain.ask("unload_model", model_id=plain.model)
        assert "model_id" in other.create(1)
    assert plain.http.post("/optim_step", json={"model_id": plain.model, "seq_id": 1}).status_code == 404
    ended = plain.http.post("/session_heartbeat", json={"session_id": other.session})
    assert ended.status_code == 410 and "has ended" in ended.text
