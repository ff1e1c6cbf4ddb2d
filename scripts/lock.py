"""Write scripts/constraints.txt: the versions that a fresh installation with the extra ``test`` gets.

    python scripts/lock.py python3.11 python3.12
    python scripts/lock.py python3.11 python3.12 --keep    # keeps the versions that the file has already

Each interpreter's pip resolves for itself; where they differ, lines have markers. `scripts/venv.sh` installs
with these versions (EMPG_CONSTRAINTS=none takes the newest that pyproject.toml allows).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "scripts" / "constraints.txt"
EXTRAS = "test"
HEADER = "# Versions of the quickstart and of the tests, written by scripts/lock.py; see there.\n"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreters with pip")
parser.add_argument("--keep", action="store_true", help="change no version that the file has")
parser.add_argument("--like", type=Path, metavar="FILE", help="take versions from these constraints first")


def resolve(python: str, constraints: list[Path]) -> tuple[str, dict[str, str]]:
    """Return an interpreter's version, and the version of every package that would be installed."""
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--quiet", "--dry-run", "--ignore-installed", "--disable-pip-version-check"]
        limits = [word for path in constraints for word in ("--constraint", str(path))]
        command = [python, "-m", "pip", "install", *options, "--report", str(report), *limits]
        subprocess.run([*command, f"{ROOT}[{EXTRAS}]"], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return version, {item["name"].lower().replace("_", "-"): item["version"] for item in found}


def merge(resolved: dict[str, dict[str, str]]) -> str:
    """Format one line per package; one per version of Python where they differ."""
    lines = []
    for name in sorted(set().union(*resolved.values()) - {"empg-jax"}):
        versions = {python: packages[name] for python, packages in resolved.items() if name in packages}
        if len(set(versions.values())) == 1 and len(versions) == len(resolved):
            lines.append(f"{name}=={next(iter(versions.values()))}")
        else:
            lines += [f'{name}=={v} ; python_version == "{python}"' for python, v in versions.items()]
    return HEADER + "\n".join(lines) + "\n"


def main() -> None:
    given = parser.parse_args()
    constraints = [path for path in (given.like, FILE if given.keep else None) if path is not None]
    resolved = dict(resolve(python, constraints) for python in given.pythons)
    FILE.write_text(merge(resolved), encoding="utf-8")
    print(
        f"{FILE}: {sum(map(len, resolved.values()))} versions for Python {', '.join(resolved)}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
