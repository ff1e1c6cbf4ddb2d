"""Construction of what plays a run's episodes: engine, workers, collectors, evaluator, rollout thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from empg_jax.config.places import expand
from empg_jax.engine.engine import Engine, EngineConfig, Watch
from empg_jax.engine.interface import SamplingEngine
from empg_jax.errors import ConfigError
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.filtering import NO_FILTER, TokenFilter
from empg_jax.parallel.hosts import ALONE, Hosts
from empg_jax.parallel.mesh import make_mesh
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.episode import EpisodeRules
from empg_jax.rollout.evaluator import Evaluator
from empg_jax.rollout.ledger import Ledger
from empg_jax.rollout.schedule import read_schedule
from empg_jax.rollout.stored import StoredCollector, group_episodes
from empg_jax.rollout.thread import RolloutThread
from empg_jax.run.devices import engine_devices
from empg_jax.run.environment import find_spec
from empg_jax.run.observing import Observer
from empg_jax.run.server import check_server, open_server
from empg_jax.run.splits import check_split, count_panels, make_order
from empg_jax.run.storage import load_trajectories
from empg_jax.text.chat import ChatRenderer
from empg_jax.text.stops import StopSearch
from empg_jax.text.tokenizer import Tokenizer
from empg_jax.types import Params, Trajectory
from empg_jax.workers.faults import FaultPolicy, Tell, tell_nobody
from empg_jax.workers.memory import limit_memory
from empg_jax.workers.pool import EnvPool, PoolTimeouts
from empg_jax.workers.process import start_local
from empg_jax.workers.ray_backend import RayCluster, check_ray

if TYPE_CHECKING:
    from empg_jax.config import Config
    from empg_jax.config.sections import EvalConfig, RolloutConfig
from empg_jax.run.assembly import Language

EVALUATION_STREAM = 1  # keeps the sampling keys of evaluation apart from those of training


def make_engine(
    config: Config,
    model: DecoderConfig,
    stop_ids: tuple[int, ...],
    *,
    num_hosts: int = 1,
    is_served: bool = False,
) -> Engine:
    """Build this host's sampling engine without weights, with the temperature and filter of ``rollout``.

    Args:
      config: the configuration.
      model: the decoder's config.
      stop_ids: tokens that end a response.
      num_hosts: hosts that share the slots.
      is_served: requests choose how to sample; ``rollout`` and ``eval`` have no say in it.

    Raises:
      ConfigError: the slots cannot be split over ``rollout.data``, this host has too few devices, or
        ``rollout.top_k`` or ``eval.top_k`` exceeds the vocabulary.
    """
    r = config.rollout
    check_filters(config, model.vocab_size)
    token_filter = NO_FILTER if is_served else filter_of(r)
    has_filter = is_served or not (token_filter.is_off and filter_of(config.eval).is_off)
    sizes = size_engine(config, stop_ids=stop_ids, num_hosts=num_hosts, has_filter=has_filter)
    try:
        mesh = make_mesh(data=r.data, tensor=r.tensor, devices=engine_devices(config))
    except ValueError as error:
        raise ConfigError(f"rollout.data and rollout.tensor: {error}") from None
    return Engine(
        model,
        sizes,
        seed=config.seed,
        temperature=r.temperature,
        token_filter=token_filter,
        mesh=mesh,
    )


def count_slots(config: Config, num_hosts: int) -> int:
    """Return the number of conversations that the engine of each of these hosts holds at one time."""
    r = config.rollout
    return r.slots or r.tasks_per_update * r.group_size // num_hosts


def size_engine(
    config: Config,
    *,
    stop_ids: tuple[int, ...] = (0,),
    num_hosts: int = 1,
    has_filter: bool = False,
) -> EngineConfig:
    """Choose the sizes of one host's engine.

    Args:
      config: the configuration.
      stop_ids: tokens that end a response; no size depends on them.
      num_hosts: hosts that share the slots.
      has_filter: whether responses may filter the tokens that they sample.

    Raises:
      ConfigError: the slots cannot be split over ``rollout.data``.
    """
    r, slots = config.rollout, count_slots(config, num_hosts)
    if slots % r.data:
        raise ConfigError(f"{slots} slots (rollout.slots) do not split over rollout.data={r.data} devices")
    sizes = EngineConfig(
        slots=slots,
        max_tokens=r.max_tokens,
        max_response_tokens=r.max_response_tokens,
        stop_ids=stop_ids,
        burst=r.burst,
        prefill_chunk=r.prefill_chunk,
        prefill_buckets=tuple(r.prefill_buckets or ()),
        # Programs for other numbers of rows round differently, so an episode's numbers would depend on which
        # others are prefilled with it.
        row_buckets=(slots,) if _has_barrier(config) else (),
        has_filter=has_filter,
        share_prefix=r.share_prefix,
        page_tokens=r.page_tokens or 0,
        kv_tokens=r.kv_tokens or 0,
    )
    return sizes.split_over(r.data)


def make_sampler(
    config: Config,
    model: DecoderConfig,
    tokenizer: Tokenizer,
    base: Params | None,
    *,
    num_hosts: int = 1,
    tell: Tell = tell_nobody,
    check: Callable[[], None] = lambda: None,
) -> SamplingEngine:
    """Build what samples a run's episodes: this host's engine, or one on the server of ``rollout.url``.

    Args:
      config: the configuration.
      model: the decoder's config.
      tokenizer: its tokenizer.
      base: the frozen weights below adapters; None without adapters.
      num_hosts: hosts that share the slots.
      tell: receives the failures of a server.
      check: called while a server is waited for; it may raise to end the wait.

    Raises:
      ConfigError: as `make_engine`; or the server cannot sample for this run.
    """
    if config.rollout.engine == "builtin":
        engine = make_engine(config, model, tokenizer.stop_ids, num_hosts=num_hosts)
        if base is not None:
            engine.base = engine.place(base)
        return engine
    if num_hosts > 1:
        raise ConfigError(f"rollout.engine=openai samples for one host, but {num_hosts} train together")
    sizes = size_engine(config, stop_ids=tokenizer.stop_ids, has_filter=True)
    return open_server(config, model, sizes, base, tell=tell, check=check)


def filter_of(section: RolloutConfig | EvalConfig) -> TokenFilter:
    """Return the filter of sampled tokens that a section of the configuration asks for."""
    return TokenFilter(section.top_p, section.top_k, section.min_p)


def check_filters(config: Config, vocab_size: int) -> None:
    """Check the filters of sampled tokens.

    Raises:
      ConfigError: ``top_k`` exceeds the vocabulary.
    """
    for name, section in (("rollout", config.rollout), ("eval", config.eval)):
        try:
            filter_of(section).check(vocab_size, f"{name}.")
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _has_barrier(config: Config) -> bool:
    """Return whether all episodes take each turn together: what makes a run repeatable without a schedule."""
    return config.rollout.deterministic and config.rollout.schedule is None


def make_pool(config: Config, tell: Tell = tell_nobody) -> EnvPool:
    """Start the environment workers; ``tell`` receives their faults."""
    w = config.workers
    timeouts = PoolTimeouts(start=w.start_timeout, reset=w.reset_timeout, step=w.step_timeout)
    is_local = w.backend == "local"
    # Nothing is known of the memory of other machines, so there is no limit unless one is set.
    limit = limit_memory(w.num) if w.memory_limit_mb is None and is_local else w.memory_limit_mb or None
    return EnvPool(
        config.env.target,
        config.env.options,
        num_workers=w.num,
        lanes=w.lanes,
        timeouts=timeouts,
        memory_limit_mb=limit,
        pass_env=w.pass_env,
        start=start_local if is_local else RayCluster(w.ray_address, w.ray_resources).start,
        faults=FaultPolicy(**vars(config.faults)),
        timeouts_are_answers=make_rules(config).timeout_outcome == "zero",
        tell=tell,
    )


def make_rules(config: Config) -> EpisodeRules:
    """Build the rules that end an episode; an overrun is treated as the environment declares, if not told."""
    overrun = config.env.timeout_outcome or find_spec(config).timeout_outcome
    return EpisodeRules(config.env.max_turns, overrun, config.env.anchor)


def make_collector(
    config: Config,
    engine: SamplingEngine,
    pool: EnvPool,
    language: Language,
    *,
    stream: int,
    first_handle: int = 0,
    num_tasks: int | None = None,
) -> Collector:
    """Build a collector for training (``stream`` 0), of ``num_tasks`` tasks, or evaluation (1)."""
    return Collector(
        engine,
        pool,
        language.make_context,
        language.parser,
        language.renderer.decode_response,
        make_rules(config),
        seed=config.seed,
        stream=stream,
        first_handle=first_handle,
        episode_timeout=config.rollout.episode_timeout,
        is_deterministic=_has_barrier(config),
        make_watch=make_watches(config, language.renderer),
        has_deadlines=config.rollout.engine != "builtin",
        num_tasks=num_tasks,
        look_at=Observer(config, language.renderer.tokenizer, pool.tell, for_credit=stream == 0),
    )


def make_watches(config: Config, renderer: ChatRenderer) -> Callable[[], Watch | None]:
    """Return what makes the search for ``rollout.stop`` in a response."""
    stops = config.rollout.stop
    return lambda: StopSearch(renderer.decode_response, stops) if stops else None


def make_evaluator(
    config: Config,
    engine: SamplingEngine,
    pool: EnvPool,
    language: Language,
    *,
    first_handle: int,
    attempts: int = 1,
    hosts: Hosts = ALONE,
) -> Evaluator:
    """Build an evaluator of ``eval.tasks`` tasks of each panel in ``env.eval_split``, sampled as it says.

    Args:
      config: the configuration.
      engine: the sampler, which lends its slots.
      pool: environment workers, shared with training.
      language: tokenizer, context and parser.
      first_handle: first pool handle that training does not use.
      attempts: attempts at each task.
      hosts: the hosts that share the tasks.

    Raises:
      ConfigError: the environment has no such split, or no tasks in it.
    """
    panels = count_panels(config, pool)
    collector = make_collector(
        config, engine, pool, language, stream=EVALUATION_STREAM, first_handle=first_handle
    )
    share = hosts.index, hosts.num
    return Evaluator(
        collector,
        engine,
        temperature=config.eval.temperature,
        token_filter=filter_of(config.eval),
        panels=panels,
        attempts=attempts,
        tell=pool.tell,
        share=share,
    )


def make_rollout(
    config: Config, engine: SamplingEngine, pool: EnvPool, language: Language, hosts: Hosts = ALONE
) -> RolloutThread:
    """Build the thread that plays this host's training episodes, with its ledger.

    Raises:
      ConfigError: the environment has no such split, no tasks in it, or too few tasks for the hosts.
    """
    r, split = config.rollout, config.env.split
    stored = None if r.stored is None else _load_stored(config, engine.model.vocab_size)
    check_split(pool, "env.split", split)
    num_tasks = pool.splits[split] if stored is None else len(stored)
    order = make_order(config, num_tasks, hosts)
    ledger = Ledger(
        order,
        group_size=r.group_size,
        groups_per_update=r.tasks_per_update // hosts.num,
        max_lag=config.train.max_lag,
        updates=config.train.updates,
        min_group_size=r.min_group_size,
        group_timeout=r.episode_timeout,
        max_refills=r.max_refills if r.filter_groups else None,
        tell=pool.tell,
        share=(hosts.index, hosts.num),
    )
    rollout = RolloutThread(
        make_collector(config, engine, pool, language, stream=0, num_tasks=order.num_drawn)
        if stored is None
        else StoredCollector(engine, pool, stored),
        ledger,
        is_repeatable=_has_barrier(config),
        max_stale_gap=r.max_stale_gap if r.publish == "burst" else None,
    )
    if r.schedule is not None:
        rollout.schedule = read_schedule(expand(r.schedule, "rollout.schedule"))
    return rollout


def check_rollout(config: Config, model: DecoderConfig) -> None:
    """Check filters, a server, files that rollouts are repeated or taken from, and Ray, before a run writes.

    Raises:
      ConfigError: a filter does not fit the vocabulary; the server does not answer, or cannot sample for this
        run; a file is missing, damaged, or does not fit the run; or Ray is not installed.
    """
    vocab_size = model.vocab_size
    check_filters(config, vocab_size)
    if config.rollout.engine != "builtin":
        check_server(config, model)
    if config.workers.backend == "ray":
        check_ray(config.workers.ray_address)
    if config.rollout.stored is not None:
        _load_stored(config, vocab_size)
    if config.rollout.schedule is not None:
        read_schedule(expand(config.rollout.schedule, "rollout.schedule"))


def _load_stored(config: Config, vocab_size: int) -> list[list[Trajectory]]:
    """Read the episodes of ``rollout.stored``, group by group."""
    r = config.rollout
    return group_episodes(
        load_trajectories(expand(str(r.stored), "rollout.stored"), "rollout.stored"),
        group_size=r.group_size,
        max_tokens=r.max_tokens,
        max_turns=config.env.max_turns,
        vocab_size=vocab_size,
    )
