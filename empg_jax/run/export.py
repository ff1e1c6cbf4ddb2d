"""Export of a run's policy for other programs: a whole Hugging Face model, or an adapter for PEFT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from empg_jax.errors import ConfigError, UserError, writing
from empg_jax.files import try_folder
from empg_jax.hf.config import read_hf_config
from empg_jax.hf.hub import find_folder
from empg_jax.hf.peft import save_adapter
from empg_jax.hf.save import MAX_SHARD_BYTES, save_hf
from empg_jax.models.lora import merge
from empg_jax.run.process import prepare_jax
from empg_jax.run.saved import SavedRun, open_saved
from empg_jax.types import Params


class ExportError(UserError):
    """The requested export is impossible; nothing was written."""


def export_run(
    run: Path,
    out: Path,
    *,
    adapter: bool = False,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the newest policy of a run (or that of ``RUN/checkpoints/STEP``).

    Args:
      run: run folder, or a step's folder inside its ``checkpoints``.
      out: output folder; must not exist or be empty.
      adapter: write the adapter alone; else the whole model, with its adapter merged in.
      dtype: type of the weights in the files; default ``model.param_dtype``, float32 for adapters.
      overrides: dotted overrides of the run's configuration (for example ``mesh.fsdp=1``).
      max_shard_bytes: size at which files of weights are split.
      say: receives messages for the user.

    Returns:
      The folder.

    Raises:
      CheckpointError: there is no usable checkpoint.
      ConfigError: the folder cannot be written.
      ExportError: the folder is not empty, the run has no adapter, or no Hugging Face family describes its
        model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is not empty: export into a new folder")
    with writing(f"--out {out}", ConfigError):
        try_folder(out)
    saved = open_saved(run, overrides, warn=say)
    prepare_jax(saved.config)  # adapters are added with the precision of training
    try:
        if adapter:
            _write_adapter(saved, out, dtype, say)
        else:
            _write_model(saved, out, dtype, max_shard_bytes)
    except (FileExistsError, ValueError) as error:
        raise ExportError(str(error)) from error
    if "value_head" in saved.params:
        say("the critic's value head was left out: it is no part of the policy")
    # AutoTokenizer chooses by the model's family, which is wrong for the two built-in tokenizers.
    words = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if words["type"] == "WordLevel" or not words.get("merges", True):
        origin = "was built for the environment" if words["type"] == "WordLevel" else "has a token per byte"
        say(
            f"the tokenizer {origin}: read it with transformers.PreTrainedTokenizerFast, "
            "because AutoTokenizer would load Qwen's own tokenizer for a Qwen2 model"
        )
    kind = "adapter" if adapter else "model"
    say(f"{kind} of step {saved.step} written to {out}")
    if saved.config.model.path is not None:
        say(f"the policy's fingerprint: {saved.text_logprob():.4f} nats per token on a fixed text")
    return out


def _write_model(saved: SavedRun, out: Path, dtype: str | None, max_shard_bytes: int) -> None:
    model, path = saved.model, saved.config.model.path
    stored = jnp.dtype(dtype or model.param_dtype)
    params = saved.params
    if saved.base is not None and model.lora is not None:
        params = merge(saved.base, params, model.lora.scale, stored)
    save_hf(
        _cast(params, stored),
        dataclasses.replace(model, param_dtype=stored),
        out,
        saved.language.tokenizer,
        base_config=None if path is None else read_hf_config(find_folder(path, ["config.json"], "model")),
        max_shard_bytes=max_shard_bytes,
    )


def _cast(params: Params, dtype: jnp.dtype) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _write_adapter(saved: SavedRun, out: Path, dtype: str | None, say: Callable[[str], None]) -> None:
    config = saved.config.model
    if saved.model.lora is None:
        raise ExportError(
            "this run trained every parameter (model.lora.rank=0): it has no adapter; use --merged"
        )
    if config.path is None:
        raise ExportError(
            "the base of this run was made at random, so an adapter alone is of no use: export the whole "
            "model (--merged)"
        )
    if config.quantize != "none":
        say(f"the adapter was trained on {config.quantize} weights: on others its log-probs differ a little")
    save_adapter(
        saved.params,
        saved.model.lora,
        out,
        base_path=config.path,
        tokenizer=saved.language.tokenizer,
        dtype=jnp.dtype(dtype or "float32"),
    )
