"""The glossary of all logged metrics, and the log that writes them.

``metrics.jsonl`` in the run's folder holds one JSON object per update and is always written. Trackers of
experiments get the same numbers when they are switched on, under names in groups (``loss/kl``).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_jax.errors import writing
from empg_jax.files import append, write_text_atomic

if TYPE_CHECKING:
    from empg_jax.types import Trajectory

SHOWN_LINES = 10  # damaged lines that a warning lists

# Name -> meaning. A name that ends in * stands for a family, one metric per ending.
METRICS: dict[str, str] = {
    # Episodes of the update
    "success_rate": "Share of the trained episodes that the environment calls solved.",
    "success/*": "The same for the group of tasks in the name, such as a task family.",
    "episode_return": "Mean return of the trained episodes.",
    "episode_turns": "Mean turns of the trained episodes.",
    "response_tokens": "Mean sampled tokens per turn.",
    "segments_per_episode": "Mean segments per episode; 1 where the chat template lets the transcript grow.",
    "invalid_actions": "Share of turns whose response the parser did not accept.",
    "mixed_groups": "Share of task groups with different returns; the others carry no group advantage.",
    "groups_replaced": "Groups of equal returns that dynamic sampling replaced before the update.",
    "groups_uniform": "Groups of equal returns left in the batch because the refills were used up.",
    "episodes_trained": "Episodes that the policy was trained on.",
    "episodes_discarded": "Episodes thrown away for a cause outside the policy, and sampled again.",
    "outcome_*": "Episodes that ended for the reason in the name, since the last line.",
    "groups_failed": "Groups replaced because an attempt kept failing for a cause outside the policy.",
    "tokens_wasted": "Sampled tokens of episodes or groups that were given up, since the last line.",
    "environment_steps": "Steps of the environments in training episodes that ended, since the last line.",
    "worker_restarts": "Environment workers replaced after a death, a hang, or for their memory.",
    "episodes_recovered": "Episodes that went on in a new worker after theirs was lost.",
    "breaker_seconds": "Seconds without new episodes because most of them failed; the longest of all hosts.",
    "tasks_quarantined": "Tasks that are not tried for a while because their environment failed too often.",
    "env_*": "Mean of a number that the environment reports at the end of an episode.",
    "lag": "Mean age of the sampling policy in updates.",
    "lag_max": "Largest such age.",
    "lag_share_*": "Share of the trained turns that were sampled that many updates before.",
    # Entropy and modulation
    "entropy": "Mean entropy of the sampled tokens in nats, full vocabulary, rollout temperature, no filter.",
    "turn_entropy_*": "Mean, or a quantile, over turns of the turn's mean token entropy, in nats.",
    "modulation_mean": "Mean factor of trained turns' advantages by the modulation (1 without one).",
    "modulation_min": "Smallest such factor.",
    "modulation_max": "Largest such factor.",
    "modulation_std": "Standard deviation of these factors.",
    "modulation_p*": "That quantile of these factors over turns, in per cent.",
    "advantage_mean": "Mean advantage over the turns that the loss covers, as it uses it.",
    "advantage_std": "Standard deviation of the advantage over these turns.",
    "advantage_abs_mean": "Mean size of the advantage over these turns.",
    "advantage_positive": "Share of these turns with a positive advantage.",
    "advantage_negative": "Share of these turns with a negative advantage.",
    "advantage_sign_changed": "Share of these turns whose advantage the modulation turned to the other sign.",
    "advantage_changed_2x": "Share of these turns whose advantage, unless 0, it changed more than twofold.",
    "entropy_drift_predicted": "Entropy change that AEM's drift law predicts for this credit.",
    "entropy_drift_measured": "Change of the sampled tokens' mean entropy by the update.",
    # Loss
    "loss": "Loss that the optimizer sees, mean over the optimizer steps that had tokens.",
    "policy_loss": "Its policy part per trained token, before KL penalty and entropy bonus.",
    "value_loss": "Loss of the critic per trained token, before its coefficient.",
    "value_mean": "Mean value that the critic gives while it is trained.",
    "explained_variance": "Share of the variance of the critic's targets that its values explain.",
    "kl": "KL to the frozen reference policy, before its coefficient.",
    "approx_kl": "k3 estimate of the KL from the policy before the update to the one being trained.",
    "ratio": "Mean probability ratio of the policy being trained to the one before the update.",
    "clip_fraction": "Share of trained tokens whose ratio was clipped.",
    "dual_clip_fraction": "Share of trained tokens whose loss is at the dual clip's bound.",
    "stale_fraction": "Share of trained tokens whose sampler was too far off for decoupled PPO.",
    "entropy_kept": "Share of trained tokens whose entropy moved too little for entropy ratio clipping.",
    "behavior_ess": "Effective sample size of the importance weights, as a share of tokens.",
    "correction_kept": "Share of sampled tokens that the off-policy correction kept.",
    "loss_coverage": "Share of sampled tokens that the loss covers, after corrections, drops and masks.",
    "grad_norm": "Global gradient norm before clipping, mean over these optimizer steps.",
    "learning_rate": "Learning rate of the update's first optimizer step.",
    "optimizer_steps": "Optimizer steps of the update; those left out are not among them.",
    "nonfinite_steps": "Optimizer steps left out because loss or gradient was not finite.",
    "kl_exceeded_steps": "Optimizer steps left out because the policy was beyond train.max_kl.",
    "empty_steps": "Optimizer steps left out because no token was left to train on.",
    "logprob_gap": "Mean absolute difference of the sampler's and the learner's log-probabilities.",
    "logprob_gap_max": "Largest such difference.",
    # Speed
    "tokens_sampled": "Tokens that the policy sampled for the update.",
    "tokens_trained": "Sampled tokens that the loss covers: neither corrected, dropped nor masked away.",
    "tokens_prefilled": "Prompt and observation tokens that went through the model when sampling.",
    "tokens_shared": "Such tokens that did not: their keys and values were copied from another conversation.",
    "prefix_hits": "Share of the prompts' tokens that needed no prefill: kept from the last turn, or copied.",
    "tokens_evicted": "Tokens whose keys and values were of use, until others took their place.",
    "page_use": "Largest share of the KV pages that was in use (rollout.page_tokens).",
    "tokens_per_second": "Sampled tokens per second of seconds_cycle.",
    "slot_occupancy": "Share of the sampler's slots that sampled a response's token, mean over decode steps.",
    "train_tokens_shared": "Tokens that an update left out, because another episode begins with them too.",
    "packing_efficiency": "Share of the learner's row tokens that are not padding.",
    "recompiles": "Programs compiled during the update; 0 after the warm-up.",
    "stale_gap": "Log-prob error of going on over KV of older weights, the largest measured (publish=burst).",
    "stale_refills": "Publications after which that error was too large and all KV was computed anew.",
    "rollout_idle": "Share of the time in which the rollout thread had nothing to play.",
    "learner_idle": "Share of the time in which the learner waited for episodes.",
    "publish_pause": "Wall seconds in which sampling stood still for new weights.",
    "seconds_cycle": "Wall seconds of the whole update: rollout, credit and optimizer steps.",
    "cpu_seconds": "CPU seconds of the update on this machine, workers included, evaluations excluded.",
    "seconds_*": "Wall seconds of the phase in the name, as in wall_seconds of summary.json.",
    # Held-out evaluation
    "eval_success": "Share of the held-out tasks solved.",
    "eval_success/*": "The same for a group of tasks; for a panel, or PANEL/GROUP, with several panels.",
    "eval_return": "Mean return on the held-out tasks.",
    "eval_turns": "Mean turns on the held-out tasks.",
    "eval_entropy": "Mean token entropy on the held-out tasks, in nats.",
    "eval_env_*": "Mean of a number that the environment reports at the end of a held-out episode.",
    "eval_invalid_actions": "Share of held-out turns whose response the parser did not accept.",
    "eval_missing": "Held-out tasks without a result: all attempts failed for causes outside the policy.",
    # Warm start
    "sft_loss": "Cross-entropy of the expert's tokens (of the learned answers in sft.data) in nats.",
    "sft_eval_loss": "The same on the held-out part of sft.data.",
}


# The groups of METRICS, in its order: the first name of each.
GROUPS = {
    "success_rate": "episodes",
    "entropy": "credit",
    "loss": "loss",
    "tokens_sampled": "speed",
    "eval_success": "eval",
    "sft_loss": "sft",
}


def grouped(name: str) -> str:
    """Return a metric's name with its group in front, as dashboards sort by; other names stay."""
    own = name if name in METRICS else _family(name)
    group = ""
    for key in METRICS:
        group = GROUPS.get(key, group)
        if key == own:
            return f"{group}/{name}"
    return name


