"""Measure torch with transformers at the shapes of the other benches. Print one JSON object.

The update is GRPO's: clipped ratios of the response half of each row, its entropies without a gradient,
gradients clipped at norm 1, fused AdamW. Attention is torch's own (SDPA), nothing is rematerialized, and
logits are computed for the responses alone. Generation is `generate` with a cache, without log-probs.

    python scripts/bench_torch.py --pin 0 --out torch.json   # the extra "parity" brings torch
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--pin", type=int, help="run on this core only")
parser.add_argument("--rows", type=int, default=8)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--micro-rows", type=int, default=2, help="rows per micro-batch")
parser.add_argument("--conversations", type=int, default=16, help="generated at once")
parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt and of a response")
parser.add_argument("--only", nargs="+", choices=("update", "generate"), default=["update", "generate"])
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--out", type=Path)
args = parser.parse_args()
if args.pin is not None:
    os.sched_setaffinity(0, {args.pin})

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB = 8192


def make_model() -> Any:
    """Make the 12.07M-parameter Qwen2 of the other benches, with random weights in float32."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1024,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(config).float()


def score(model: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probs and (without a gradient) entropies of the second half of each row."""
    half = args.length // 2
    logits = model(rows, use_cache=False, logits_to_keep=half + 1).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1)
    with torch.no_grad():
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, rows[:, half:, None])[..., 0], entropies


def make_update(model: Any) -> Callable[[], None]:
    """Make a function that takes one optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    rows = torch.randint(3, VOCAB, (args.rows, args.length))
    advantages = torch.randn(args.rows, 1)
    with torch.no_grad():
        old = torch.cat([score(model, each)[0] for each in rows.split(args.micro_rows)])

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, args.rows, args.micro_rows):
            few = slice(start, start + args.micro_rows)
            logprobs, _ = score(model, rows[few])
            ratios = (logprobs - old[few]).exp()
            clipped = ratios.clamp(0.8, 1.2)
            loss = -torch.minimum(ratios * advantages[few], clipped * advantages[few]).sum() / old.numel()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return update


def make_generate(model: Any) -> Callable[[], None]:
    """Make a function that samples a response for every conversation."""
    prompts = torch.randint(3, VOCAB, (args.conversations, args.prompt))
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    length = {"min_new_tokens": args.prompt, "max_new_tokens": args.prompt}

    def generate() -> None:
        mask = torch.ones_like(prompts)
        with torch.no_grad():
            found = model.generate(prompts, attention_mask=mask, pad_token_id=0, **settings, **length)
        if found.shape != (args.conversations, 2 * args.prompt):
            raise RuntimeError(f"responses ended early: {tuple(found.shape)}")

    return generate


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Return the medians of wall and CPU seconds; the first run warms up."""
    walls, cpus = [], []
    for _ in range(args.repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls[1:]), statistics.median(cpus[1:])


def main() -> None:
    torch.manual_seed(0)
    if args.pin is not None:
        torch.set_num_threads(1)
    model = make_model()
    result: dict[str, Any] = {"parameters": sum(each.numel() for each in model.parameters())}
    works = {
        "update": (make_update, args.rows * args.length),
        "generate": (make_generate, args.conversations * args.prompt),
    }
    for name in args.only:
        make, tokens = works[name]
        wall, cpu = measure(make(model))
        result |= {f"{name}_tokens_per_cpu_s": round(tokens / cpu, 1)}
        result |= {f"{name}_tokens_per_wall_s": round(tokens / wall, 1)}
    result["settings"] = {name: value for name, value in vars(args).items() if name != "out"}
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    result["load_average"] = os.getloadavg()
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


main()
