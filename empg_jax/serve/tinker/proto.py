"""The protobuf messages of the wire, built from a table of names and field numbers.

Only what this server reads and writes is listed; protobuf skips the fields that it does not know. Two fields
of a sampled sequence are our own (see `codec.encode_samples`): clients that do not know them skip them.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError as DecodeError

_PACKAGE = "empg_tinker"
# Message -> its fields, as "number name type"; "*" marks a list, "?" an optional one, "{}" a map from names.
_MESSAGES: dict[str, tuple[str, ...]] = {
    "SparseCsr": ("1 values bytes", "2 crow_indices bytes", "3 col_indices bytes"),
    "Tensor": ("1 dense bytes?", "2 sparse_csr SparseCsr", "3 dtype int32", "4 shape int64*"),
    "EncodedText": ("1 tokens bytes",),
    "Other": (),
    "Chunk": ("1 encoded_text EncodedText", "2 image Other", "3 dmel Other"),
    "Datum": ("1 model_input Chunk*", "2 loss_fn_inputs Tensor{}"),
    "ConfigValue": ("1 number double?", "2 text string?"),
    "ForwardBackwardRequest": (
        "1 model_id string",
        "2 seq_id int32",
        "3 data Datum*",
        "4 loss_fn string",
        "5 loss_fn_config double{}",
        "6 forward_only bool",
        "7 loss_fn_config_v2 ConfigValue{}",
    ),
    "BatchedTensor": ("1 data bytes", "2 offsets bytes", "3 dtype int32", "4 trailing_shape int64*"),
    "ArrayRecord": ("1 type_tag string", "2 fields BatchedTensor{}", "3 num_datums int64"),
    "ForwardBackwardOutput": (
        "1 loss_fn_output_type string",
        "2 loss_fn_outputs ArrayRecord*",
        "3 metrics double{}",
    ),
    "SampledSequence": (
        "1 stop_reason int32",
        "2 tokens bytes",
        "3 logprobs bytes?",
        "101 empg_entropies bytes",
        "102 empg_versions bytes",
    ),
    "SampleResponse": (
        "1 sequences SampledSequence*",
        "2 prompt_logprobs bytes?",
        "4 prompt_cache_hit_tokens int32",
    ),
}
_SCALARS = ("bool", "bytes", "double", "int32", "int64", "string")


def message(name: str) -> Any:
    """Make an empty message, for example ``message("ForwardBackwardRequest")``."""
    return _classes()[name]()


@functools.cache
def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        described = file.message_type.add(name=name)
        for field in fields:
            _add_field(described, name, *field.split())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


def _add_field(described: Any, owner: str, number: str, name: str, kind: str) -> None:
    proto = descriptor_pb2.FieldDescriptorProto
    base = kind.rstrip("*?{}")
    field = described.field.add(name=name, number=int(number))
    field.label = proto.LABEL_REPEATED if kind.endswith(("*", "{}")) else proto.LABEL_OPTIONAL
    if kind.endswith("{}"):
        entry = described.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, f"{owner}.{entry.name}", "1", "key", "string")
        _add_field(entry, f"{owner}.{entry.name}", "2", "value", base)
        field.type, field.type_name = proto.TYPE_MESSAGE, f".{_PACKAGE}.{owner}.{entry.name}"
    elif base in _SCALARS:
        field.type = getattr(proto, f"TYPE_{base.upper()}")
    else:
        field.type, field.type_name = proto.TYPE_MESSAGE, f".{_PACKAGE}.{base}"
    if kind.endswith("?"):
        # Presence of a scalar: protobuf wants a group of one for it.
        field.proto3_optional, field.oneof_index = True, len(described.oneof_decl)
        described.oneof_decl.add(name=f"_{name}")
