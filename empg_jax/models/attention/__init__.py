"""Causal attention: packed rows for the learner, a KV cache for the engine.

``packed_attention`` has three back ends. Each is a pair of functions, ``forward`` and ``backward``. The
platform selects the back end when a program is lowered (`packed`):

==============  ==============================================================================  ===========
`tiles`         tiles of plain XLA operations: CPU, ROCm, and every shape the kernels refuse    any
`triton`        JAX's Pallas kernel with segments                                               CUDA
`splash`        JAX's splash kernel with segments and grouped heads                             TPU
==============  ==============================================================================  ===========

``trunk_attention`` is packed attention over rows in which segments share their beginning (`trunks`).

``sliced_attention`` is attention of a part of a row's queries, for more devices along time than heads.

``attend_rows`` writes new tokens into the engine's KV cache and attends over it (``cached_attention``). Its
decode step uses a Pallas kernel, which reads only the filled part of the cache, on GPUs (`ragged`) and TPUs
(`tpu`), a prefill on TPUs (`prefill`); all else is two dense products (`cached`). ``attend_pages`` is the
same over pages of a pool (`paged`). On TPUs narrow heads of the cache are `joined`.

`reference` is the dense definition that every back end must equal. ``model.attention=xla`` turns the kernels
of packed attention off.

The tests run the kernels on a CPU in interpreted mode. ``scripts/compile_ahead.py`` compiles them for
both platforms without a device. The GPU kernels are measured on an H100 (``scripts/README.md``,
``scripts/bench_attention.py``); the TPU kernels have not run on a TPU yet.

Shapes: queries ``[B, T, H, d]``, keys and values ``[B, T, K, d]`` with ``H = K * G`` query heads in groups of
``G`` per key/value head. The softmax is computed in float32 for every input type.
"""

from empg_jax.models.attention.cached import attend_rows as attend_rows
from empg_jax.models.attention.cached import cached_attention as cached_attention
from empg_jax.models.attention.packed import BACKENDS as BACKENDS
from empg_jax.models.attention.packed import SAVED as SAVED
from empg_jax.models.attention.packed import is_fusible as is_fusible
from empg_jax.models.attention.packed import packed_attention as packed_attention
from empg_jax.models.attention.paged import attend_pages as attend_pages
from empg_jax.models.attention.reference import reference_attention as reference_attention
from empg_jax.models.attention.sliced import sliced_attention as sliced_attention
from empg_jax.models.attention.trunks import Segments as Segments
from empg_jax.models.attention.trunks import trunk_attention as trunk_attention
