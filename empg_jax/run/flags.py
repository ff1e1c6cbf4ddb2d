"""Flags of XLA by platform, which the command line sets before JAX starts; nothing here loads JAX.

They overlap the exchange between devices with computation. XLA ends a process that has a flag which it does
not know, so that only names that stand in the installed libraries are set. Flags of the user's win.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import mmap
import os
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of accelerator.

    Attributes:
      name: as in ``JAX_PLATFORMS``.
      devices: patterns of the device files that show that it is here.
      least: devices from which on the flags are of use.
      variable: environment variable that takes the flags.
      libraries: ``(package, pattern)`` of the files that read them; each has to know a flag.
      flags: value by name.
    """

    name: str
    devices: tuple[str, ...]
    least: int
    variable: str
    libraries: tuple[tuple[str, str], ...]
    flags: dict[str, str]


_COMBINED = str(128 * 2**20)  # bytes of one exchange: about the weights of one layer
GPU = Kind(
    name="cuda",
    devices=("nvidia[0-9]*",),
    least=2,  # one device exchanges nothing
    variable="XLA_FLAGS",
    libraries=(("jaxlib", "libjax_common.so"), ("jax_plugins", "xla_cuda1*/xla_cuda_plugin.so")),
    flags={
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        "xla_gpu_all_gather_combine_threshold_bytes": _COMBINED,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": _COMBINED,
        "xla_gpu_all_reduce_combine_threshold_bytes": _COMBINED,
        "xla_gpu_enable_pipelined_all_gather": "true",
        "xla_gpu_enable_pipelined_reduce_scatter": "true",
        "xla_gpu_enable_pipelined_all_reduce": "true",
    },
)
TPU = Kind(
    name="tpu",
    devices=("accel[0-9]*", "vfio/[0-9]*"),
    least=1,
    variable="LIBTPU_INIT_ARGS",
    libraries=(("libtpu", "libtpu.so"),),
    flags={
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_gather": "true",
    },
)


def set_flags(environment: MutableMapping[str, str] | None = None, devices: Path = Path("/dev")) -> None:
    """Set the flags of the accelerators that are here and that JAX may use.

    Args:
      environment: variables to read and change; default the process's.
      devices: folder of the device files.
    """
    environment = os.environ if environment is None else environment
    for kind in (GPU, TPU):
        if _is_used(kind, environment, devices):
            given = environment.get(kind.variable, "")
            ours = choose_flags(kind, given, _find_libraries(kind))
            if ours:
                environment[kind.variable] = " ".join([*ours, given]).strip()


def _is_used(kind: Kind, environment: MutableMapping[str, str], devices: Path) -> bool:
    asked = environment.get("JAX_PLATFORMS", "").replace("gpu", "cuda").split(",")
    if asked != [""] and kind.name not in asked:
        return False
    return sum(1 for pattern in kind.devices for _ in devices.glob(pattern)) >= kind.least


def choose_flags(kind: Kind, given: str, libraries: Iterable[Path]) -> list[str]:
    """Return the flags of a platform that the user has not given and that all of its libraries know.

    Args:
      kind: the platform.
      given: the user's flags.
      libraries: files that read the flags; without any, no flag is known.
    """
    libraries = list(libraries)
    theirs = {word.lstrip("-").partition("=")[0] for word in given.split()}
    known = [set(_find_names(library, kind.flags)) for library in libraries]
    return [
        f"--{name}={value}"
        for name, value in kind.flags.items()
        if name not in theirs and known and all(name in names for names in known)
    ]


def _find_libraries(kind: Kind) -> list[Path]:
    """Find the files that read the flags, without importing them; none where one of them is missing."""
    found: list[Path] = []
    for package, pattern in kind.libraries:
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations or () if spec is not None else ()
        files = [path for folder in folders for path in Path(folder).glob(pattern)]
        if not files:
            return []
        found += files
    return found


def _find_names(library: Path, names: Iterable[str]) -> Iterator[str]:
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield from (name for name in names if content.find(name.encode()) >= 0)


def tell_flags() -> str:
    """Say which flags this process runs with."""
    variables = (GPU.variable, TPU.variable)
    told = [f"{name}={os.environ[name]}" for name in variables if os.environ.get(name)]
    return "; ".join(told) or "none set (on a CPU, or a single GPU, none is of use)"
