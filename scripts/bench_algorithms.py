"""Measure the cost of credit assignment; print one JSON object.

* quickstart size (128 trajectories x 10 turns, 64 rows x 256 tokens): CPU-seconds of one credit call
  (median), and of the update that it belongs to: score pass, credit, optimizer steps of the quickstart's
  model. Modulation is also shown apart from the base estimator, and the entropies apart from both.
  The methods that credit steps come after them.
* large (1,024 trajectories x 50 turns, 1,024 rows x 4,096 tokens): seconds of one credit call.

Run ``python scripts/bench_algorithms.py --out result.json``. Everything is measured in this process, on CPU,
on one core unless ``--cores`` says otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any


def pin(cores: int) -> list[int]:
    """Pin the process to the first cores that it may use; must run before JAX starts its threads."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, allowed)
    os.environ["JAX_PLATFORMS"] = "cpu"
    return allowed


def make_batch(
    rows: int, length: int, trajectories: int, turns: int, num_minibatches: int, vocab: int
) -> Any:
    """Make random trajectories packed evenly into rows; a third of a turn is sampled, half of them exist."""
    import jax.numpy as jnp
    import numpy as np

    from empg_jax.types import Batch, Scores

    rng = np.random.default_rng(0)
    per_row = trajectories // rows
    span = length // per_row
    place = np.arange(length)
    lengths = rng.integers(turns // 2, turns + 1, trajectories)
    owner = np.arange(rows)[:, None] * per_row + np.minimum(place // span, per_row - 1)[None]
    inside = np.broadcast_to(place % span, (rows, length))
    turn_size = span // turns
    turn_ids = np.minimum(inside // turn_size, turns - 1)
    exists = turn_ids < lengths[owner]
    loss_mask = exists & (inside % turn_size >= turn_size * 2 // 3)
    old = -rng.gamma(1.0, 0.5, (rows, length)).astype(np.float32)
    entropies = rng.gamma(1.0, 0.5, (rows, length)).astype(np.float32)
    won = rng.integers(0, 2, trajectories) > 0
    batch = Batch(
        tokens=jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32),
        loss_mask=jnp.asarray(loss_mask),
        segment_ids=jnp.asarray(np.where(exists, place // span % per_row + 1, 0), jnp.int32),
        positions=jnp.asarray(inside, jnp.int32),
        trunk_ids=jnp.full((rows, length), -1, jnp.int32),
        sequence_ids=jnp.asarray(np.where(exists, owner, -1), jnp.int32),
        trajectory_ids=jnp.asarray(owner, jnp.int32),
        turn_ids=jnp.asarray(turn_ids, jnp.int32),
        behavior_logprobs=jnp.asarray(old),
        behavior_entropies=jnp.asarray(entropies),
        minibatch_ids=jnp.asarray(np.arange(rows) * num_minibatches // rows, jnp.int32),
        returns=jnp.asarray(won, jnp.float32),
        group_ids=jnp.asarray(np.arange(trajectories) // 8, jnp.int32),
        trajectory_mask=jnp.ones(trajectories, bool),
        success=jnp.asarray(won),
        truncated=jnp.zeros(trajectories, bool),
        scored_zero=jnp.zeros(trajectories, bool),
        last_anchor_ids=jnp.asarray(rng.integers(0, 20, trajectories), jnp.int32),
        turn_rewards=jnp.asarray(rng.random((trajectories, turns)), jnp.float32),
        turn_truncated=jnp.zeros((trajectories, turns), bool),
        turn_valid=jnp.ones((trajectories, turns), bool),
        anchor_ids=jnp.asarray(rng.integers(0, 20, (trajectories, turns)), jnp.int32),
        action_ids=jnp.asarray(rng.integers(0, 5, (trajectories, turns)), jnp.int32),
        milestones=jnp.asarray(rng.random((trajectories, turns)) < 0.2),
        answer_logprobs=jnp.asarray(rng.normal(-2, 1, (trajectories, turns)), jnp.float32),
        versions=jnp.zeros((trajectories, turns), jnp.int32),
    )
    return batch, Scores(jnp.asarray(old), jnp.asarray(entropies), jnp.asarray(old)), int(loss_mask.sum())


STEPWISE = ("gigpo", "hgpo", "crbc", "graph_hca", "graft", "graph_gpo", "gagpo", "beacon")
# What is measured at the quickstart's size: a recipe, and keys that differ from it.
CREDITS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("grpo", "grpo_empg", "grpo_aem", *STEPWISE)},
    "graph_gpo, last seen": ("graph_gpo", {"graph": {"fail_node": "observation"}}),
    "turn_ppo": ("turn_ppo", {}),
    "sampo": ("sampo", {}),
    "erc": ("erc", {}),
}


def cpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Measure the median CPU-seconds (all threads) of a call, after one that compiles."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(call())
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure_quickstart(repeats: int, vocab: int) -> dict[str, Any]:
    """Compare one credit call with its whole update, for the quickstart's model and batch."""
    import jax
    import numpy as np

    from empg_jax.algorithms import make_algorithm
    from empg_jax.learner.state import init_state, make_optimizer
    from empg_jax.learner.update import make_learner
    from empg_jax.models.decoder import DecoderConfig
    from empg_jax.parallel.mesh import make_mesh

    steps, micro_rows, rows = 4, 4, 64
    batch, scores, sampled = make_batch(rows, 256, 128, 10, steps, vocab)
    optimizer, _ = make_optimizer(learning_rate=1e-3, final_learning_rate=5e-5, total_steps=1000)
    model, mesh = DecoderConfig(vocab_size=vocab), make_mesh()
    credit_seconds = {}
    for label, (name, keys) in CREDITS.items():
        algorithm = make_algorithm(name, num_minibatches=steps, **keys)
        known = scores if algorithm.value_loss is None else scores.replace(values=scores.entropies)
        call = jax.jit(algorithm.credit)
        credit_seconds[label] = cpu_seconds(lambda call=call, known=known: call(batch, known), repeats)
    learner = make_learner(
        model, make_algorithm("grpo", num_minibatches=steps), optimizer, mesh, micro_rows=micro_rows
    )
    state = init_state(jax.random.key(0), model, optimizer, learner.shardings)
    micro_batches = rows // micro_rows
    score = cpu_seconds(lambda: learner.score(state.params, state.params, batch, np.int32(micro_batches)), 5)
    credit = learner.credit(batch, scores)
    edges = [np.int32(i * micro_batches // steps) for i in range(steps + 1)]
    holder = [state]

    def optimizer_steps() -> Any:
        for start, stop in itertools.pairwise(edges):
            holder[0], metrics = learner.update(holder[0], batch, scores, credit, start, stop)
        return metrics

    optimize = cpu_seconds(optimizer_steps, 5)
    result: dict[str, Any] = {
        "trajectories": 128,
        "turns": 10,
        "rows": rows,
        "row_tokens": 256,
        "sampled_tokens": sampled,
        "optimizer_steps": steps,
        "score_cpu_seconds": score,
        "optimizer_cpu_seconds": optimize,
        "credit_cpu_seconds": credit_seconds,
    }
    for name in [label for label in CREDITS if label != "grpo"]:
        update = score + credit_seconds[name] + optimize
        result[f"{name}_share_of_update"] = credit_seconds[name] / update
        result[f"{name}_extra_over_grpo_cpu_seconds"] = credit_seconds[name] - credit_seconds["grpo"]
    result["entropies"] = measure_entropies(learner, holder[0].params, batch, micro_batches)
    return result


def measure_entropies(learner: Any, params: Any, batch: Any, micro_batches: int) -> dict[str, float]:
    """Measure the CPU-seconds of a score pass with entropies, and of one with log-probs alone."""
    import jax
    import jax.numpy as jnp

    from empg_jax.models.decoder import forward, output_embedding
    from empg_jax.models.head import compute_head

    model = learner.model
    rows = batch.tokens.shape[0] // micro_batches

    def hidden_of(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        cut = [jax.lax.dynamic_slice_in_dim(x, index * rows, rows) for x in (batch.tokens, batch.positions)]
        segments = jax.lax.dynamic_slice_in_dim(batch.segment_ids, index * rows, rows)
        hidden = forward(params, model, cut[0], cut[1], segments)
        return hidden.reshape(-1, hidden.shape[-1]), cut[0].reshape(-1)

    @jax.jit
    def with_entropies() -> jax.Array:
        weights = output_embedding(params)

        def one(index: jax.Array) -> jax.Array:
            hidden, tokens = hidden_of(index)
            return jnp.stack(compute_head(hidden, weights, tokens, 1.0))

        return jax.lax.map(one, jnp.arange(micro_batches))

    @jax.jit
    def logprobs_alone() -> jax.Array:
        weights = output_embedding(params)

        def one(index: jax.Array) -> jax.Array:
            hidden, tokens = hidden_of(index)
            logits = hidden @ weights.T
            chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
            return chosen - jax.nn.logsumexp(logits, axis=1)

        return jax.lax.map(one, jnp.arange(micro_batches))

    both, alone = cpu_seconds(with_entropies, 5), cpu_seconds(logprobs_alone, 5)
    return {"pass_with_entropies_cpu_seconds": both, "pass_without_entropies_cpu_seconds": alone}


def measure_large(names: list[str]) -> dict[str, Any]:
    """Measure the wall and CPU seconds of one credit call at scale."""
    import jax

    from empg_jax.algorithms import make_algorithm

    batch, scores, sampled = make_batch(1024, 4096, 1024, 50, 4, 32000)
    result: dict[str, Any] = {
        "trajectories": 1024,
        "turns": 50,
        "tokens": 1024 * 4096,
        "sampled_tokens": sampled,
    }
    for name in names:
        credit = jax.jit(make_algorithm(name, num_minibatches=4).credit)
        jax.block_until_ready(credit(batch, scores))
        walls, cpus = [], []
        for _ in range(3):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(credit(batch, scores))
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        result[name] = {"wall_seconds": statistics.median(walls), "cpu_seconds": statistics.median(cpus)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="also write the JSON object to this file")
    parser.add_argument("--cores", type=int, default=1, help="cores that the process may use")
    parser.add_argument("--repeats", type=int, default=200, help="credit calls that the median is taken over")
    parser.add_argument("--vocab", type=int, default=256, help="vocabulary of the quickstart-sized model")
    parser.add_argument("--skip-large", action="store_true", help="leave the large batch out")
    arguments = parser.parse_args()
    cores = pin(arguments.cores)

    import jax

    result = {
        "jax": jax.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": len(cores),
        "quickstart": measure_quickstart(arguments.repeats, arguments.vocab),
    }
    if not arguments.skip_large:
        result["large"] = measure_large(
            [
                "grpo",
                "grpo_empg",
                "grpo_aem",
                "gigpo_aem",
                "gspo_aem",
                "reinforce_pp",
                "crbc",
                "graft",
                "hgpo",
            ]
        )
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
