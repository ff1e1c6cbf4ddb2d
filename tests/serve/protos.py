"""Batches of the training API in protobuf."""

import numpy as np

from empg_jax.serve.tinker.proto import message


def as_proto(model, seq, data, loss):
    """The same batch in protobuf."""
    body = message("ForwardBackwardRequest")
    body.model_id, body.seq_id, body.loss_fn = model, seq, loss
    for item in data:
        made = body.data.add()
        tokens = item["model_input"]["chunks"][0]["tokens"]
        made.model_input.add().encoded_text.tokens = np.array(tokens, np.int32).tobytes()
        for name, values in item["loss_fn_inputs"].items():
            field = made.loss_fn_inputs[name]
            field.dense = np.array(values["data"], values["dtype"]).tobytes()
            field.dtype = 1 if values["dtype"] == "float32" else 2
            field.shape.extend(values["shape"])
    return body.SerializeToString()
