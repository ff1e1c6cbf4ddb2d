"""`empg-jax bench`: the speed of a configuration's engine and learner on this machine, without environments.

Made-up episodes, each of which fills its row, go through the engine and the learner that a run would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from empg_jax.engine.engine import Engine
from empg_jax.errors import ConfigError
from empg_jax.learner.batching import BatchShape, Layout, make_batch
from empg_jax.learner.passes import GAP_CHECK_EVERY, Pass, Scorer, optimize
from empg_jax.learner.state import TrainState
from empg_jax.learner.update import Learner
from empg_jax.models.decoder import DecoderConfig
from empg_jax.plan.episodes import Form, choose_form, play
from empg_jax.plan.explain import in_gib
from empg_jax.plan.memory import compute_plan
from empg_jax.plan.speed import forward_flops, visited_numbers
from empg_jax.report.progress import Progress
from empg_jax.run.assembly import make_batch_shape, needs_answers
from empg_jax.run.parts import copy_reference, start_learner, warm_up_engine
from empg_jax.run.process import CompileCounter, prepare_jax
from empg_jax.run.sampling import make_engine
from empg_jax.run.weights import check_model
from empg_jax.types import Batch, Params, Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config

NEVER = (-1,)  # no token ends a response, so that every repetition does the same work
# What is timed, in the order of a run's update, with its meaning.
PARTS = {
    "publish": "weights into the engine",
    "rollout": "every turn of all episodes",
    "score": "log-probs and entropies by the learner",
    "update": "credit and all optimizer steps",
}


@dataclasses.dataclass
class Bench:
    """The engine and the learner of a configuration, with the state that updates change.

    ``seconds`` has the wall seconds of every part, one number for each time that it ran.
    """

    config: Config
    form: Form
    engine: Engine
    learner: Learner
    shape: BatchShape
    state: TrainState
    reference: Params | None
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Time a part that ends when its results are there."""
        began = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def run_update(self) -> dict[str, float]:
        """Do what a run does in an update, part by part; return counts and the gap of log-probs."""
        config, engine = self.config, self.engine
        with self.timing("publish"):
            placed = jax.block_until_ready(engine.place(self.state.params))
            with self.timing("swap"):
                engine.swap(placed, 0)
        for name, length in (("prefill", 1), ("answer", self.length)):
            with self.timing(name):
                self._answer_once(length)
        engine.drop_cache()
        engine.take_stats()
        with self.timing("rollout"):
            episodes = play(engine, self.form, -1.0 if needs_answers(config) else None)
        stats = engine.take_stats()
        if config.rollout.release:
            engine.free()
        host, layout = self._split(episodes, 0)
        batch = self.learner.put(host)
        scorer = Scorer(self.learner, config.algorithm.entropy_source == "learner", 0, is_on_policy=True)
        with self.timing("score"):  # update 0 is one in which a run scores in any case
            own, gap = scorer.score(self.state.params, self.reference, batch, layout, 0)
        with self.timing("update"):
            scores = scorer.choose(batch, own)
            first = Pass(host, layout, batch, scores, self.learner.credit(batch, scores))
            again = functools.partial(self._split, episodes)
            for state, _ in optimize(self.learner, self.state, first, again, config.train.epochs):
                self.state = state
            jax.block_until_ready(self.state)
        return {
            "sampled_tokens": stats.sampled_tokens,
            "prefilled_tokens": stats.prefilled_tokens,
            "slot_occupancy": stats.occupancy,
            "hit_rate": stats.hit_rate,
            "trained_tokens": int(np.sum(host.segment_ids > 0)),
            **gap,
        }

    def _split(self, episodes: list[Trajectory], epoch: int) -> tuple[Batch, Layout]:
        return make_batch(episodes, self.shape, seed=(self.config.seed, 0, epoch))

    @property
    def half(self) -> int:
        """Prompt tokens that fill half of a row."""
        return self.config.rollout.max_tokens // 2

    @property
    def length(self) -> int:
        """Tokens of a full response behind them."""
        r = self.config.rollout
        return min(r.max_response_tokens, r.max_tokens - self.half)

    def _answer_once(self, length: int) -> None:
        """Prefill half of a row in every slot, and sample this many tokens in each."""
        engine, rng = self.engine, np.random.default_rng(0)
        engine.drop_cache()
        for slot in range(engine.config.slots):
            tokens = rng.integers(0, engine.model.vocab_size, self.half, dtype=np.int32)
            engine.submit(slot, tokens, is_fresh=True, ids=(0, slot, 0, 0), max_response=length)
        while engine.has_work:
            engine.step(is_eager=False)
        for slot in range(engine.config.slots):
            engine.release(slot)

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds of every part."""
        return {name: statistics.median(all_) for name, all_ in self.seconds.items()}

    def rates(self, found: Mapping[str, float]) -> dict[str, float]:
        """Return tokens per second of each part.

        Decode is a full answer less the prefill of its prompt, by the fastest of each; it is left out where
        the two can hardly be told apart.
        """
        median = self.medians
        prefill, answer = (min(self.seconds[name]) for name in ("prefill", "answer"))
        slots = self.engine.config.slots
        rates = {
            "prefill": slots * self.half / prefill,
            "rollout": found["sampled_tokens"] / median["rollout"],
            "score": found["trained_tokens"] / median["score"],
            "update": self.config.train.epochs * found["trained_tokens"] / median["update"],
        }
        if self.length > 1 and answer > 1.1 * prefill:
            rates["decode"] = slots * (self.length - 1) / (answer - prefill)
        return rates

    def cycle(self) -> dict[str, float]:
        """Return the seconds of a run's update, of its learner, and of the pause for new weights.

        Where engine and learner have devices of their own and may lag, they work side by side.
        """
        config, median = self.config, self.medians
        is_scored = config.algorithm.entropy_source == "learner" or self.learner.needs_score
        learning = median["score"] / (1 if is_scored else GAP_CHECK_EVERY) + median["update"]
        if not config.train.max_lag:
            pause, both = median["publish"], median["rollout"] + learning
        else:
            is_apart, pause = config.rollout.devices is not None, median["swap"]
            both = max(median["rollout"], learning) if is_apart else median["rollout"] + learning
        return {"update_cycle": pause + both, "learning": learning, "pause": pause}


def measure_product(dtype: Any, repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the operations per second of a large matrix product on one device, the fastest of some."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(square, square))
    rates = []
    for _ in range(repeats):
        began = clock()
        jax.block_until_ready(product(square, square))
        rates.append(2 * side**3 / (clock() - began))
    return max(rates)


def bench(config: Config, repeats: int, progress: Progress) -> dict[str, Any]:
    """Measure a configuration on this machine's devices.

    Args:
      config: the configuration.
      repeats: measured updates, after one that warms up; medians are told.
      progress: shows what is compiled, and the updates.

    Returns:
      The result, of JSON types: seconds of wall time, and rates by them.

    Raises:
      ConfigError: the model or its devices are not there, or another program samples.
    """
    if config.rollout.engine != "builtin":
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: bench measures the built-in engine "
            "(rollout.engine=builtin)"
        )
    prepare_jax(config)
    model, began = check_model(config), time.perf_counter()
    with CompileCounter() as compiles:
        made = _open(config, model, progress)
        start = time.perf_counter() - began
        progress.phase("bench", repeats + 1, "updates")
        found = made.run_update()
        progress.advance(1, {})
        made.seconds, compiled = {}, compiles.count
        for _ in range(repeats):
            found = made.run_update()
            progress.advance(1, {})
        recompiles = compiles.count - compiled
    progress.close()
    return _describe(made, found) | {"start_seconds": start, "recompiles": recompiles}


def _open(config: Config, model: DecoderConfig, progress: Progress) -> Bench:
    """Build and compile the engine and the learner, as `run.parts.open_run` does."""
    shape = make_batch_shape(config)
    counted = functools.partial(progress.counting, lambda: None)
    learner, _, state = start_learner(config, model, shape, counted)
    engine = make_engine(config, model, NEVER)
    if learner.base is not None:
        engine.base = engine.place(learner.base)
    warm_up_engine(engine, state.params, counted)
    reference = copy_reference(config, state.params)
    return Bench(config, choose_form(config), engine, learner, shape, state, reference)


def _describe(made: Bench, found: Mapping[str, float]) -> dict[str, Any]:
    config, model, learner = made.config, made.learner.model, made.learner
    devices, rates = learner.mesh.devices.flatten(), made.rates(found)
    plan = compute_plan(config, model)
    # The head runs on sampled tokens only. Frozen weights have no gradients.
    idle_head = (
        2 * model.vocab_size * model.hidden_size * (1 - found["sampled_tokens"] / found["trained_tokens"])
    )
    flops = 3 * (forward_flops(model, config.rollout.max_tokens) - idle_head)
    if model.lora is not None:
        flops -= 2 * visited_numbers(model) - idle_head
    memory = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return {
        "name": plan.name,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "parameters": plan.num_params,
        "episodes": made.form.episodes,
        "turns": made.form.turns,
        "prompt_tokens": made.form.prompt,
        "response_tokens": made.form.response,
        "slots": made.engine.config.slots,
        "seconds": {name: made.medians[name] for name in PARTS} | made.cycle(),
        "tokens_per_second": rates,
        "product_share": flops * rates["update"] / len(devices) / measure_product(model.dtype),
        "planned_bytes": plan.total,
        "peak_bytes": max((size for size in memory if size is not None), default=None),
        **found,
    }


def as_lines(result: Mapping[str, Any], source: Sequence[str]) -> list[str]:
    """Return a result as text; ``source`` are the words that name its configuration, overrides included.

    The last line simulates a run by these rates. Where decode is too short to be told from prefill, the
    rollout's own rate stands for both.
    """
    each, rates, seconds = "s" * (result["devices"] > 1), result["tokens_per_second"], result["seconds"]
    lines = [
        f"{result['name']} on {result['devices']} {result['device']} device{each}: "
        f"{result['parameters'] / 1e6:,.3g} million parameters, {result['start_seconds']:.1f} s to start",
        f"{result['episodes']} episodes of {result['turns']} turns, {result['prompt_tokens']} new tokens and "
        f"{result['response_tokens']} sampled in each, in {result['slots']} slots",
        f"{'':<9}{'seconds':>9}{'tokens/s':>12}",
    ]
    for name, meaning in PARTS.items():
        rate = f"{rates[name]:,.0f}" if name in rates else ""
        lines.append(f"{name:<9}{seconds[name]:>9.3f}{rate:>12}  {meaning}")
    decode, options = "decode too short to tell from it", f"--decode-rate {rates['rollout']:.0f} "
    if "decode" in rates:
        decode = f"decode {rates['decode']:,.0f}"
        options = f"--decode-rate {rates['decode']:.0f} --prefill-rate {rates['prefill']:.0f} "
    gap = f"{result['logprob_gap']:.2g} nats in the mean, by at most {result['logprob_gap_max']:.2g}"
    peak = "" if result["peak_bytes"] is None else f", {in_gib(result['peak_bytes'])} GiB in use at most"
    options += f"--publish-pause {seconds['pause']:.3f} "
    options += f"--update-seconds {seconds['learning']:.3g} --observation {result['prompt_tokens']} "
    options += f"--turns {result['turns']} --turns-kind constant "
    options += f"--tokens {result['response_tokens']} --tokens-kind constant"
    return [
        *lines,
        f"an update of a run: {seconds['update_cycle']:.2f} s, and what its environments take",
        f"with all slots in step: prefill {rates['prefill']:,.0f} tokens/s, {decode}",
        f"the update computes at {result['product_share']:.0%} of this device's largest products",
        f"log-probs of engine and learner differ by {gap}",
        f"memory of a device: {in_gib(result['planned_bytes'])} GiB planned at most{peak}",
        f"with your environments' times: empg-jax simulate {shlex.join(source)} {options}",
    ]
