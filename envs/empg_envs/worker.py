"""The main program of a worker process: many environments, driven by JSON lines over stdin and stdout.

It is started as ``python -m empg_envs.worker``. The first input line names the environment, and the answer
lists its splits and what it declares. Each later line is a list of commands. Those of one environment are
executed in order, those of others also beside them (`empg_envs.lanes`). Every command is answered by one line
as soon as it is done, so that the parent always knows which commands are running.

An exception or an invalid result of an environment becomes an answer (``"ok": false``); it never ends the
worker. Prints of an environment cannot disturb the protocol, because the real stdin and stdout are moved to
other descriptors before an environment is imported. The module needs only the standard library and
``empg_envs``, so that a worker starts in about 0.1 s.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from empg_envs import make_env
from empg_envs.answers import GarbageError, Reply, check_answer, describe, encode_reply
from empg_envs.base import EnvFault, TextEnv
from empg_envs.lanes import Lanes
from empg_envs.orphans import MARK, end_descendants

RSS_EVERY = 50  # number of commands between two reports of the resident memory
HOUSEKEEPING = 0.05  # seconds between two looks at stderr and at the parent
STDERR_TAIL = 1 << 16  # last bytes of stderr that stay when it is cut
TRACEBACK_CHARS = 2000


class EnvHost:
    """The environments of one worker, by handle.

    An instance stays after the end of its episode and is reset for the next one. After a failure it is
    dropped, because its state is unknown.
    """

    def __init__(self, env: str, options: dict[str, Any]):
        """Build one environment immediately, so that a wrong name or option is found at the start."""
        self._make: Callable[[], TextEnv] = lambda: make_env(env, **options)
        # Imports and shared caches are filled while an environment is built: one thread at a time.
        self._building = threading.Lock()
        first = self._make()
        self._spare: list[TextEnv] = [first]
        self._envs: dict[int, TextEnv] = {}
        self._has_snapshots = hasattr(first, "snapshot") and hasattr(first, "restore")

    def declare(self) -> dict[str, Any]:
        """Return the number of tasks of every split, and what the environment declares about itself."""
        env = self._spare[0]
        return {
            "splits": {str(split): int(env.num_tasks(split)) for split in env.list_splits()},
            "replayable": bool(getattr(env, "replayable", True)),
            "threads": bool(getattr(env, "threads", True)),
            "bounded": bool(getattr(env, "bounded", True)),
        }

    def execute(self, command: dict[str, Any], **extra: Any) -> bytes:
        """Run one command and return one encoded reply, whether the environment fails or not.

        Args:
          command: ``id``, ``env`` (the handle), ``op`` and ``args``.
          **extra: additional fields of the reply.
        """
        handle = command.get("env")
        head = {"id": command["id"], "env": handle, **extra}
        try:
            return encode_reply(
                {**head, "ok": True, **self._run(handle, command["op"], command.get("args") or {})}
            )
        # An environment may even call sys.exit(), which must not end the worker's other environments.
        except BaseException as error:
            failure = {
                "ok": False,
                "kind": "garbage" if isinstance(error, GarbageError) else "exception",
                "error": _clean(f"{type(error).__name__}: {error}"),
                "traceback": _clean(traceback.format_exc()[-TRACEBACK_CHARS:]),
            }
            if isinstance(error, EnvFault):
                failure |= {"reason": _clean(error.reason), "error": _clean(str(error))}
        self._drop(handle)
        return encode_reply({**head, **failure})

    def close(self) -> None:
        """Close every environment; errors are ignored, because the process ends anyway."""
        for handle in list(self._envs):
            self._drop(handle)
        for env in self._spare:
            _close_quietly(env)

    def _run(self, handle: int | None, op: str, args: dict[str, Any]) -> Reply:
        match op:
            case "reset":
                return self._reset(handle, **args)
            case "step":
                return self._step(handle, **args)
            case "restore":
                self._take(handle).restore(args["state"])  # type: ignore[attr-defined]
                return {}
            case "expert":
                return {"action": str(self._find(handle).expert_action())}  # type: ignore[attr-defined]
            case "close":
                self._drop(handle)
                return {}
            case "modules":
                return {"modules": sorted({name.partition(".")[0] for name in sys.modules})}
        raise ValueError(f"unknown op {op!r}; expected reset, step, restore, expert, close or modules")

    def _reset(self, handle: int | None, seed: int | None, split: str, index: int) -> Reply:
        env = self._take(handle)
        result = env.reset(seed, split=split, index=index)
        if not isinstance(result, tuple) or len(result) != 2:
            raise GarbageError(f"reset returned {describe(result)}; expected (observation, info)")
        observation, info = result
        return self._with_snapshot(env, check_answer(observation, 0.0, False, False, info))

    def _step(self, handle: int | None, action: str) -> Reply:
        env = self._find(handle)
        result = env.step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise GarbageError(
                f"step returned {describe(result)}; "
                "expected (observation, reward, terminated, truncated, info)"
            )
        return self._with_snapshot(env, check_answer(*result))

    def _with_snapshot(self, env: TextEnv, reply: Reply) -> Reply:
        """Add the environment's state, where it offers one, so that the parent can restore it elsewhere."""
        if self._has_snapshots:
            reply["snapshot"] = env.snapshot()  # type: ignore[attr-defined]
        return reply

    def _take(self, handle: int | None) -> TextEnv:
        """Return the handle's environment; where there is none, a spare or a new one."""
        if handle is None:
            raise ValueError("the command names no environment")
        if handle not in self._envs:
            with self._building:
                self._envs[handle] = self._spare.pop() if self._spare else self._make()
        return self._envs[handle]

    def _find(self, handle: int | None) -> TextEnv:
        if handle is None or handle not in self._envs:
            raise LookupError(f"environment {handle} has no episode: reset it first")
        return self._envs[handle]

    def _drop(self, handle: int | None) -> None:
        env = self._envs.pop(handle, None) if handle is not None else None
        if env is not None:
            _close_quietly(env)