def _family(name: str) -> str | None:
    return next((key for key in METRICS if key.endswith("*") and name.startswith(key[:-1])), None)


def describe_metric(name: str) -> str | None:
    """Return the meaning of a metric, or None when the glossary does not have it."""
    if name in METRICS:
        return METRICS[name]
    family = _family(name)
    return None if family is None else METRICS[family]


def format_glossary() -> str:
    """Format the glossary: one line per metric, with its name and its meaning."""
    width = max(map(len, METRICS))
    return "\n".join(f"{name:<{width}}  {meaning}" for name, meaning in METRICS.items())


def reduce_metrics(parts: Iterable[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Compute the weighted mean of each metric.

    Args:
      parts: metrics and their weight (tokens, episodes, ...). A part without a name does not count for it.

    Returns:
      Name -> mean. A name whose weights sum to zero is left out, because its mean is undefined.

    Raises:
      ValueError: a negative weight.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for values, weight in parts:
        if weight < 0:
            raise ValueError(f"weight {weight} of {dict(values)} is negative")
        if weight == 0:
            continue
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + weight * float(value)
            weights[name] = weights.get(name, 0.0) + weight
    return {name: sums[name] / weights[name] for name in sums}


def label_groups(trajectories: Iterable[Trajectory]) -> dict[str, list[Trajectory]]:
    """Sort episodes by the group of their task, ``info["group"]``, under the names of metrics and tables.

    Episodes of several panels are also sorted by panel, and a group's name begins with its panel's
    (``valid_seen``, ``valid_seen/pick``). An episode whose task has no group is in none.
    """
    episodes = list(trajectories)
    has_panels = len({episode.split for episode in episodes}) > 1
    found: dict[str, list[Trajectory]] = {}
    for episode in episodes:
        parts = [episode.split] if has_panels else []
        if has_panels:
            found.setdefault(episode.split, []).append(episode)
        if episode.group:
            found.setdefault("/".join([*parts, episode.group]), []).append(episode)
    return dict(sorted(found.items()))


def group_success(prefix: str, trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Compute the share of episodes that were solved, for every group of `label_groups`."""
    return {
        f"{prefix}/{name}": sum(each.is_success for each in episodes) / len(episodes)
        for name, episodes in label_groups(trajectories).items()
    }


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def read_metrics(path: Path, *, warn: Callable[[str], None] = _warn) -> list[dict[str, Any]]:
    """Read the objects of a ``metrics.jsonl``, ``sft_metrics.jsonl`` or ``events.jsonl``.

    A log is for people and no state, so a damaged line costs itself alone. What a crash may leave at the end
    (a part of a line, or bytes that are zero) is left out without a word.

    Args:
      path: the file.
      warn: told once of the lines that were skipped because they are no objects with an ``update``.
    """
    # Everything after the last newline is an incomplete write.
    lines = path.read_bytes().rpartition(b"\n")[0].rstrip(b"\0\n").split(b"\n")
    records, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line else None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("update"), int):
            records.append(record)
        elif line:
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:SHOWN_LINES])) + (", ..." if len(damaged) > SHOWN_LINES else "")
        warn(f"{path}: {len(damaged)} damaged lines are skipped ({shown})")
    return records


class MetricsLog:
    """The writer of a run's metrics.

    Args:
      run_dir: the run's folder; must exist.
      trackers: told the same numbers, and closed with the log.
      resume_at: on resume, the first update that will be written again; it and later lines are removed.
      strict: refuse a metric that the glossary lacks. The default is true under pytest only, so that a
        missing meaning fails a test but never a long run.
      filename: name of the file in ``run_dir``.
      warn: told of damaged lines, which a resume removes.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        trackers: Sequence[Any] = (),
        resume_at: int | None = None,
        strict: bool = "PYTEST_VERSION" in os.environ,
        filename: str = "metrics.jsonl",
        warn: Callable[[str], None] = _warn,
        is_written: bool = True,
    ) -> None:
        self.path = Path(run_dir) / filename if is_written else Path(os.devnull)
        self._strict = strict
        self._start = time.monotonic()
        self._trackers = list(trackers)
        if resume_at is not None and is_written and self.path.exists():
            _truncate(self.path, resume_at, warn)
        # Unbuffered and in append mode: a line is one write, complete or absent.
        self._file = self.path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one object ``{"update": step, "time": seconds, name: value, ...}``.

        JSON knows no NaN and no infinity, so such values become null.

        Raises:
          KeyError: a name is not in the glossary (only when strict).
          RunError: the file cannot be written.
        """
        unknown = [name for name in values if describe_metric(name) is None] if self._strict else []
        if unknown:
            raise KeyError(f"metrics without a line in METRICS: {', '.join(unknown)}")
        numbers = {name: float(value) for name, value in values.items()}
        record: dict[str, Any] = {"update": step, "time": round(time.monotonic() - self._start, 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with writing(self.path):
            append(self._file, json.dumps(record, allow_nan=False).encode() + b"\n")
        if not self._trackers:
            return
        numbers = {grouped(name): value for name, value in numbers.items()}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close every output; may be called twice."""
        self._file.close()
        while self._trackers:
            self._trackers.pop().finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _truncate(path: Path, resume_at: int, warn: Callable[[str], None]) -> None:
    kept = [record for record in read_metrics(path, warn=warn) if record["update"] < resume_at]
    with writing(path):
        write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
