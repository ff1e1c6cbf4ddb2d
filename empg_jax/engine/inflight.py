"""What the device works on while the host goes on."""

from __future__ import annotations

import dataclasses

import numpy as np

from empg_jax.engine.programs import Burst
from empg_jax.engine.sizes import EngineConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Dispatched:
    """A burst that the device works on.

    Attributes:
      burst: its outputs, not read yet; None where the device rests.
      version: of the weights.
      members: bool[S], slots that it samples for. A slot whose response is dropped meanwhile leaves.
      may_go_on: bool[S], of these, responses that can outlast it.
    """

    burst: Burst | None
    version: int
    members: np.ndarray
    may_go_on: np.ndarray

    @classmethod
    def nothing(cls, config: EngineConfig) -> Dispatched:
        """Make what stands for no burst."""
        return cls(None, -1, np.zeros(config.slots, bool), np.zeros(config.slots, bool))

    @property
    def mostly_goes_on(self) -> bool:
        """Whether most responses can outlast the burst.

        Else the next one would do nothing for them, and their next turns would wait for it.
        """
        return bool(2 * self.may_go_on.sum() > self.members.sum())

    def leave(self, slot: int) -> None:
        """Let one slot leave: its response was dropped."""
        self.members[slot] = self.may_go_on[slot] = False

    def keep(self, slots: np.ndarray) -> None:
        """Let all slots leave but these, bool[S]: their responses have ended or were dropped."""
        self.members[:] &= slots
        self.may_go_on[:] &= slots
