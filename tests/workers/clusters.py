"""Ray clusters for tests: every node on this machine, started by a process of its own, as Ray forks."""

import contextlib
import subprocess
import sys

SCRIPT = """
import logging, sys
from ray.cluster_utils import Cluster
logging.getLogger("ray").setLevel(logging.CRITICAL)
cluster = Cluster()
nodes = [cluster.add_node(num_cpus=4, resources={f"node{n}": 4}, include_dashboard=False,
                          object_store_memory=100 << 20) for n in range(int(sys.argv[1]))]
print("at", cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes[int(line)], allow_graceful=False)
    print("gone", flush=True)
cluster.shutdown()
"""


class TestCluster:
    """A running cluster; ``address`` is the one of its head, node 0."""

    __test__ = False

    def __init__(self, process):
        self._process = process
        self.address = self._hear("at")

    def kill_node(self, number):
        """Kills all processes of a node."""
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        self._hear("gone")

    def _hear(self, word):
        """The rest of the line that begins with the word; Ray may print others before."""
        for line in self._process.stdout:
            if line.startswith(word):
                return line[len(word) :].strip()
        raise AssertionError("the cluster did not start")


@contextlib.contextmanager
def open_cluster(nodes=1):
    """Nodes of 4 CPUs each; node N offers the resource ``nodeN``."""
    command = [sys.executable, "-c", SCRIPT, str(nodes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield TestCluster(process)
        finally:
            process.stdin.close()
            process.wait(60)