def main() -> int:
    """Serve until the parent closes stdin; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    source, sink = take_channel()
    # The parent kills a hanging worker with SIGABRT; faulthandler then writes the stack to stderr.
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hello = source.readline()
    if not hello:
        return 0
    mark = os.environ.get(MARK, "")
    try:
        request = json.loads(hello)
        _keep_house(request.get("stderr_bytes"), mark)
        space = resource.getrlimit(resource.RLIMIT_AS)
        _limit_memory(request.get("memory_limit_mb"))
        host = EnvHost(request["env"], request.get("options") or {})
        ready = {"ready": True, "pid": os.getpid(), "rss_mb": resident_mb(), **host.declare()}
        if not ready["bounded"]:
            resource.setrlimit(resource.RLIMIT_AS, space)
        _write(sink, encode_reply(ready))
    except BaseException as error:
        traceback.print_exc()
        _write(sink, encode_reply({"fatal": f"{type(error).__name__}: {error}"}))
        return 1
    lanes = request.get("lanes", 1) if ready["threads"] else 1
    serve(host, _commands(source), lambda line: _write(sink, line), lanes)
    host.close()
    end_descendants(os.getpid(), mark)
    return 0


def serve(
    host: EnvHost, commands: Iterator[dict[str, Any]], write: Callable[[bytes], None], lanes: int = 1
) -> None:
    """Execute commands; every `RSS_EVERY`-th reply also carries ``rss_mb``.

    Args:
      host: the environments.
      commands: the commands in their order.
      write: writes one line.
      lanes: largest number of commands that run at the same time; 1 executes them one after another.
    """
    count = itertools.count(1)

    def execute(command: dict[str, Any]) -> bytes:
        extra = {} if next(count) % RSS_EVERY else {"rss_mb": resident_mb()}
        return host.execute(command, **extra)

    if lanes > 1:
        Lanes(execute, commands, write, lanes).serve()
        return
    for command in commands:
        write(execute(command))


def resident_mb() -> float:
    """Return this process's own resident memory in MiB; without /proc, all of it at its maximum so far.

    Pages of mapped files are left out: they are shared, and go where memory is scarce.
    """
    try:
        with open("/proc/self/statm", "rb") as statm:
            _, resident, shared, *_ = map(int, statm.read().split())
            return (resident - shared) * resource.getpagesize() / 2**20
    except OSError:
        # ru_maxrss is in bytes on macOS and in kibibytes elsewhere (getrusage(2)).
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _commands(source: BinaryIO) -> Iterator[dict[str, Any]]:
    for line in source:
        yield from json.loads(line)


def take_channel() -> tuple[BinaryIO, int]:
    """Move stdin and stdout to private descriptors that environments and their children do not inherit."""
    source, sink = os.dup(0), os.dup(1)  # dup() makes them non-inheritable
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return os.fdopen(source, "rb"), sink


def _write(sink: int, line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[os.write(sink, view) :]


def _keep_house(stderr_bytes: int | None, mark: str) -> None:
    """Bound the size of stderr, and end this process soon after its parent, even while an environment hangs.

    An idle worker ends at the end of stdin; this thread ends a busy one. Linux' parent-death signal is not
    used, because it also fires when only the parent's *thread* that started the worker ends. Nor is a limit
    on file sizes, which would bound the files of environments, too.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(HOUSEKEEPING)
            if stderr_bytes is not None:
                _cut_stderr(stderr_bytes)
        end_descendants(os.getpid(), mark)
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="housekeeping").start()


def _cut_stderr(limit: int) -> None:
    """Empty the stderr file, except its end, when it has grown beyond a limit; children write there, too."""
    try:
        size = os.fstat(2).st_size
        if size > limit:
            tail = os.pread(2, min(STDERR_TAIL, limit // 2), max(0, size - min(STDERR_TAIL, limit // 2)))
            os.ftruncate(2, 0)
            os.write(2, tail)
    except OSError:  # an environment may have replaced it
        pass


def _limit_memory(limit_mb: int | None) -> None:
    """Limit the address space, so that a runaway allocation raises MemoryError in this process."""
    if limit_mb is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit_mb << 20, hard))


def _clean(text: str) -> str:
    """Write out what UTF-8 cannot encode, as JSON escapes it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _close_quietly(env: TextEnv) -> None:
    try:
        env.close()
    except BaseException:
        traceback.print_exc()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # os._exit instead of sys.exit: threads left by an environment must not keep the process alive.
    os._exit(status)
