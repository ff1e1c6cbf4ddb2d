"""Write ``tests/models/data/golden_*.safetensors``: logits, log-probs and greedy tokens by torch.

The script needs the parity extra. Run it again only when a model family is added:

    python scripts/make_golden_logits.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.models import golden


@torch.no_grad()
def main() -> None:
    tokens = golden.make_tokens()
    for family, (kind, options) in golden.FAMILIES.items():
        config = transformers.AutoConfig.for_model(kind, **options)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        parameters = dict(model.named_parameters())  # tied ones once
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(golden.make_weight(name, tuple(parameter.shape))))
        logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
        logprobs = torch.log_softmax(logits[:-1].double(), -1).numpy()
        path = golden.save_golden(
            family,
            {**config.to_diff_dict(), "architectures": [type(model).__name__]},
            {name: list(parameter.shape) for name, parameter in parameters.items()},
            {
                "tokens": tokens,
                "logits": logits.numpy(),
                "logprobs": logprobs[np.arange(len(tokens) - 1), tokens[1:]].astype(np.float32),
                "greedy": continue_greedily(model, tokens[: golden.PROMPT]),
            },
        )
        print(f"{path.name}: {path.stat().st_size} bytes, largest logit {logits.abs().max():.1f}")


def continue_greedily(model: transformers.PreTrainedModel, prompt: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=golden.STEPS,
        min_new_tokens=golden.STEPS,
        do_sample=False,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].numpy().astype(np.int32)


if __name__ == "__main__":
    main()
