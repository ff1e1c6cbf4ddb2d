"""A session of tests in a container: there is nothing but a log, which may not agree with itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from empg_envs.swe import reports
from empg_envs.swe.judge.sessions import RUN
from empg_envs.swe.sandbox import ExecResult


@dataclasses.dataclass(frozen=True)
class LogSession:
    """One session.

    Attributes:
      result: output and end of the test command, as the container's engine reports them.
      parser: reads statuses in the output.
      code: exit code of the tests; None if the command has another one.
      nonce: secret that a witness in the test process ends the log with; None without a witness.
    """

    result: ExecResult
    parser: reports.Parser
    code: int | None = None
    nonce: str | None = None

    @property
    def statuses(self) -> Mapping[str, str]:
        """Status of each test."""
        return self.parser(self.result.output)

    @property
    def end(self) -> int | None:
        """The exit code that the witness announces; None if it does not come to speak."""
        for line in self.result.output.split("\n"):
            nonce, _, code = line.partition(" ")
            if self.nonce is not None and nonce == self.nonce and code.isdigit():
                return int(code)
        return None

    @property
    def is_sound(self) -> bool:
        """Whether the session ran its tests to the end."""
        if self.result.reason != "exit" or not reports.is_believable(dict(self.statuses), self.code):
            return False
        return self.nonce is None or self.end in RUN

    def doubts(self) -> list[str]:
        """Return what does not agree in the session: nothing for an honest one, however many tests fail."""
        if self.result.reason != "exit":
            return []
        found = reports.doubts(self.result.output, self.parser, self.code)
        if self.nonce is None or self.code is None:
            return found
        if self.end is None and self.code in RUN:  # other codes say that the tests could not run
            found.append(f"early exit: code {self.code} before the end of the tests")
        if self.end not in (None, self.code):
            found.append(f"exit code {self.code} does not fit the end of the tests, {self.end}")
        return found
