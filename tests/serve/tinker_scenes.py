"""What the official client does with our server, each scene in a process of its own: it leaves sockets open.

python -m tests.serve.tinker_scenes NAME...    with TINKER_BASE_URL and TINKER_API_KEY
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tinker

from empg_jax.config import load_config
from empg_jax.rollout.record import read_episodes
from empg_jax.run.credit import make_recompute


def make_datum(tokens, **inputs):
    arrays = {name: np.asarray(values) for name, values in inputs.items()}
    arrays = {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()
    }
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.asarray(tokens[1:]), **arrays},
    )


def sample(sampling, prompt, count, seed):
    options = tinker.SamplingParams(max_tokens=6, temperature=1.0, seed=seed)
    return sampling.sample(tinker.ModelInput.from_ints(prompt), count, options).result().sequences


def agree(service, training):
    """Sampler and learner agree on every response; a batch is split and applied in order."""
    assert training.get_info().lora_rank is None  # all weights are trained, whatever the client asks
    assert training.get_tokenizer().encode("AB") == [65, 66]
    for _ in range(2):  # the first weights, and those after a step
        sampling = training.save_weights_and_get_sampling_client().result()
        sequences = sample(sampling, [65, 66], 4, seed=3)
        rows = [[65, 66, *sequence.tokens] for sequence in sequences]
        scored = training.forward([make_datum(row) for row in rows], "cross_entropy").result()
        for row, sequence, output in zip(rows, sequences, scored.loss_fn_outputs, strict=True):
            learned = output["logprobs"].to_numpy()[1:]
            assert np.abs(learned - sequence.logprobs).max() <= 1e-5
            whole = sampling.compute_logprobs(tinker.ModelInput.from_ints(row)).result()
            assert whole[0] is None and np.abs(np.array(whole[2:]) - sequence.logprobs).max() <= 1e-5
        # The client splits a batch, sends its first part last, and the step behind it all.
        config = service.holder.get_client_config()
        service.holder._client_config = config.model_copy(update={"fwdbwd_max_chunk_len": 1})
        done = training.forward_backward([make_datum(row) for row in rows], "cross_entropy")
        stepped = training.optim_step(tinker.AdamParams(learning_rate=0.1))
        assert done.result().metrics["datums:sum"] == 4
        assert stepped.result().metrics["grad_norm"] > 0
    with pytest.raises(tinker.RequestFailedError, match=r"User|not known \(did you mean ppo\?\)"):
        training.forward([make_datum([65, 66])], "ppoo").result()
    with pytest.raises(tinker.RequestFailedError, match="trains one model at a time"):
        service.create_lora_training_client(base_model="pupil").result()


def go_on(service, training):
    """Saved weights go on in another session."""
    data = [make_datum([65, 66, 67, 68])]
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(tinker.AdamParams(learning_rate=0.1)).result()
    expected = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    path = training.save_state("kept").result().path
    named = training.save_weights_for_sampler("kept").result().path
    tokens = [s.tokens for s in sample(service.create_sampling_client(named).result(), [65], 2, seed=1)]
    service.close("success").result()
    with tinker.ServiceClient() as other:
        again = other.create_training_client_from_state_with_optimizer(path).result()
        assert again.forward(data, "cross_entropy").result().metrics["loss:sum"] == pytest.approx(expected)
        sampling = other.create_sampling_client(model_path=named).result()
        assert [s.tokens for s in sample(sampling, [65], 2, seed=1)] == tokens
        with pytest.raises(tinker.NotFoundError, match="there are no weights"):
            other.create_sampling_client(model_path=path.replace("kept", "lost")).result()


def credit(service, training):
    """EMPG is computed on the server from turns."""
    sampling = training.save_weights_and_get_sampling_client(kind="inflight").result()
    data, records = [], []
    for member in range(6):
        row, spans, logprobs = [65, 66], [], [0.0]
        for turn in range(2):
            (sequence,) = sample(sampling, row, 1, seed=10 * member + turn)
            spans.append([len(row) - 1, len(row) - 1 + len(sequence.tokens)])
            row = [*row, *sequence.tokens, 90 + turn]
            logprobs += [*sequence.logprobs, 0.0]
        rewards = [0.5 * (member % 2), float(member % 3)]
        data.append(
            make_datum(row, turns=spans, rewards=rewards, group=[member // 3], logprobs=[*logprobs[:-1], 0.0])
        )
        records.append((spans, rewards, member // 3))
    done = training.forward_backward(data, "empg:grpo_empg", {"empg.zeta": 0.1}).result()
    assert done.metrics["logprob_gap:max"] <= 1e-5 and done.metrics["grad_norm:mean"] > 0
    # The same credit as the command computes from the same entropies.
    episodes = []
    for (spans, rewards, group), output in zip(records, done.loss_fn_outputs, strict=True):
        entropies = output["entropies"].to_numpy()
        turns = [
            {"reward": reward, "valid": True, "tokens": b - a, "entropy": float(entropies[a:b].mean())}
            for (a, b), reward in zip(spans, rewards, strict=True)
        ]
        episodes.append({"group_id": group, "turns": turns})
    keys = ["algorithm.name=grpo_empg", "algorithm.empg.zeta=0.1", "env.invalid_penalty=0"]
    expected, _ = make_recompute(load_config("quickstart", keys))(read(episodes))
    for (spans, _, _), output, record in zip(records, done.loss_fn_outputs, expected, strict=True):
        advantages = output["advantages"].to_numpy()
        for (a, b), turn in zip(spans, record["turns"], strict=True):
            np.testing.assert_allclose(advantages[a:b], turn["advantage"], atol=1e-5)
    with pytest.raises(tinker.RequestFailedError, match="was in an earlier request of this step"):
        training.forward_backward(data[:1], "empg:grpo_empg", {"empg.zeta": 0.1}).result()


def read(episodes):
    """Checked records of episodes in the order of their groups."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episodes.jsonl"
        path.write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
        return read_episodes(path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tinker.ServiceClient() as client:
            model = client.create_lora_training_client(base_model="pupil", rank=8).result()
            {"agree": agree, "go_on": go_on, "credit": credit}[name](client, model)
            print(name)
