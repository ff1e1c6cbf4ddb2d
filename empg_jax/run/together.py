"""What the hosts of a run do together: the batch of an update, an evaluation, a cut, a stop, a refusal.

Each host plays its own groups, and all of them then hold the same episodes: every host builds the same batch
of the same shape, and credit sees all of it. A host that was asked to stop, or whose rollouts failed, says so
in place of its episodes, so that all leave the loop at the same update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_jax import __version__
from empg_jax.config.places import expand
from empg_jax.engine.stats import EngineStats, add_stats
from empg_jax.errors import ConfigError, Interrupted, RefusedCheckpoint, writing
from empg_jax.files import try_folder
from empg_jax.parallel.hosts import HostLost, Hosts
from empg_jax.report.progress import Progress
from empg_jax.rollout.evaluator import Evaluation, conclude
from empg_jax.rollout.shares import join_cuts
from empg_jax.rollout.thread import Cut, Delivery
from empg_jax.run.assembly import flat
from empg_jax.run.folder import checkpoint_dir
from empg_jax.run.lock import locked
from empg_jax.run.process import StopRequest
from empg_jax.run.step_folders import is_object_store, open_step_folders
from empg_jax.run.storage import from_bytes, to_bytes
from empg_jax.types import Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config

# How each host's number of an update becomes one of all hosts; other numbers of a delivery are means.
SUMMED = {"groups_replaced", "groups_uniform", "stale_refills"}
LARGEST = {"stale_gap", "breaker_seconds"}
SEE_SECONDS = 5.0  # a shared file system shows other hosts' files after a while
Part = tuple[dict[str, Any], list[Trajectory]]  # JSON types, and episodes


def shared_facts(config: Config, resume: Path | None, step: int | None) -> dict[str, Any]:
    """Return what must be equal on all hosts: the version, the configuration, and what is resumed."""
    own = ("hosts.", "compile_cache", "log.progress")  # these may differ
    facts = {name: value for name, value in flat(config).items() if not name.startswith(own)}
    resumed = None if resume is None else str(resume)
    return {"version": __version__, "resume": resumed, "step": step, **facts}


def without_hosts(config: Config) -> Config:
    """Return the configuration as the run's folder keeps it: it may go on with other hosts."""
    if not hasattr(config, "model_copy"):  # a resolved file, read without pydantic
        return config
    return config.model_copy(update={"hosts": type(config.hosts)()})


def check_store(config: Config, hosts: Hosts, *, is_new: bool) -> None:
    """Check that a place of the checkpoints that was chosen can be written to, and is no other run's.

    Raises:
      RefusedCheckpoint: the place cannot be written, or holds another run's checkpoints and this run is new.
      RunLocked: another process uses the folder.
    """
    directory = config.checkpoint.dir
    if directory is None:
        return
    if is_object_store(directory):
        # Imported only where it is chosen: it takes a second.
        from empg_jax.run.object_store import check_object_store

        check_object_store(directory, hosts, is_new=is_new)
        return
    folder = expand(directory, "checkpoint.dir")
    if is_new and (steps := hosts.first("checkpoints", lambda: _look_into(folder))):
        raise RefusedCheckpoint(
            f"checkpoint.dir={directory} holds checkpoints of another run ({steps}), which this one would "
            "delete: choose another folder, or go on with that run: --resume RUN"
        )


def _look_into(folder: Path) -> list[int]:
    """Return the steps in a folder of checkpoints that this process can have; nothing is made."""
    with writing(f"checkpoint.dir={folder}", RefusedCheckpoint):
        try_folder(folder)
    with locked(folder) if folder.exists() else contextlib.nullcontext():
        return open_step_folders(folder).steps


@contextlib.contextmanager
def lock_files(config: Config, run_dir: Path, hosts: Hosts) -> Iterator[None]:
    """Hold the locks on the run's folder and on a folder of checkpoints elsewhere, on host 0.

    Raises:
      RunLocked: another process holds one of them, or a folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if hosts.is_first:
            stack.enter_context(locked(run_dir))
            chosen = checkpoint_dir(config, run_dir) if config.checkpoint.dir is not None else run_dir
            if isinstance(chosen, Path) and chosen.resolve() != run_dir.resolve():
                stack.enter_context(locked(chosen))
        yield


def make_progress(config: Config, hosts: Hosts) -> Progress:
    """Make the display: one for all hosts, and messages with the host's number elsewhere."""
    prefix = "" if hosts.is_first else f"[host {hosts.index}] "
    return Progress(config.log.progress and hosts.is_first, prefix=prefix)


