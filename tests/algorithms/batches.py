"""A small packed batch with all that occurs: absent rows and trajectories, two sequences in a row, junk."""

import jax.numpy as jnp
import numpy as np

from empg_jax.types import Batch, Scores

B, T, N, K = 8, 16, 8, 3


def make_batch(seed=0, *, junk=0.0):
    """Six trajectories of one to three turns in rows 0-5, two to a row; rows 6 and 7 are absent."""
    rng = np.random.default_rng(seed)
    loss_mask = np.zeros((B, T), bool)
    sequence_ids = np.full((B, T), -1, np.int32)
    trajectory_ids, turn_ids = np.zeros((2, B, T), np.int32)
    for trajectory in range(6):
        row, start = divmod(trajectory, 2)
        start *= 8
        turns = 1 + trajectory % K
        sequence_ids[row, start : start + 2 * turns + 1] = 100 + 11 * trajectory
        for turn in range(turns):
            place = start + 2 * turn + 1
            loss_mask[row, place : place + 1 + turn % 2] = True
            trajectory_ids[row, place : place + 2] = trajectory
            turn_ids[row, place : place + 2] = turn
    minibatch_ids = np.where(np.arange(B) < 3, np.arange(B) % 2, -1).astype(np.int32)

    def stream(values):
        return jnp.asarray(np.where(loss_mask, values, junk).astype(np.float32))

    returns = np.float32([1, 0, 1, 1, 0.5, 0, 7, 7])
    turn_rewards = np.zeros((N, K), np.float32)
    turn_rewards[np.arange(N), np.arange(N) % K] = returns  # on each trajectory's last turn

    old = -rng.gamma(2.0, 0.4, (B, T))
    batch = Batch(
        tokens=jnp.asarray(rng.integers(0, 9, (B, T)), jnp.int32),
        loss_mask=jnp.asarray(loss_mask),
        segment_ids=jnp.asarray(sequence_ids >= 0).astype(jnp.int32),
        positions=jnp.zeros((B, T), jnp.int32),
        trunk_ids=jnp.full((B, T), -1, jnp.int32),
        sequence_ids=jnp.asarray(sequence_ids),
        trajectory_ids=jnp.asarray(trajectory_ids),
        turn_ids=jnp.asarray(turn_ids),
        behavior_logprobs=stream(old + rng.normal(scale=0.3, size=(B, T))),
        behavior_entropies=stream(rng.gamma(2.0, 0.4, (B, T))),
        minibatch_ids=jnp.asarray(minibatch_ids),
        returns=jnp.asarray(returns),
        group_ids=jnp.asarray([0, 0, 1, 1, 4, 4, -1, 4], jnp.int32),
        trajectory_mask=jnp.asarray([1, 1, 1, 1, 1, 1, 0, 0], bool),
        success=jnp.asarray(returns >= 1),
        truncated=jnp.zeros(N, bool),
        scored_zero=jnp.zeros(N, bool),
        last_anchor_ids=jnp.asarray([-1, 0, 1, 2, 3, 0, -1, 1], jnp.int32),
        turn_rewards=jnp.asarray(turn_rewards),
        turn_truncated=jnp.zeros((N, K), bool),
        turn_valid=jnp.asarray(rng.random((N, K)) < 0.7),
        anchor_ids=jnp.asarray(rng.integers(0, 3, (N, K)), jnp.int32),
        action_ids=jnp.asarray(rng.integers(0, 2, (N, K)), jnp.int32),
        milestones=jnp.asarray(rng.random((N, K)) < 0.4),
        answer_logprobs=jnp.asarray(rng.normal(-2, 1, (N, K)), jnp.float32),
        versions=jnp.zeros((N, K), jnp.int32),
    )
    scores = Scores(
        old_logprobs=stream(old),
        entropies=stream(rng.gamma(2.0, 0.4, (B, T))),
        ref_logprobs=stream(old + rng.normal(scale=0.2, size=(B, T))),
    )
    logprobs = stream(old + rng.normal(scale=0.3, size=(B, T)))
    entropies = stream(rng.gamma(2.0, 0.4, (B, T)))
    return batch, scores.replace(values=stream(rng.normal(size=(B, T)))), logprobs, entropies
