"""Batches and results between the wire and arrays, in protobuf and in JSON.

The official client sends and reads protobuf. Everyone else may send a batch as JSON, and gets results as JSON
where the request does not accept protobuf. A tensor in JSON is ``{"data": [...], "dtype": "int64" or
"float32", "shape": [...]}``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from empg_jax.engine.engine import Response
from empg_jax.serve.answers import as_floats, describe_statistics
from empg_jax.serve.tinker.proto import DecodeError, message
from empg_jax.serve.wire import refuse

FLOAT, INT = 1, 2  # numbers of the wire's types
_TYPES: dict[int, np.dtype] = {FLOAT: np.dtype(np.float32), INT: np.dtype(np.int64), 3: np.dtype(np.int32)}
_NAMES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "int64": np.dtype(np.int64)}
_STOP_REASONS = {"stop": 0, "length": 1}


@dataclasses.dataclass(frozen=True)
class Datum:
    """One example: the tokens that the model reads, and what the loss reads, by name."""

    tokens: np.ndarray  # int32[N]
    inputs: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Envelope:
    """A batch whose address could be read; `Envelope.open` reads the rest.

    Attributes:
      model_id: the model that it is for.
      seq_id: its place among the model's requests, from 1.
      loss_fn: name of the loss.
      config: the loss's settings.
      forward_only: whether no gradient is wanted.
      content: the examples as the wire has them.
    """

    model_id: str
    seq_id: int
    loss_fn: str
    config: dict[str, float | str]
    forward_only: bool
    content: Any

    def open(self) -> list[Datum]:
        """Read the examples.

        Raises:
          ApiError: one of them is malformed; the message names it.
        """
        if not self.content:
            raise refuse("the batch has no datum")
        read = _datum_of_json if isinstance(self.content, list) else _datum_of_proto
        return [read(item, f"datum {i}") for i, item in enumerate(self.content)]


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """What a forward pass gives back: arrays for each datum, and metrics named ``name:reduction``."""

    outputs: list[dict[str, np.ndarray]]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """Sampled responses to one prompt; NaN where a prompt token has no log-probability."""

    responses: list[Response]
    cached: int
    prompt_logprobs: np.ndarray | None = None


# ---------------------------------------------------------------------------------------- requests


def read_proto(body: bytes) -> Envelope:
    """Read a protobuf batch.

    Raises:
      ApiError: it is malformed.
    """
    asked = message("ForwardBackwardRequest")
    try:
        asked.ParseFromString(body)
    except DecodeError as error:
        raise refuse(f"the body is not a ForwardBackwardRequest in protobuf: {error}") from None
    config: dict[str, float | str] = dict(asked.loss_fn_config)
    for key, value in asked.loss_fn_config_v2.items():
        config[key] = value.text if value.HasField("text") else value.number
    return Envelope(asked.model_id, asked.seq_id, asked.loss_fn, config, asked.forward_only, asked.data)


def read_json(body: Any) -> Envelope:
    """Read a batch in JSON.

    Raises:
      ApiError: it is malformed.
    """
    given = body if isinstance(body, dict) else {}
    asked = given.get("forward_backward_input")
    if not isinstance(asked, dict) or not isinstance(asked.get("data"), list):
        raise refuse("the body must be an object with forward_backward_input: {data: [...], loss_fn: ...}")
    config = asked.get("loss_fn_config") or {}
    if not isinstance(config, dict) or not all(
        isinstance(value, str | int | float) for value in config.values()
    ):
        raise refuse("loss_fn_config must be an object of numbers and texts")
    model_id, seq_id = read_address(given)
    forward_only = given.get("forward_only") is True
    return Envelope(model_id, seq_id, str(asked.get("loss_fn")), config, forward_only, asked["data"])


def read_address(given: Mapping[str, Any]) -> tuple[str, int]:
    """Read the model and the sequence number of a request in JSON.

    Raises:
      ApiError: one of them is missing.
    """
    model_id, seq_id = given.get("model_id"), given.get("seq_id")
    if not isinstance(model_id, str):
        raise refuse("model_id is missing", "model_id")
    if type(seq_id) is not int:
        raise refuse("seq_id is missing: requests of a model are numbered from 1", "seq_id")
    return model_id, seq_id


def read_chunks(chunks: Any, where: str) -> np.ndarray:
    """Read the tokens of a ``ModelInput`` in JSON.

    Raises:
      ApiError: it holds something else than token ids.
    """
    given = chunks.get("chunks") if isinstance(chunks, dict) else None
    if not isinstance(given, list):
        raise refuse(f'{where} must be {{"chunks": [{{"type": "encoded_text", "tokens": [...]}}]}}')
    tokens: list[int] = []
    for chunk in given:
        found = chunk.get("tokens") if isinstance(chunk, dict) else None
        if not isinstance(found, list) or not all(type(token) is int for token in found):
            raise refuse(f"{where}: only chunks of token ids (encoded_text) are supported")
        tokens += found
    if any(not 0 <= token < 2**31 for token in tokens):
        raise refuse(f"{where}: a token id is negative or too large")
    return np.asarray(tokens, np.int32)


def _datum_of_proto(item: Any, where: str) -> Datum:
    pieces = []
    for chunk in item.model_input:
        if not chunk.HasField("encoded_text"):
            raise refuse(f"{where}: only chunks of token ids (encoded_text) are supported")
        pieces.append(_numbers(chunk.encoded_text.tokens, np.dtype(np.int32), f"{where}: model_input"))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    return Datum(tokens, {name: _tensor(t, f"{where}: {name}") for name, t in item.loss_fn_inputs.items()})


def _tensor(tensor: Any, where: str) -> np.ndarray:
    if tensor.HasField("sparse_csr"):
        raise refuse(f"{where}: sparse tensors are not supported; send it dense")
    if tensor.dtype not in _TYPES:
        raise refuse(f"{where}: type {tensor.dtype} is not supported; use float32 or int64")
    values = _numbers(tensor.dense, _TYPES[tensor.dtype], where)
    return _shaped(values, list(tensor.shape) or [len(values)], where)


def _numbers(data: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise refuse(f"{where}: {len(data)} bytes are no whole number of {dtype} values")
    return np.frombuffer(data, dtype)


def _datum_of_json(item: Any, where: str) -> Datum:
    inputs = item.get("loss_fn_inputs") if isinstance(item, dict) else None
    if not isinstance(inputs, dict):
        raise refuse(f"{where} must be an object with model_input and loss_fn_inputs")
    tokens = read_chunks(item.get("model_input"), f"{where}: model_input")
    return Datum(tokens, {name: _json_tensor(t, f"{where}: {name}") for name, t in inputs.items()})


def _json_tensor(tensor: Any, where: str) -> np.ndarray:
    if not isinstance(tensor, dict) or tensor.get("dtype") not in _NAMES:
        raise refuse(f'{where} must be {{"data": [...], "dtype": "float32" or "int64", "shape": [...]}}')
    dtype = _NAMES[tensor["dtype"]]
    kinds, numbers = ("bi", "integers") if dtype.kind == "i" else ("biuf", "numbers")
    try:
        found = np.asarray(tensor.get("data")).reshape(-1)
    except ValueError:  # lists of different lengths
        found = np.asarray([None])
    if found.size and found.dtype.kind not in kinds:
        raise refuse(f"{where}: data must be a list of {numbers}, as its dtype is {dtype}")
    with np.errstate(over="ignore"):  # whoever needs finite numbers looks for them
        values = found.astype(dtype)
    return _shaped(values, tensor.get("shape") or [len(values)], where)


def _shaped(values: np.ndarray, shape: Any, where: str) -> np.ndarray:
    sizes = shape if isinstance(shape, list) else []
    if not all(type(size) is int and size >= 0 for size in sizes) or math.prod(sizes) != len(values):
        raise refuse(f"{where}: {len(values)} values do not have the shape {shape}")
    return values.reshape(sizes)


# ----------------------------------------------------------------------------------------- results


def encode_batch(result: BatchResult) -> bytes:
    """Encode the result of a batch in protobuf."""
    answer = message("ForwardBackwardOutput")
    answer.loss_fn_output_type = "ArrayRecord"
    answer.metrics.update(result.metrics)
    record = answer.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(result.outputs))
    for name in result.outputs[0]:
        arrays = [np.asarray(output[name], np.float32) for output in result.outputs]
        field = record.fields[name]
        field.data, field.dtype = np.concatenate(arrays).tobytes(), FLOAT
        field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64).tobytes()
    return bytes(answer.SerializeToString())


def describe_batch(result: BatchResult) -> dict[str, Any]:
    """Return the result of a batch as JSON."""
    outputs = [
        {
            name: {"data": _with_gaps(values), "dtype": "float32", "shape": list(values.shape)}
            for name, values in output.items()
        }
        for output in result.outputs
    ]
    metrics = finite(result.metrics)
    return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": metrics}


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out the metrics that JSON cannot hold: NaN and infinities."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def encode_samples(result: SampleResult) -> bytes:
    """Encode sampled responses in protobuf; fields 101 and 102 are our entropies and weight versions."""
    answer = message("SampleResponse")
    answer.prompt_cache_hit_tokens = result.cached
    if result.prompt_logprobs is not None:
        answer.prompt_logprobs = result.prompt_logprobs.astype(np.float32).tobytes()
    for response in result.responses:
        answer.sequences.add(
            stop_reason=_STOP_REASONS[response.finish_reason],
            tokens=response.tokens.astype(np.int32).tobytes(),
            logprobs=response.logprobs.astype(np.float32).tobytes(),
            empg_entropies=response.entropies.astype(np.float32).tobytes(),
            empg_versions=response.versions.astype(np.int32).tobytes(),
        )
    return bytes(answer.SerializeToString())


def describe_samples(result: SampleResult) -> dict[str, Any]:
    """Return sampled responses as JSON, with our statistics in ``empg`` as the other routes have it."""
    sequences = [
        {
            "stop_reason": response.finish_reason,
            "tokens": response.tokens.tolist(),
            "logprobs": as_floats(response.logprobs),
            "empg": describe_statistics(response),
        }
        for response in result.responses
    ]
    return {
        "type": "sample",
        "sequences": sequences,
        "prompt_logprobs": _with_gaps(result.prompt_logprobs),
        "prompt_cache_hit_tokens": result.cached,
    }


def _with_gaps(values: np.ndarray | None) -> Sequence[float | None] | None:
    """Write what JSON does not have, NaN and infinities, as null."""
    if values is None:
        return None
    return [value if math.isfinite(value) else None for value in as_floats(values)]
