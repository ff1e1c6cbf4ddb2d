"""Moments of a run that do not depend on time, at which a test can stop it."""

import os
import signal

from empg_jax.rollout.collector import Collector
from empg_jax.run.process import StopRequest


class Moments:
    """Counts the updates of the warm start and the rounds of training episodes: they do not depend on time.

    Attributes:
      at: the moment at which the process gets a real SIGTERM; None is never.
    """

    at, passed = None, 0

    def __init__(self, patch):
        self.count_before(patch, StopRequest, "__call__", lambda stop: True)  # asked by the warm start only
        self.count_before(patch, Collector, "advance", lambda collector: collector._stream == 0)

    def count_before(self, patch, kind, name, is_counted):
        method = getattr(kind, name)

        def counted(this, *args):
            if is_counted(this):
                self.passed += 1
                if self.passed == self.at:
                    os.kill(os.getpid(), signal.SIGTERM)
            return method(this, *args)

        patch.setattr(kind, name, counted)
