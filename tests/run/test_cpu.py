"""The processor's time of a process and of all below it."""

import subprocess
import sys
import time

from empg_jax.run.cpu import PROC, cpu_seconds

BURN = "import time\nwhile time.process_time() < {seconds}: pass\nprint('done', flush=True)\ninput()"


def test_children_and_theirs_count_while_they_live_and_afterwards():
    inner = [sys.executable, "-c", BURN.format(seconds=0.5)]
    code = f"import subprocess, sys\nsys.exit(subprocess.run({inner!r}).returncode)"
    before = cpu_seconds()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        assert child.stdout.readline() == b"done\n"  # by the grandchild
        alive = cpu_seconds() - before
        child.communicate(b"\n")
    assert child.returncode == 0
    assert cpu_seconds() - before >= max(alive, 0.5) - 0.02
    assert alive >= 0.48 or not (PROC / "self" / "stat").exists()


def test_threads_count():
    before, own = cpu_seconds(), time.process_time()
    while time.process_time() - own < 0.1:
        pass
    assert cpu_seconds() - before >= 0.08
