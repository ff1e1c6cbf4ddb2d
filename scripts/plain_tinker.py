"""The training API without its client: JSON over HTTP."""

import httpx
import numpy as np

OPTIONS = [
    "compile_cache=null",
    "model.tokenizer=bytes",
    "model.dtype=float32",
    "model.num_layers=1",
    "serve.slots=8",
    "serve.max_tokens=64",
    "serve.max_body_mb=1",
    "serve.warm_up=false",
    "serve.snapshots=2",
    "serve.gap_timeout=1",
    "serve.name=pupil",
    "train.micro_tokens=1024",
]


def tensor(values, dtype):
    array = np.asarray(values)
    return {"data": array.ravel().tolist(), "dtype": dtype, "shape": list(array.shape)}


def datum(tokens, **inputs):
    """A datum of a row of tokens; lists of integers are int64, others float32."""
    given = {"target_tokens": tensor(tokens[1:], "int64")}
    for name, values in inputs.items():
        whole = np.asarray(values).dtype.kind == "i"
        given[name] = tensor(values, "int64" if whole else "float32")
    chunks = [{"type": "encoded_text", "tokens": tokens[:-1]}]
    return {"model_input": {"chunks": chunks}, "loss_fn_inputs": given}


class Plain:
    """A session and its model."""

    def __init__(self, url, key="tml-secret"):
        self.http = httpx.Client(
            base_url=f"{url}/api/v1", headers={"X-API-Key": key}, timeout=300, trust_env=False
        )
        self.seq = 0
        self.session = self.ask("create_session", tags=[], user_metadata={}, sdk_version="0")["session_id"]
        self.samples = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ask(f"sessions/{self.session}/finish", reason={"type": "success"})
        self.http.close()

    def ask(self, route, **body):
        answer = self.http.post(f"/{route}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, promise, accept="application/json"):
        """The result of a request, or its error."""
        while True:
            answer = self.http.post(
                "/retrieve_future", json={"request_id": promise["request_id"]}, headers={"Accept": accept}
            )
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.content if "protobuf" in answer.headers["content-type"] else answer.json()

    def create(self, number=0):
        body = {"session_id": self.session, "model_seq_id": number, "base_model": "pupil"}
        found = self.wait(self.ask("create_model", **body))
        self.model, self.seq = found.get("model_id"), 0
        return found

    def create_again(self):
        """The first weights once more, under another number."""
        self.ask("unload_model", model_id=self.model)
        body = {"session_id": self.session, "model_seq_id": 9, "base_model": "pupil"}
        promise = self.ask("create_model", **body)
        self.model, self.seq = self.wait(promise)["model_id"], 0
        return promise

    def sample_base(self):
        """Tokens of the base model."""
        asked = self.ask("create_sampling_session", session_id=self.session, base_model="pupil")
        found = self.wait(self.sample(asked["sampling_session_id"], [65, 66], max_tokens=3))
        return found["sequences"][0]["tokens"]

    def begin(self, route, *, seq=None, **body):
        self.seq += seq is None
        return self.ask(route, model_id=self.model, seq_id=seq or self.seq, **body)

    def batch(self, data, loss="cross_entropy", *, seq=None, forward_only=False, **config):
        asked = {"data": data, "loss_fn": loss, "loss_fn_config": config}
        return self.begin(
            "forward_backward", seq=seq, forward_backward_input=asked, forward_only=forward_only
        )

    def step(self, **settings):
        return self.begin("optim_step", adam_params={"learning_rate": 1e-2, **settings})

    def sampler(self, **body):
        return self.wait(self.begin("save_weights_for_sampler", **body))["sampling_session_id"]

    def sample(self, sampler, prompt, count=1, prompt_logprobs=False, **params):
        self.samples += 1
        body = {"sampling_session_id": sampler, "seq_id": self.samples, "num_samples": count}
        chunks = {"chunks": [{"type": "encoded_text", "tokens": prompt}]}
        return self.ask(
            "asample", prompt=chunks, sampling_params=params, prompt_logprobs=prompt_logprobs, **body
        )