def share_folder(hosts: Hosts, make: Callable[[], Path]) -> Path:
    """Let host 0 make (or name) the run's folder, and check that all hosts see the same one.

    Raises:
      ConfigError: host 0 cannot make it, or a host does not see it.
    """
    if hosts.num == 1:
        return make()
    mark = ".hosts"

    def choose() -> str:
        folder = make().absolute()
        try:
            (folder / mark).write_text("all hosts of the run must see this file\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the run folder {folder} cannot be written: {error.strerror}") from None
        return str(folder)

    run_dir = Path(hosts.first("folder", choose))
    end = time.monotonic() + SEE_SECONDS
    while not (is_seen := (run_dir / mark).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    seen = hosts.agree("folder-seen", is_seen)
    if hosts.is_first:
        (run_dir / mark).unlink()
    if blind := [str(host) for host, sees in enumerate(seen) if not sees]:
        raise ConfigError(
            f"host {', '.join(blind)} does not see the run folder {run_dir} that host 0 chose: it must "
            "lie on a file system that all hosts share (run_dir)"
        )
    return run_dir


def gather(hosts: Hosts, name: str, work: Callable[[], Part], stop: StopRequest | None = None) -> list[Part]:
    """Do a part of the work on each host, and return the parts of all, by index.

    Args:
      hosts: the hosts.
      name: of the work, the same on all hosts.
      work: makes this host's part; it may raise `Interrupted`.
      stop: hears of the signal when another host was asked to stop.

    Raises:
      Interrupted: a host was asked to stop.
      HostLost: another host's part failed.
    """
    if hosts.num == 1:
        return [work()]
    head: dict[str, Any] = {}
    trajectories: list[Trajectory] = []
    failure: BaseException | None = None
    try:
        head["values"], trajectories = work()
    except Interrupted:
        head = {"stop": stop.signum if stop is not None else 0}
    except Exception as error:
        failure, head = error, {"failed": f"{type(error).__name__}: {error}"}
    parts = [_unpack(content) for content in hosts.exchange(name, _pack(head, trajectories))]
    if failure is not None:
        raise failure
    for index, (said, _) in enumerate(parts):
        if "failed" in said:
            raise HostLost(f"host {index} failed: {said['failed']}")
    for said, _ in parts:
        if "stop" in said:
            if stop is not None and not stop():
                stop.set(said["stop"])
            raise Interrupted
    return [(said["values"], episodes) for said, episodes in parts]


def _pack(head: dict[str, Any], trajectories: Sequence[Trajectory]) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<q", len(text)) + text + (to_bytes(trajectories) if trajectories else b"")


def _unpack(content: bytes) -> tuple[dict[str, Any], list[Trajectory]]:
    (length,) = struct.unpack_from("<q", content)
    rest = content[8 + length :]
    return json.loads(content[8 : 8 + length]), from_bytes(rest) if rest else []


# ------------------------------------------------------------------------------------- the parts


def gather_delivery(hosts: Hosts, take: Callable[[], Delivery], stop: StopRequest) -> Delivery:
    """Wait for this host's groups of the next update, and return those of all hosts as one delivery."""
    if hosts.num == 1:
        return take()

    def work() -> Part:
        delivery = take()
        values = {f.name: getattr(delivery, f.name) for f in dataclasses.fields(delivery)}
        trajectories = values.pop("trajectories")
        return {**values, "engine": dataclasses.asdict(delivery.engine)}, trajectories

    return join_deliveries(gather(hosts, "batch", work, stop))


def join_deliveries(parts: Sequence[Part]) -> Delivery:
    """Join the deliveries of all hosts: episodes in the order of their groups, counts summed.

    Of seconds in which an environment was away, most often from all hosts, the largest number is kept.
    """
    values = [each for each, _ in parts]
    episodes = [trajectory for _, trajectories in parts for trajectory in trajectories]
    return Delivery(
        update=values[0]["update"],
        trajectories=sorted(episodes, key=lambda t: (t.group_id, t.member)),
        metrics=_join_metrics([each["metrics"] for each in values]),
        engine=add_stats(EngineStats(**each["engine"]) for each in values),
        outcomes=_add(each["outcomes"] for each in values),
        incidents=_add(each["incidents"] for each in values),
    )


def _join_metrics(each: Sequence[dict[str, float]]) -> dict[str, float]:
    joined = {}
    for name in sorted({name for metrics in each for name in metrics}):
        numbers = [metrics[name] for metrics in each if name in metrics]
        total = max(numbers) if name in LARGEST else sum(numbers)
        joined[name] = total if name in SUMMED | LARGEST else total / len(numbers)
    return joined


def _add(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for each in counts:
        for name, count in each.items():
            so_far = total.get(name, 0)
            total[name] = max(so_far, count) if name in LARGEST else so_far + count
    return total


def add_counts(hosts: Hosts, name: str, counts: dict[str, Any]) -> dict[str, Any]:
    """Join counts by name over all hosts, as `join_deliveries` does."""
    return _add(hosts.agree(name, counts))


def gather_evaluation(hosts: Hosts, play: Callable[[], Evaluation], stop: StopRequest) -> Evaluation:
    """Play this host's tasks of the panel, and return the result on all tasks."""
    if hosts.num == 1:
        return play()

    def work() -> Part:
        found = play()
        return {"missing": found.missing}, found.trajectories

    parts = gather(hosts, "evaluation", work, stop)
    trajectories = [trajectory for _, episodes in parts for trajectory in episodes]
    return conclude(trajectories, [task for values, _ in parts for task in values["missing"]])


def gather_cut(hosts: Hosts, cut: Callable[[], Cut]) -> Cut:
    """Return the cut of every host's ledger, and the unconsumed episodes of all."""
    if hosts.num == 1:
        return cut()
    parts = gather(hosts, "cut", cut)
    return join_cuts([values for values, _ in parts]), [t for _, episodes in parts for t in episodes]
