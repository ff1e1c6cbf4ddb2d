"""Requests of the wire: what they may say, and the refusal of everything else by name."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from empg_jax.errors import nearest
from empg_jax.models.filtering import TokenFilter

# Keys that change what is sampled, at values that change nothing. Any other value is refused, because a
# client that asks for repetition penalties must not get something else in silence.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "detokenize": (True,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "top_logprobs": (0,),
}
# Keys without an effect on the tokens; chats read one of them, `parallel_tool_calls`, for their answer.
IGNORED = frozenset(
    {
        *("cache_salt", "metadata", "output_kind", "parallel_tool_calls", "priority", "prompt_cache_key"),
        *(
            "request_id",
            "safety_identifier",
            "service_tier",
            "spaces_between_special_tokens",
            "store",
            "user",
        ),
    }
)
TEXT = frozenset({"detokenize", "skip_special_tokens"})  # ignored where an answer has token ids alone
SAMPLING = frozenset(
    {
        "max_tokens",
        "temperature",
        "seed",
        "n",
        "stop",
        "stop_token_ids",
        "logprobs",
        "top_p",
        "top_k",
        "min_p",
    }
    | NEUTRAL.keys()
)
ANSWER = frozenset({"model", "stream", "stream_options", "return_token_ids", "skip_special_tokens"})
STREAM = frozenset({"include_usage", "include_obfuscation"})  # the second is padding, which there is none of
CHAT = SAMPLING | ANSWER | {"messages", "tools", "tool_choice", "max_completion_tokens"}
CHAT |= {"chat_template_kwargs"}
COMPLETION = SAMPLING | ANSWER | {"prompt", "add_special_tokens", "empg"}
GENERATE = frozenset({"model", "token_ids", "sampling_params", "stream"})
MAX_CHOICES = 128
MAX_STOPS = 16


class ApiError(Exception):
    """A refused request, as the OpenAI wire tells it.

    Args:
      status: the HTTP status.
      message: what is wrong and what would be right.
      param: the key that is at fault.
      code: a short name of the cause.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refuse(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Make the error of a request that cannot be served as it is (status 400)."""
    return ApiError(400, message, param=param, code=code)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Refuse a request that cannot be read, for whatever reason: half a surrogate pair, an endless number."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise refuse(f"the request cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
      max_tokens: longest response; None takes all the room.
      temperature: 0 is greedy.
      token_filter: restricts sampling to likely tokens.
      seed: of the request; drawn where it gives none.
      n: responses.
      stops: stop strings.
      stop_ids: stop tokens besides the model's own.
      has_logprobs: whether the answer lists log-probabilities.
    """

    max_tokens: int | None
    temperature: float
    token_filter: TokenFilter
    seed: int
    n: int
    stops: tuple[str, ...]
    stop_ids: tuple[int, ...]
    has_logprobs: bool


def check_keys(
    body: Any, known: frozenset[str], where: str = "", *, ignored: frozenset[str] = IGNORED
) -> dict[str, Any]:
    """Return the keys that are given, without nulls; refuse unknown ones.

    Raises:
      ApiError: the body is no object, or has a key that this server does not know or cannot honor.
    """
    if not isinstance(body, dict):
        raise refuse(f"{where or 'the body'} must be a JSON object", where or None)
    given = {key: value for key, value in body.items() if value is not None}
    for key, value in given.items():
        if key in ignored:
            continue
        if key not in known:
            hint = nearest(key, known)
            raise refuse(
                f"{where}{'.' * bool(where)}{key} is not supported{hint}", key, "unsupported_parameter"
            )
        if key in NEUTRAL and not any(_equal(value, neutral) for neutral in NEUTRAL[key]):
            raise refuse(
                f"{where}{'.' * bool(where)}{key}={value!r} is not supported; leave it out, or use "
                f"{NEUTRAL[key][0]!r}",
                key,
                "unsupported_parameter",
            )
    return given


def read_sampling(
    given: Mapping[str, Any], vocab_size: int, *, default_max_tokens: int | None = None
) -> Sampling:
    """Read the sampling options of a checked body.

    Args:
      given: the options.
      vocab_size: number of tokens that there are.
      default_max_tokens: longest response where the options have none; None takes all the room.

    Raises:
      ApiError: an option has a wrong type or value.
    """
    temperature = _number(given, "temperature", 1.0)
    if not 0 <= temperature <= 100:
        raise refuse(f"temperature={temperature:g} must lie in [0, 100]", "temperature")
    limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    stops = given.get("stop", ())
    stops = (stops,) if isinstance(stops, str) else stops
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
        raise refuse("stop must be a text, or a list of texts that are not empty", "stop")
    if len(stops) > MAX_STOPS:
        raise refuse(f"stop has {len(stops)} texts; at most {MAX_STOPS} are searched for", "stop")
    logprobs = given.get("logprobs", False)
    if not isinstance(logprobs, bool) and logprobs not in (0, 1):
        raise refuse(
            f"logprobs={logprobs!r} is not supported: only the sampled token's are known; use true (or 1)",
            "logprobs",
        )
    return Sampling(
        max_tokens=_integer(given, limit, default_max_tokens, low=1),
        temperature=temperature,
        token_filter=_read_filter(given, vocab_size),
        seed=_integer(given, "seed", None) if "seed" in given else secrets.randbits(62),  # type: ignore[arg-type]
        n=_integer(given, "n", 1, low=1, high=MAX_CHOICES) or 1,
        stops=tuple(stops),
        stop_ids=tuple(read_ids(given.get("stop_token_ids", []), "stop_token_ids", vocab_size)),
        # 0 asks a completion for the sampled token's alone, which is what there is.
        has_logprobs=logprobs is not False,
    )


def _read_filter(given: Mapping[str, Any], vocab_size: int) -> TokenFilter:
    """Read ``top_p``, ``top_k`` and ``min_p``; a ``top_k`` of -1 keeps every token, as with vLLM."""
    top_k = _integer(given, "top_k", 0) or 0
    top_p, min_p = _number(given, "top_p", 1.0), _number(given, "min_p", 0.0)
    token_filter = TokenFilter(top_p, 0 if top_k == -1 else top_k, min_p)
    for name, value in token_filter._asdict().items():
        try:
            TokenFilter(**{name: value}).check(vocab_size)
        except ValueError as error:
            raise refuse(str(error), name) from None
    return token_filter


def read_ids(value: Any, where: str, vocab_size: int) -> list[int]:
    """Check a list of token ids.

    Raises:
      ApiError: it is no list of integers, or one is outside the vocabulary.
    """
    if not isinstance(value, list) or not all(type(index) is int for index in value):
        raise refuse(f"{where} must be a list of token ids", where)
    wrong = next((index for index in value if not 0 <= index < vocab_size), None)
    if wrong is not None:
        raise refuse(f"{where}: {wrong} is no token id; they lie in [0, {vocab_size})", where)
    return value


def read_key(given: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """Read ``empg.ids``: the four numbers that sampling keys are folded from, in place of a seed.

    Raises:
      ApiError: they are something else.
    """
    asked = given.get("empg")
    if asked is None:
        return None
    ids = check_keys(asked, frozenset({"ids"}), "empg").get("ids")
    if not isinstance(ids, list) or len(ids) != 4 or not all(type(n) is int and 0 <= n < 2**31 for n in ids):
        raise refuse("empg.ids must be four integers in [0, 2**31)", "empg")
    return ids[0], ids[1], ids[2], ids[3]


def read_flag(given: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """Read a boolean.

    Raises:
      ApiError: it is something else.
    """
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise refuse(f"{key} must be true or false", key)
    return value


def _integer(
    given: Mapping[str, Any], key: str, default: int | None, low: int = -(2**63), high: int = 2**63 - 1
) -> int | None:
    value = given.get(key, default)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise refuse(f"{key}={value!r} must be an integer in [{low}, {high}]", key)
    return value


def is_number(value: Any) -> bool:
    """Tell whether a value of JSON is a number that a float can hold."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer may be larger than any float
            return math.isfinite(value)
    return False


def _number(given: Mapping[str, Any], key: str, default: float) -> float:
    value = given.get(key, default)
    if not is_number(value):
        raise refuse(f"{key}={value!r:.80} must be a number", key)
    return float(value)


def _equal(value: Any, neutral: Any) -> bool:
    """Compare without taking true for 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
