"""What a judge's cage reports of test sessions, and whether it agrees with itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RED = frozenset(("FAILED", "ERROR"))
FRAME_BYTES = 4
CRASHED = 70  # exit code of a session whose runner raised, as in `empg_envs.swe.guest.warden`
RUN = (0, 1)  # exit codes of a session that ran its tests; others of pytest say that it could not


@dataclasses.dataclass(frozen=True)
class Session:
    """One session of tests.

    Attributes:
      nonce: its secret, as given in the order.
      code: exit code of its process; negative for a signal.
      claims: pairs of test id and status, in order.
      has_ended: whether the process said that it came to the end of its tests.
      broken: functions of the test machinery that were replaced, by the process's own word.
      noise: lines of the channel that the runner did not write.
      is_clear: whether nothing of the session was left for the next.
    """

    nonce: str
    code: int
    claims: tuple[tuple[str, str], ...]
    has_ended: bool
    broken: tuple[str, ...] = ()
    noise: int = 0
    is_clear: bool = True

    @property
    def is_sound(self) -> bool:
        """Whether the session ran its tests to the end."""
        return self.has_ended and self.code in RUN

    @property
    def statuses(self) -> dict[str, str]:
        """Status of each test; of several claims about one test the worst counts."""
        found: dict[str, str] = {}
        for name, status in self.claims:
            if found.get(name) not in RED:
                found[name] = status
        return found


def order(
    runner: str, sessions: Sequence[Mapping[str, Any]], end: str, *, has_namespace: bool = True
) -> bytes:
    """Return the warden's stdin.

    Args:
      runner: ``pytest`` or ``unittest``.
      sessions: ``root``, ``paths``, ``only`` and ``nonce`` of each.
      end: secret that the report must end with.
      has_namespace: whether the sandbox is a process namespace of its own.
    """
    header = {"runner": runner, "namespace": has_namespace}
    frames = [header, *({"runner": runner, **session} for session in sessions), {"end": end}]
    return b"".join(_frame(json.dumps(frame).encode()) for frame in frames)


def read(report: bytes, end: str) -> tuple[list[Session], bool]:
    """Parse the warden's report; also return whether it is whole.

    Args:
      report: the bytes of the report descriptor.
      end: the secret of the order.
    """
    frames, sessions = list(_frames(report)), []
    for fact, claims in zip(frames[::2], frames[1::2], strict=False):
        try:
            sessions.append(_session(json.loads(fact), claims))
        except (ValueError, KeyError, TypeError):
            return sessions, False
    is_whole = len(frames) % 2 == 1 and frames[-1] == json.dumps({"end": end}).encode()
    return sessions, is_whole


def doubts(session: Session) -> list[str]:
    """Return what does not agree in a session: nothing for an honest one, however many tests fail."""
    found = [f"replaced {name}" for name in session.broken]
    if session.noise:
        found.append("forged report: the runner's channel holds lines that it did not write")
    if not session.is_clear:
        found.append("left something for the next session")
    if session.code < 0 or session.code == CRASHED:  # a signal, or no memory: it can resolve nothing
        return found
    if not session.has_ended:
        return [*found, f"early exit: code {session.code} before the end of the tests"]
    statuses = session.statuses
    expected = int(bool(RED & set(statuses.values())))
    if session.code in RUN and session.code != expected:
        found.append(f"exit code {session.code} does not fit the statuses")
    seen: dict[str, str] = {}
    for name, status in session.claims:
        if seen.setdefault(name, status) in RED and status not in RED:
            found.append(f"contradiction: {name} {seen[name]}, then {status}")
    return found


def _session(fact: Mapping[str, Any], raw: bytes) -> Session:
    nonce, claims, noise = str(fact["nonce"]), [], int(fact["omitted"] > 0)
    ends: list[tuple[str, ...]] = []
    count = 0
    *lines, rest = raw.split(b"\n")
    for line in [*lines, rest] if rest else lines:
        match None if ends else _claim(line, nonce, count + 1):
            case ["test", str(name), str(status)]:
                claims.append((name, status))
            case ["end", *broken]:
                ends.append(tuple(map(str, broken)))
            case _:
                noise += 1
                continue
        count += 1
    seals: tuple[str, ...] = ends[0] if ends else ()
    return Session(nonce, int(fact["code"]), tuple(claims), bool(ends), seals, noise, bool(fact["clear"]))


def _claim(line: bytes, nonce: str, count: int) -> list[Any] | None:
    """Return what a line of the channel says; None for a line without the nonce or out of order."""
    words = line.split(b" ", 2)
    if len(words) != 3 or words[0] != nonce.encode() or words[1] != b"%d" % count:
        return None
    try:
        said = json.loads(words[2])
    except ValueError:
        return None
    return said if isinstance(said, list) else None


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(FRAME_BYTES, "big") + data


def _frames(report: bytes) -> Iterator[bytes]:
    place = 0
    while place + FRAME_BYTES <= len(report):
        size = int.from_bytes(report[place : place + FRAME_BYTES], "big")
        place += FRAME_BYTES
        if place + size > len(report):
            return
        yield report[place : place + size]
        place += size
