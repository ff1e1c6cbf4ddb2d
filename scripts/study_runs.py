"""The runs of a study: claimed one by one, begun or gone on with, and recorded when they end."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_ledger import Ledger, Line, newest, triple_of
from study_line import Incomplete, describe_failure, find_changes, now, processor, read_run
from study_plan import Study, Triple
from study_processes import Children, Ended

from empg_jax.errors import ConfigError
from empg_jax.metrics import read_metrics
from empg_jax.parallel.ahead import count_cores

PROGRAM = (sys.executable, "-m", "empg_jax")
# Somebody ended the run, not a mistake in it: it goes on from its checkpoint the next time.
OUTSIDE = {
    128 + signal.SIGINT,
    128 + signal.SIGTERM,
    *(-number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)),
}
MAX_ATTEMPTS = 5  # a run that is killed as often as this, by the kernel perhaps, has failed


def _begun_elsewhere(study: Study, last: Mapping[Triple, Line], runs_dir: Path) -> dict[tuple[str, int], str]:
    """Find the tasks and seeds whose runs, finished or begun, are of another processor alone; its name."""
    here = processor()
    if here is None:
        return {}
    names: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
    for triple in study.triples():
        line = last.get(triple)
        if line is not None and line["status"] == "finished":
            found = {line["hardware"]["processor"]}
        else:
            found = {name for name, _ in Attempts(runs_dir, triple, study.settings(triple)).machines}
        names[triple.task, triple.seed] |= found - {None}
    return {place: min(found) for place, found in names.items() if found and here not in found}


class Runner:
    """Makes runs of a study that are still to do.

    Args:
      study: the study.
      runs_dir: parent of the runs' folders.
      arms: arms to run; None is all.
      tasks: tasks to run; None is all.
      limit: most runs to start; None is no limit.
      retry: also go on with runs that failed before.
      any_processor: also make runs of a task's seed whose other ones were made or begun on another processor.
        Warm starts round differently there, so that such runs seldom make pairs.
      say: receives messages for the user.
    """

    def __init__(
        self,
        study: Study,
        runs_dir: Path,
        *,
        arms: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
        retry: bool = False,
        any_processor: bool = False,
        say: Callable[[str], None],
    ) -> None:
        self.study, self.ledger, self.runs_dir = study, Ledger(study), runs_dir.absolute()
        self._say, self._children = say, Children()
        self._lock, self._left = threading.Lock(), limit
        lines = self.ledger.read()
        # Of the same look: what is finished later shows as one line more.
        self._counts, last = collections.Counter(map(triple_of, lines)), newest(lines)
        wanted = [
            triple
            for triple in study.triples()
            if (arms is None or triple.arm in arms)
            and (tasks is None or triple.task in tasks)
            and (triple not in last or (retry and last[triple]["status"] == "failed"))
        ]
        elsewhere = {} if any_processor else _begun_elsewhere(study, last, self.runs_dir)
        for (task, seed), name in elsewhere.items():
            if any((triple.task, triple.seed) == (task, seed) for triple in wanted):
                say(f"seed {seed} of {task} is left to the processor of its runs, {name} (--any-processor)")
        self._waiting = iter([triple for triple in wanted if (triple.task, triple.seed) not in elsewhere])

    def run(self, jobs: int) -> int:
        """Make the runs, ``jobs`` at a time; return the signal that stopped them, or 0."""
        signals: list[int] = []
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, lambda number, _: signals.append(number)) for each in numbers}
        passed_on = 0
        try:
            self.runs_dir.mkdir(parents=True, exist_ok=True)
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                futures = [pool.submit(self._work) for _ in range(jobs)]
                while not all(future.done() for future in futures):
                    if len(signals) > passed_on:
                        passed_on += 1
                        self._say("stopping: runs save their state")
                        self._children.stop()
                    time.sleep(0.1)
            for future in futures:
                future.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return signals[0] if signals else 0

    def _work(self) -> None:
        for triple, claim in self._claims():
            try:
                self._make(triple, claim)
            finally:
                os.close(claim)

    def _claims(self) -> Iterator[tuple[Triple, int]]:
        while (found := self._next()) is not None:
            yield found

    def _next(self) -> tuple[Triple, int] | None:
        """Claim the next run that nobody has made or is making; None at the end, at a stop, at the limit."""
        with self._lock:
            if self._left == 0:
                return None
            for triple in self._waiting:
                if self._children.is_stopping:
                    return None
                claim = self.ledger.claim(triple)
                if claim is None:
                    continue
                # Another process may have finished it between our look at the lines and the claim.
                if self.ledger.count()[triple] == self._counts[triple]:
                    self._left = None if self._left is None else self._left - 1
                    return triple, claim
                os.close(claim)
        return None

    def _make(self, triple: Triple, claim: int) -> None:
        """Begin a run or go on with it; record its end, unless it was stopped."""
        settings = self.study.settings(triple)
        attempts = Attempts(self.runs_dir, triple, settings)
        log, folder = self.runs_dir / f"{triple.name}.log", self.runs_dir / triple.name
        line: dict[str, Any] = {"task": triple.task, "arm": triple.arm, "seed": triple.seed}
        line |= {"status": "failed", "settings": settings}
        attempts.check()
        self._say(f"{triple.name} begins" if attempts.begun == 0 else f"{triple.name} goes on")
        config, *overrides = settings
        command = [*PROGRAM, "train"]
        if (folder / "config.yaml").exists():
            command += ["--resume", str(folder)]
        else:
            command += [self.study.find(config), *overrides, f"run_dir={folder}"]
        attempts.begin()
        ended = self._children.run(command, log, keep=claim)
        if ended is None:
            return
        attempts.end(ended)
        if ended.code == 0 and self.study.end_tasks is not None:
            command = [*PROGRAM, "eval", str(folder), "--tasks", str(self.study.end_tasks)]
            panel = self._children.run(command, log, keep=claim)
            if panel is None:
                return
        else:
            panel = None
        code = ended.code or (panel.code if panel is not None else 0)
        is_outside = code in OUTSIDE and attempts.begun < MAX_ATTEMPTS
        if code and (self._children.is_stopping or is_outside):
            self._say(f"{triple.name} was stopped; the next call goes on with it")
            return
        line |= {"date": now(), **attempts.costs()}
        if code:
            line["reason"] = describe_failure(code, log)
        else:
            line |= self._read(folder, panel)
            if len(attempts.machines) > 1:
                line["spent"] = None  # seconds of two machines make no sum
        self.ledger.append(line)
        self._say(f"{triple.name}: {line.get('reason', line['status'])}")

    @staticmethod
    def _read(folder: Path, panel: Ended | None) -> dict[str, Any]:
        try:
            found = {"status": "finished", **read_run(folder)}
            if panel is not None:
                result = json.loads(panel.output)
                if result["eval_success"] is None:
                    raise Incomplete("the last evaluation has no success")
                found |= {"end_success": result["eval_success"], "end_tasks": result["eval_tasks"]}
        except (Incomplete, ValueError, KeyError) as error:
            return {"reason": f"no result: {error!r}"}
        return found


def _changed(line: Mapping[str, Any]) -> bool:
    return bool(line.get("changes") or line.get("dirty"))


class Attempts:
    """The attempts at a run: its settings, the machine of each attempt, and what it cost.

    Args:
      runs_dir: folder of the file, beside the run's.
      triple: the run.
      settings: the run's settings.
    """

    def __init__(self, runs_dir: Path, triple: Triple, settings: list[str]) -> None:
        self._path, self._settings = runs_dir / f"{triple.name}.attempts.jsonl", settings
        self._lines = read_metrics(self._path) if self._path.exists() else []

    @property
    def begun(self) -> int:
        """Attempts that were begun so far."""
        return sum("settings" in line for line in self._lines)

    @property
    def machines(self) -> set[tuple[str | None, int]]:
        """Processor and number of cores of the attempts; older versions did not note them."""
        return {(line["processor"], line["cpus"]) for line in self._lines if "processor" in line}

    def check(self) -> None:
        """Check that the folder's run was begun with the same settings.

        Raises:
          ConfigError: it was not.
        """
        for line in self._lines:
            if line.get("settings", self._settings) != self._settings:
                run = str(self._path).removesuffix(".attempts.jsonl")
                raise ConfigError(
                    f"{run} was begun with {line['settings']}, not with {self._settings}: move it and its "
                    "files away, or choose another --runs-dir"
                )

    def begin(self) -> None:
        """Note the start of an attempt."""
        line = {"update": self.begun, "settings": self._settings, "changes": find_changes()}
        self._append(line | {"processor": processor(), "cpus": count_cores()})

    def end(self, ended: Ended) -> None:
        """Note how an attempt ended and what it cost."""
        self._append({"update": self.begun - 1, "code": ended.code, "wall": ended.wall, "cpu": ended.cpu})

    def costs(self) -> dict[str, Any]:
        """Sum the attempts; costs are None where those of one are unknown, its parent having died first."""
        ends = [line for line in self._lines if "cpu" in line]
        known = len(ends) == self.begun
        return {
            "attempts": self.begun,
            # Older versions noted only whether there were any.
            "changes": sorted({line.get("changes") or "unknown" for line in self._lines if _changed(line)}),
            "process_seconds": round(sum(line["wall"] for line in ends), 3) if known else None,
            "cpu_seconds": round(sum(line["cpu"] for line in ends), 3) if known else None,
        }

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._lines.append(line)
