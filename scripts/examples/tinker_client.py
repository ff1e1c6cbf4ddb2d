"""Train a policy that empg-jax serves, with the official Tinker client: it learns to say bytes below 8.

empg-jax serve quickstart --train --port 8000 model.tokenizer=bytes

TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-none python scripts/examples/tinker_client.py
"""

import os
import sys

os.environ.setdefault("TINKER_TELEMETRY", "0")

import numpy as np
import tinker
from tinker import types

STEPS, PROMPTS, SAMPLES, LENGTH, GOAL = 25, 8, 8, 8, 8


def score(tokens: list[int]) -> float:
    return sum(token < GOAL for token in tokens)


def make_datum(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """Targets are the tokens one place later; those of the prompt have no advantage."""
    tokens, before = [*prompt, *sequence.tokens], len(prompt) - 1
    count = len(sequence.tokens)
    inputs = {
        "target_tokens": np.array(tokens[1:]),
        "logprobs": np.array([0.0] * before + list(sequence.logprobs), np.float32),
        "advantages": np.array([0.0] * before + [advantage] * count, np.float32),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def main(model: str) -> None:
    with tinker.ServiceClient() as service:
        training = service.create_lora_training_client(base_model=model, seed=0).result()
        for step in range(STEPS):
            sampling = training.save_weights_and_get_sampling_client().result()
            prompts = [[65 + number, 66] for number in range(PROMPTS)]
            asked, data, rewards = [], [], []
            for number, prompt in enumerate(prompts):
                options = types.SamplingParams(max_tokens=LENGTH, seed=step * PROMPTS + number)
                asked.append(sampling.sample(types.ModelInput.from_ints(prompt), SAMPLES, options))
            for prompt, future in zip(prompts, asked, strict=True):
                sequences = future.result().sequences
                scores = np.array([score(sequence.tokens) for sequence in sequences])
                rewards += scores.tolist()
                pairs = zip(sequences, scores - scores.mean(), strict=True)
                data += [make_datum(prompt, sequence, advantage) for sequence, advantage in pairs]
            done = training.forward_backward(data, "importance_sampling")
            training.optim_step(types.AdamParams(learning_rate=3e-3)).result()
            gap = done.result().metrics["logprob_gap:max"]
            print(f"step {step + 1}: reward {np.mean(rewards):.2f} of {LENGTH}, log-prob gap {gap:.1e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
