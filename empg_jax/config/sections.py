"""Configuration of a run: environment, sampling, training, warm start, evaluation, checkpoints, logs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from empg_jax.config.algorithm import Section
from empg_jax.config.model import Options, as_list
from empg_jax.config.places import split_address


def join_panels(value: Any) -> Any:
    """Write a list of panels as one text, so that a resolved configuration keeps one form."""
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else value


class EnvConfig(Section):
    """The environment of the agent, and the prompts made from it."""

    name: str | None = Field("household", description="Name of a shipped environment.")
    entry_point: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        examples=["module:ENV", "mine:Env"],
        description="An environment of your own, as package.module:attribute, in place of env.name.",
    )
    options: Options = Field(default_factory=dict, description="Keyword arguments of the environment.")
    prompt_options: Options = Field(
        default_factory=dict, description="Keyword arguments of its prompt builder and action parser."
    )
    parser: Literal["line", "tags", "json", "tool_call", "whole"] | None = Field(
        None,
        description="Format of an action in a response, after the model's thought (null: what the "
        "environment brings).",
    )
    split: str = Field("train", description="Panel of tasks that are trained on.")
    eval_split: Annotated[str, BeforeValidator(join_panels)] = Field(
        "test",
        min_length=1,
        description="Panel of held-out tasks for evaluation; several as a list or with +, such as "
        "valid_seen+valid_unseen, each of which is also reported by itself.",
    )
    sampler: Literal["uniform", "adaptive"] = Field(
        "uniform",
        description="Choice of tasks: each once in a pass over the panel, or (adaptive) those that are "
        "solved about half of the time most often.",
    )
    max_turns: int = Field(10, ge=1, description="Turns after which an episode is truncated.")
    context: Literal["transcript", "window"] = Field(
        "transcript", description="Prompt of a turn: the growing transcript, or a fresh prompt with a window."
    )
    history: int = Field(2, ge=0, description="Past turns in a fresh prompt (env.context=window).")
    history_mode: Literal["template", "append"] = Field(
        "template",
        description="Earlier answers in a transcript: as the chat template prints them, or as they were "
        "sampled, with one training row per episode under every template.",
    )
    anchor: Literal["observation", "state"] = Field(
        "observation",
        description="What tells algorithms that compare the turns of a task's attempts that two are in one "
        "state: equal observations, or (state) what the environment tells beside them (household, alfworld).",
    )
    invalid_penalty: float = Field(
        0.0, ge=0, description="Penalty that the algorithm subtracts for every turn without a valid action."
    )
    timeout_outcome: Literal["discard", "zero"] | None = Field(
        None,
        description="Treatment of an episode that exceeds its time: sampled again, or scored zero, as the "
        "agent's doing; null: what the environment declares (zero for swe and reasoning_gym, whose agents "
        "can bring it about, else discard).",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("entry_point") is None:
            return data
        if data.get("name") is not None:
            raise ValueError(
                f"env.name={data['name']} and env.entry_point={data['entry_point']} exclude each other: "
                "set env.name=null"
            )
        return {**data, "name": None}

    @property
    def target(self) -> str:
        """Argument of `empg_envs.make_env`: the entry point, else the name."""
        target = self.entry_point or self.name
        assert target is not None  # a cross-section check refuses a configuration with neither
        return target


class RolloutConfig(Section):
    """The sampling of episodes."""

    tasks_per_update: int = Field(16, ge=1, description="Tasks (groups) per update.")
    group_size: int = Field(8, ge=1, description="Attempts at each task.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature, also of entropies.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample among the fewest tokens with this share of probability; 1: all."
    )
    top_k: int = Field(0, ge=0, description="Sample among this number of the most likely tokens; 0: all.")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Sample among tokens with this share of the largest probability; 0: all."
    )
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False), BeforeValidator(as_list)
    ] = Field(
        (), description="Strings that end a response, also in evaluation; the response keeps the string."
    )
    slots: int | None = Field(
        None, ge=1, description="Conversations in flight (default tasks_per_update * group_size)."
    )
    max_response_tokens: int = Field(16, ge=1, description="Tokens that one response may have.")
    max_tokens: int = Field(256, ge=2, description="Longest conversation in tokens, and the row length.")
    deterministic: bool = Field(False, description="Barrier per turn, fixed shapes: repeatable bit by bit.")
    engine: Literal["builtin", "openai"] = Field(
        "builtin",
        description="What samples: the engine in this program, or (openai) a server of vLLM, SGLang or "
        "empg-jax serve (extra: sampler).",
    )
    url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="That server; its bearer token is EMPG_API_KEY of the environment.",
    )
    weights_dir: str | None = Field(
        None,
        description="Folder that the server sees, too, for published weights (default: this machine's "
        "folder of temporary files).",
    )
    request_timeout: float = Field(
        120.0, gt=0, description="Seconds that the server may take for a response, or to load weights."
    )
    stored: str | None = Field(
        None, description="Episodes to train on in place of playing: FILE.npz of empg-jax rollout."
    )
    release: bool = Field(
        False, description="Free the engine's weights and KV cache during updates (with train.max_lag=0)."
    )
    schedule: str | None = Field(
        None, description="schedule.jsonl of a run with a lag to repeat bit by bit (with deterministic=true)."
    )
    burst: int = Field(8, ge=1, description="Decode steps per dispatch, between two reads by the host.")
    data: int = Field(1, ge=1, description="Local devices that the engine's slots are split over.")
    tensor: int = Field(1, ge=1, description="Local devices that the engine's weights are split over.")
    devices: int | None = Field(
        None, ge=1, description="Local devices for the engine alone (null: it shares the learner's)."
    )
    publish: Literal["turn", "burst"] = Field(
        "turn",
        description="When new weights go live: between turns, or (burst) also inside responses, keeping KV.",
    )
    max_stale_gap: float = Field(
        0.05,
        ge=0,
        description="Log-prob error of the kept KV in nats, above which conversations are prefilled anew.",
    )
    prefill_buckets: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] | None = Field(
        None, description="Lengths that prompts are padded to, ascending (default chosen by the engine)."
    )
    prefill_chunk: int = Field(
        1024,
        ge=0,
        description="Tokens of a long prompt that are prefilled between two bursts of the others, at least "
        "the largest of prefill_buckets; 0: the whole prompt.",
    )
    share_prefix: bool = Field(
        True, description="Compute a prompt's beginning that conversations share once, and copy its KV."
    )
    page_tokens: int | None = Field(
        None,
        ge=1,
        description="Keep KV in pages of this many tokens, which conversations that begin alike share (null: "
        "a row per slot, as long as the longest one). Kernels of GPUs and TPUs take 16, 32, 64 or 128.",
    )
    kv_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens that all pages of a host hold together; where conversations need more, some are "
        "prefilled again (null: slots x max_tokens).",
    )
    episode_timeout: float = Field(
        300.0, gt=0, description="Seconds that an episode may last, without the sampling of its responses."
    )
    min_group_size: int | None = Field(
        None,
        ge=1,
        description="Attempts that suffice to close a group once one of its members, with its retries, has "
        "lasted for episode_timeout (default all).",
    )
    filter_groups: bool = Field(
        False, description="Replace groups whose attempts all have the same return (true with dapo)."
    )
    max_refills: int = Field(
        10,
        ge=1,
        description="Limit on groups replaced before an update, in batches; beyond it equal groups are kept.",
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if not value:
            return value
        try:
            split_address(value)
        except ValueError as error:
            raise ValueError(f"rollout.url={error}") from None
        return value


class TrainConfig(Section):
    """The optimization."""

    updates: int = Field(
        150,
        ge=0,
        description="Updates of the RL phase; the length of train.schedule, also where a resume changes it.",
    )
    num_minibatches: int = Field(4, ge=1, description="Optimizer steps that a batch is split into.")
    epochs: int = Field(1, ge=1, description="Passes over a batch.")
    micro_tokens: int = Field(4096, ge=1, description="Tokens per forward/backward pass, over all devices.")
    share_prefix: bool = Field(
        False,
        description="Compute a beginning that several episodes of an optimizer step share once (exact); the "
        "attention of updates is then plain XLA on every platform.",
    )
    max_lag: int = Field(0, ge=0, description="Oldest policy version trained on; 0 is synchronous training.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear",
        description="Decay after the warm-up, over the optimizer steps made: one that is left out moves "
        "nothing.",
    )
    final_learning_rate: float | None = Field(
        None, ge=0, description="Learning rate after the last update (null: a twentieth of the peak)."
    )
    warmup_updates: int = Field(0, ge=0, description="Updates of linear warm-up.")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type in which AdamW keeps first moments, where bfloat16 saves a quarter of its memory; "
        "the second ones need float32.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="First moment decay of AdamW.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Second moment decay of AdamW.")
    grad_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    max_kl: float | None = Field(
        None,
        gt=0,
        description="Skip an optimizer step where the policy is beyond this approximate KL from that before "
        "the update (null: no limit); the update's last step is not followed by a check.",
    )
    on_kl: Literal["stop", "skip", "rollback"] = Field(
        "skip",
        description="Action after steps were skipped because of train.max_kl (limits as of on_nonfinite).",
    )
    profile: str | None = Field(
        None,
        pattern=r"^[1-9]\d*:[1-9]\d*$",
        description="START:COUNT: updates to trace with JAX's profiler into RUN/profile (XProf, Perfetto).",
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description=(
            "Action when loss or gradient is not finite. skip ends the run when 4 updates in a row make no "
            "step, rollback at the 4th in a row. A rollback restores weights and optimizer alone: updates "
            "since that checkpoint are not made again, and the groups that they consumed are lost."
        ),
    )


class SftConfig(Section):
    """The supervised warm start, on expert demonstrations or on chat files."""

    updates: int = Field(0, ge=0, description="Updates of the warm start; 0 leaves it out.")
    data: Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(as_list)] | None = Field(
        None, description="Chat file (JSON lines), or a list of them, to learn from in place of the expert."
    )
    loss_on: Literal["all", "last"] = Field(
        "all", description="Answers of a conversation in sft.data that are trained on."
    )
    too_long: Literal["skip", "truncate"] = Field(
        "skip", description="Treatment of a conversation in sft.data longer than rollout.max_tokens."
    )
    holdout: float = Field(
        0.05, ge=0, lt=1, description="Share of sft.data held out to measure the loss; it is not trained on."
    )
    eval_every: int = Field(
        50, ge=0, description="Updates between two held-out losses; 0 is only after the last."
    )
    batch_size: int = Field(64, ge=1, description="Demonstrations (rows of sft.data) per update.")
    learning_rate: float = Field(4e-3, gt=0, description="Peak learning rate (cosine decay).")
    final_learning_rate: float | None = Field(
        None, ge=0, description="Learning rate after the last update (null: a hundredth of the peak)."
    )
    demonstrations: int = Field(4000, ge=1, description="Episodes that the expert records.")
    noise: float = Field(0.1, ge=0, le=1, description="Share of random actions in the demonstrations.")
    split: str = Field("train", description="Panel that demonstrations come from.")

    @model_validator(mode="after")
    def _check(self) -> SftConfig:
        if self.data is not None and not self.data:
            raise ValueError("sft.data=[] names no file; leave it null to learn from the expert")
        if self.data is not None and self.updates == 0:
            raise ValueError(
                f"sft.data={', '.join(self.data)} has no effect with sft.updates=0: set sft.updates, for "
                "example sft.updates=200"
            )
        for key in ("loss_on", "too_long", "holdout", "eval_every"):
            value = getattr(self, key)
            if self.data is None and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"sft.{key}={value} has no effect without sft.data: the expert shows episodes"
                )
        return self


class EvalConfig(Section):
    """Evaluation on held-out tasks (`env.eval_split`)."""

    tasks: int = Field(256, ge=1, description="Held-out tasks of each panel, each attempted once.")
    every: int = Field(0, ge=0, description="Updates between evaluations; 0 is only before and after.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="As rollout.top_p, for the held-out episodes.")
    top_k: int = Field(0, ge=0, description="As rollout.top_k, for the held-out episodes.")
    min_p: float = Field(0.0, ge=0, lt=1, description="As rollout.min_p, for the held-out episodes.")


class CheckpointConfig(Section):
    """The checkpoints that a run is resumed from."""

    every: int = Field(25, ge=1, description="Updates between checkpoints.")
    seconds: float | None = Field(
        1800.0,
        gt=0,
        description="Most seconds between checkpoints, at the end of an update (null: no limit).",
    )
    keep: int = Field(
        3,
        ge=1,
        description="Number of newest checkpoints to keep, beside the last good one and the best one.",
    )
    grace: float = Field(
        30.0,
        gt=0,
        description=(
            "Seconds from SIGINT or SIGTERM to the end of the run. It saves its last update before; if it "
            "cannot in time, the newest checkpoint on disk counts. A second signal ends it at once."
        ),
    )
    dir: str | None = Field(
        None,
        description=(
            "Folder of this run's checkpoints alone (default: checkpoints in the run folder), or "
            "gs://BUCKET/FOLDER (extra gcs)."
        ),
    )


class LogConfig(Section):
    """The logs and the display."""

    every: int = Field(
        1,
        ge=1,
        description="Updates between two lines of metrics.jsonl; evaluations and the end have one, too.",
    )
    drift_every: int = Field(
        25, ge=0, description="Updates between two measurements of the entropy's drift; 0 is never."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    wandb: bool = Field(False, description="Send metrics to Weights & Biases (extra: wandb).")
    mlflow: bool = Field(False, description="Send metrics to MLflow, at MLFLOW_TRACKING_URI (extra: mlflow).")
    trackio: bool = Field(False, description="Send metrics to trackio (extra: trackio).")
    project: str = Field(
        "empg-jax",
        min_length=1,
        description="Project (MLflow: experiment) that these trackers file runs under.",
    )
    entity: str | None = Field(None, description="Team or user of the project (log.wandb).")
    tags: Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(as_list)] = Field(
        (), description="Tags of the run for these trackers."
    )
    progress: bool = Field(True, description="Show live progress.")
    rollouts_every: int = Field(
        10,
        ge=0,
        description="Updates between two files of training episodes with their credit; 0 is never.",
    )
    rollouts_tokens: bool = Field(False, description="Write per-token values into these files.")
    transcripts: int = Field(
        8, ge=0, description="Held-out episodes to write at the end, with the page view.html; 0 is neither."
    )
