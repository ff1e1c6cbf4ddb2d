"""A bucket of Google Cloud Storage on this machine, for tests of checkpoints that lie in one."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.hosts import free_port

NAME = "bucket"
NEEDED = {"gcsfs": "gcsfs", "gcp_storage_emulator": "gcp-storage-emulator"}


def settings(address):
    """The environment in which both libraries take the stand-in for the store."""
    return {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google for the kind of the bucket
    }


@contextlib.contextmanager
def served():
    """Serves an empty bucket, in memory, and tells the libraries of it; yields the address."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        told = f"needs {' and '.join(missing)}: pip install -e '.[test,gcs]'"
        assert os.environ.get("CI") != "true", told
        pytest.skip(told)
    address = f"http://localhost:{free_port()}"
    port = address.rpartition(":")[2]
    options = ["--port", port, "--default-bucket", NAME, "--in-memory", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(address).items():
            patch.setenv(name, value)
        command = [sys.executable, "-m", "gcp_storage_emulator", "start", *options]
        # It tells of every client that closes early, as tensorstore does.
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            _wait_for(address, server)
            yield address
        finally:
            server.kill()
            server.wait()


def _wait_for(address, server, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, "the bucket's server has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10):
            return
        time.sleep(0.05)
    raise AssertionError("the bucket's server does not answer")
