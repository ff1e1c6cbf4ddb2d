"""Does the update scale? Work of each device in the compiled program, for 1 to 256 fake devices.

    python scripts/scaling.py --out scaling.json
    python scripts/scaling.py --presets qwen2.5-7b --devices 1 8 --meshes fsdp

Each device keeps the same number of tokens while devices are added. The program is compiled from shapes alone
at two depths with its layers written out; the work of the full depth follows from the difference, since all
layers are alike. It is the work of one micro-batch. Collectives count the bytes of their results. The
compiler is the CPU's: it sends whole gradients (all-reduce) where accelerators scatter them, and float32
where they send bfloat16.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from empg_jax.hf.presets import PRESETS

HERE = Path(__file__).parent
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SHALLOW, DEEP = 2, 4
# How the devices beyond ``fsdp`` are used; an axis has at most this many.
MESHES = {
    "fsdp": {},
    "fsdp x tensor": {"tensor": 4},
    "fsdp x sequence": {"sequence": 4},
    "data x fsdp": {"data": 4},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--presets", nargs="+", default=["qwen2.5-7b", "qwen2.5-32b"])
parser.add_argument("--devices", nargs="+", type=int, default=[1, 8, 64, 256])
parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
parser.add_argument("--tokens", type=int, default=1024, help="tokens of each device")
parser.add_argument("--out", help="also write the JSON here")


def split(devices: int, kind: str) -> dict[str, int]:
    """The mesh of this many devices."""
    others = {axis: min(size, devices) for axis, size in MESHES[kind].items()}
    return {**others, "fsdp": devices // math.prod(others.values())}


def count(preset: str, mesh: dict[str, int], tokens: int, layers: int) -> dict:
    """The work of a program with so many layers."""
    together = mesh.get("tensor", 1) * mesh.get("sequence", 1)  # devices that share a row
    rows = mesh["fsdp"] * mesh.get("data", 1)
    request = {"preset": preset, "mesh": mesh, "rows": rows, "length": tokens * together}
    flags = f"--xla_force_host_platform_device_count={math.prod(mesh.values())} {QUICKLY}"
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "compile_update.py"),
            json.dumps(request | {"num_layers": layers, "scan_layers": False}),
        ],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{preset} on {mesh}: {done.stderr[-500:]}")
    found = json.loads(done.stdout)
    return {"flops": found["flops"], "bytes": found["bytes"], "sent": sum(found["sent"].values())}


def measure(preset: str, devices: int, kind: str, tokens: int) -> dict:
    """One line of the table."""
    mesh, start = split(devices, kind), time.perf_counter()
    shallow, deep = (count(preset, mesh, tokens, layers) for layers in (SHALLOW, DEEP))
    line = {"preset": preset, "devices": devices, "kind": kind, "mesh": mesh, "tokens": tokens}
    for name in shallow:
        each = (deep[name] - shallow[name]) / (DEEP - SHALLOW)
        line[f"{name}_per_layer"] = each
        line[name] = shallow[name] + each * (PRESETS[preset]["num_layers"] - SHALLOW)
    return line | {"seconds": round(time.perf_counter() - start, 1)}


def show(lines: list[dict]) -> None:
    """The table, relative to eight devices of the same kind."""
    print("Of each device, for one layer; beside it the ratio to eight devices.\n")
    print("| model | devices | mesh | Tflop | | GB | | GB exchanged | |")
    print("|---|---|---|---|---|---|---|---|---|")
    base = {(line["preset"], line["kind"]): line for line in lines if line["devices"] == 8}
    for line in lines:
        mesh = " x ".join(f"{axis}={size}" for axis, size in line["mesh"].items() if size > 1) or "one device"
        cells = [line["preset"], str(line["devices"]), mesh]
        first = base.get((line["preset"], line["kind"]))
        for name, unit in (("flops", 1e12), ("bytes", 1e9), ("sent", 1e9)):
            each = line[f"{name}_per_layer"]
            cells.append(f"{each / unit:.3f}")
            cells.append(
                f"{each / first[f'{name}_per_layer']:.3f}" if first and first[f"{name}_per_layer"] else ""
            )
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Compile every program, print the table."""
    args = parser.parse_args()
    lines = []
    for preset in args.presets:
        for kind in args.meshes:
            for devices in args.devices:
                if devices == 1 and kind != "fsdp":
                    continue
                lines.append(measure(preset, devices, kind, args.tokens))
                print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
                if args.out:
                    Path(args.out).write_text(json.dumps(lines, indent=1))
    show(lines)


if __name__ == "__main__":
    main()
