"""A bound part: a pure function with its settings, which remembers the factory and the options it came from.

With this record a configuration can replace one option of a named recipe, and refuse a key that no chosen
part reads. A plain function is a part as well, but without options.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from empg_jax.algorithms.contract import Accept, Limit, MeanWeight, Weigh


@dataclasses.dataclass(frozen=True)
class Part:
    """A pure function bound to its settings.

    Attributes:
      name: the factory's name.
      options: every keyword of the factory, with its value.
      function: the bound function.
      needs: what it reads beyond the policy's own scores, rewards and anchors: ``ref_logprobs`` and
        ``values`` of `Scores`, ``answer_logprobs`` of the batch; ``success``, ``actions`` and ``milestones``,
        without which it has no credit of steps.
      scales_clip: whether it is an estimator that gives ``clip_scale``, so that the objective must clip.
      is_filter: whether it is a choice of turns as if the others had not been sampled: they do not enter the
        statistics of the modulation, either.
    """

    name: str
    options: Mapping[str, Any]
    function: Callable[..., Any]
    needs: tuple[str, ...] = ()
    scales_clip: bool = False
    is_filter: bool = False

    def __call__(self, *args: Any) -> Any:
        """Call the bound function."""
        return self.function(*args)


@dataclasses.dataclass(frozen=True)
class Correction:
    """A correction for tokens that another policy sampled, by rejecting some tokens or weighting all of them.

    Attributes:
      name: the factory's name.
      options: every keyword of the factory, with its value.
      accept: tokens that stay in the loss; None = all.
      weigh: constants that multiply the policy loss; None = 1.
      mean_weight: normalizer of these constants; None = 1. `weigh` sees some rows only, so credit divides the
        advantages by the normalizer; objectives are proportional to the advantages.
      limit: tokens whose policy loss keeps its gradient; the others keep its value. None = all.
      needs: as of a `Part`.
    """

    name: str = "correction"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    accept: Accept | None = None
    weigh: Weigh | None = None
    mean_weight: MeanWeight | None = None
    limit: Limit | None = None
    needs: tuple[str, ...] = ()


def default_of(function: Callable[..., Any], name: str) -> Any:
    """Read the default of a pure function's keyword, so that it is written down once."""
    return inspect.signature(function).parameters[name].default


def name_of(part: Any) -> str:
    """Name a part, or a function of the user's own, in a message."""
    return getattr(part, "name", None) or getattr(part, "__qualname__", None) or type(part).__name__
