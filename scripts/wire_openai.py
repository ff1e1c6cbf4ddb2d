"""Train over the OpenAI wire: the official client samples, batches go back as JSON, the server computes EMPG.

python scripts/wire_openai.py URL MODEL      a server of: empg-jax serve quickstart --train
"""

from __future__ import annotations

import sys

import httpx
import numpy as np
import openai
from plain_tinker import Plain, datum

STEPS, PROMPTS, SAMPLES, LENGTH, GOAL = 20, 4, 16, 8, 8


def sample(client: openai.OpenAI, model: str, prompt: list[int]) -> list[openai.types.CompletionChoice]:
    answer = client.completions.create(
        model=model,
        prompt=prompt,
        n=SAMPLES,
        max_tokens=LENGTH,
        temperature=1.0,
        extra_body={"return_token_ids": True},
    )
    return answer.choices


def make_datum(prompt: list[int], choice: openai.types.CompletionChoice, group: int) -> tuple[dict, int]:
    """A response as one turn, with what the server said about its tokens; and its reward."""
    found = choice.model_extra
    tokens, empg = found["token_ids"], found["empg"]
    before = [0.0] * (len(prompt) - 1)
    reward = sum(token < GOAL for token in tokens)
    made = datum(
        [*prompt, *tokens],
        logprobs=[*before, *empg["logprobs"]],
        entropies=[*before, *empg["entropies"]],
        turns=[[len(before), len(before) + len(tokens)]],
        rewards=[float(reward)],
        group=[group],
    )
    return made, reward


def main(url: str, model: str, steps: int = STEPS) -> None:
    with (
        httpx.Client(timeout=120, trust_env=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="tml-none", http_client=http) as client,
        Plain(url, "tml-none") as training,
    ):
        training.create()
        for step in range(steps):
            training.sampler()  # the routes of OpenAI sample from these weights
            data, rewards = [], []
            for group in range(PROMPTS):
                prompt = [65 + group, 66]
                pairs = [make_datum(prompt, choice, group) for choice in sample(client, model, prompt)]
                data += [made for made, _ in pairs]
                rewards += [reward for _, reward in pairs]
            done = training.batch(data, "empg:grpo_empg", **{"empg.zeta": 0.05})
            training.wait(training.step(learning_rate=3e-3))
            gap = training.wait(done)["metrics"]["logprob_gap:max"]
            print(f"step {step + 1}: reward {np.mean(rewards):.2f} of {LENGTH}, log-prob gap {gap:.1e}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
