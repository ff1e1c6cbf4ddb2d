"""A stand-in for the docker program: it records its calls, and runs commands in cages over folders."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cages import need_cages

PYTHON = os.path.realpath(sys.executable)
PYTEST = f"{sys.executable} -m pytest"  # of the tests' own environment
# `run` copies an image's folder; `exec` runs in a cage of its own over that copy; `pull` asks a registry.
FAKE = """#!{python} -I
import json, os, shutil, subprocess, sys
home, argv = {home!r}, sys.argv[1:]
with open(home + "/calls.jsonl", "a") as log:
    log.write(json.dumps(argv) + "\\n")
if os.path.exists(home + "/stuck") and argv[0] in open(home + "/stuck").read().split():
    import time
    time.sleep(60)

def folder_of(image):
    return home + "/images/" + image.replace("/", "%")

def get(url):
    import urllib.request
    accept = {{"Accept": "application/vnd.docker.distribution.manifest.v2+json"}}
    return urllib.request.urlopen(urllib.request.Request(url, headers=accept), timeout=60).read()

def pull(image):
    import io, tarfile
    host, _, rest = image.partition("/")
    name, _, tag = rest.rpartition(":")
    base = "http://" + host + "/v2/" + name
    os.makedirs(folder_of(image))
    for layer in json.loads(get(base + "/manifests/" + tag))["layers"]:
        data = get(base + "/blobs/" + layer["digest"])
        tarfile.open(fileobj=io.BytesIO(data)).extractall(folder_of(image), filter="fully_trusted")

if argv[0] == "run":
    image = argv[argv.index("-c") - 1]
    if image == "broken":
        sys.exit("Unable to find image")
    whole = folder_of(image) + "/testbed"
    box = home + "/box/" + argv[argv.index("--name") + 1]
    shutil.copytree(whole if os.path.isdir(whole) else home + "/image", box + "/testbed", symlinks=True)
    os.makedirs(box + "/tmp")
    if os.path.exists(home + "/half"):
        sys.exit("started half of it")
    with open(box + "/how", "w") as how:
        json.dump(argv, how)
elif argv[0] == "commit":
    shutil.copytree(home + "/box/" + argv[1] + "/testbed", folder_of(argv[2]) + "/testbed", symlinks=True)
elif argv[0] == "rm":
    shutil.rmtree(f"{{home}}/box/{{argv[-1]}}")
elif argv[0] == "rmi":
    if not os.path.isdir(folder_of(argv[-1])) and "--force" not in argv:
        sys.exit("Error: no such image")
    shutil.rmtree(folder_of(argv[-1]), ignore_errors=True)
elif argv[0] == "pull":
    try:
        pull(argv[-1])
    except Exception as error:
        sys.exit("Error: cannot pull: " + str(error))
elif argv[:2] == ["image", "inspect"]:
    sys.exit(0 if os.path.isdir(folder_of(argv[-1])) else "Error: no such image")
elif argv[0] == "version":
    sys.exit("Cannot connect to the Docker daemon" if os.path.exists(home + "/dead") else 0)
elif os.path.exists(home + "/dead"):
    sys.exit("Cannot connect to the Docker daemon")
elif argv[0] == "inspect":
    if not os.path.isdir(home + "/box/" + argv[-1]):
        sys.exit("Error: no such container")
    print("a warning", file=sys.stderr, flush=True)
    print("true")
elif argv[0] == "ps":
    print(open(home + "/ps").read(), end="")
elif argv[0] == "images":
    names = [name.replace("%", "/") for name in os.listdir(home + "/images")]
    print("\\n".join(name for name in names if name.startswith(argv[1] + ":")))
elif argv[0] == "exec":
    if "HANG" in argv[-1]:
        import time
        time.sleep(30)
    place = next(i for i, word in enumerate(argv) if word.startswith("empg-jax-"))
    box = f"{{home}}/box/{{argv[place]}}"
    how = json.load(open(box + "/how"))
    cage = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr", "--proc", "/proc"]
    cage += ["--ro-bind", {prefix!r}, {prefix!r}]
    cage += ["--dev", "/dev", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"]
    cage += ["--symlink", "usr/lib64", "/lib64", "--bind", box + "/tmp", "/tmp", "--setenv", "HOME", "/tmp"]
    cage += ["--ro-bind" if "--read-only" in how else "--bind", box + "/testbed", "/testbed"]
    for word, value in zip(how, how[1:]):
        if word == "--volume":
            cage += ["--bind", box + "/testbed", "/testbed"] if value.endswith("/.") else ["--tmpfs", value]
    cage += ["--ro-bind", {venv!r}, {venv!r}]  # last, as it may lie in /tmp
    sys.exit(subprocess.run([*cage, "--chdir", "/testbed", *argv[place + 1 :]]).returncode)
else:
    sys.exit("the stand-in has no command " + argv[0])
"""


def make_repository(folder: Path, files: Mapping[str, str]) -> None:
    """Make a git repository with one commit, as an image's /testbed."""
    if shutil.which("git") is None:
        pytest.fail("the image needs git")
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm base"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)


def make_stand_in(home: Path) -> Path:
    """Write the program into a folder, where it also keeps its state."""
    need_cages()
    (home / "images").mkdir()
    (home / "ps").write_text("")
    program = home / "docker"
    text = FAKE.format(python=sys.executable, home=str(home), prefix=sys.base_prefix, venv=sys.prefix)
    program.write_text(text)
    program.chmod(0o755)
    return program


def calls(docker: Path) -> list[list[str]]:
    """Return the calls so far."""
    return [json.loads(line) for line in (docker.parent / "calls.jsonl").read_text().splitlines()]
