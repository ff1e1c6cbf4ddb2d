"""What the learner sees of Deep Search: calls are trained on, retrieved text never is."""

import numpy as np
import pytest

from empg_envs.deepsearch.tags import iter_blocks
from empg_jax.config import load_config
from empg_jax.learner.batching import make_batch
from empg_jax.run.assembly import (
    make_batch_shape,
    make_language,
)
from empg_jax.sft.demonstrations import record_demonstrations


@pytest.mark.parametrize("context", ["transcript", "window"])
def test_only_calls_are_trained_on(context: str) -> None:
    overrides = [
        f"env.context={context}",
        "env.history=1",
        "rollout.tasks_per_update=3",
        "rollout.group_size=4",
    ]
    config = load_config("deepsearch_tiny", [*overrides, "sft.noise=0.2"])
    language = make_language(config)
    episodes = record_demonstrations(config, language, 12)
    assert len(episodes) == 12
    batch, _ = make_batch(episodes, make_batch_shape(config), seed=(0,))
    tokens, trained = np.asarray(batch.tokens), np.asarray(batch.loss_mask)
    written = sum(turn.response.count("<") // 2 for episode in episodes for turn in episode.turns)
    text = language.tokenizer.decode(tokens[trained].tolist())
    calls = list(iter_blocks(text))
    assert len(calls) == written
    # Nothing is left when the calls and the ends of turns are taken away.
    for call in calls:
        text = text.replace(f"<{call.tool}> {call.content} </{call.tool}>", "", 1)
    assert not text.strip()
    untrained = language.tokenizer.decode(tokens[~trained].tolist())
    assert "question :" in untrained.replace("question:", "question :")
