"""Checkpoints in Google Cloud Storage (``gs://BUCKET/FOLDER``), where nothing can be renamed in one act.

Orbax writes a step in its place and marks it complete with one small object, the last one written. Deleting
that object is one act, too, and everything here is built on the two: a step without its mark does not count.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec.config
import tensorstore
from etils import epath
from orbax.checkpoint.path import atomicity_types

from empg_jax.errors import CheckpointError, RefusedCheckpoint, first_line
from empg_jax.parallel.hosts import Hosts

COMPLETE = atomicity_types.COMMIT_SUCCESS_FILE
ASIDE = "aside.txt"
PROBE_SECONDS = 60.0  # for one small object; tensorstore alone would try again for many minutes
_NAME = re.compile(r"(\d+)(?:\.(\d+))?")

# Tensorstore writes the arrays, which gcsfs knows nothing of: a listing that it remembers would be wrong.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


class _Version(NamedTuple):
    """One folder of a step: ``<step>`` is the version 0, ``<step>.1`` was written after it."""

    step: int
    number: int
    objects: frozenset[str]

    @property
    def name(self) -> str:
        return f"{self.step}.{self.number}" if self.number else str(self.step)

    @property
    def counts(self) -> bool:
        return COMPLETE in self.objects and ASIDE not in self.objects


class StoreFolders:
    """The steps below a URL.

    A step that is written again gets a folder of its own, ``<step>.1`` and so on. Of several complete
    ones the first counts, until its mark is deleted: that is the swap.

    Args:
      url: ``gs://BUCKET/FOLDER``.

    Raises:
      RefusedCheckpoint: the library is not installed.
    """

    def __init__(self, url: str) -> None:
        self.directory = epath.Path(url)
        # Inside: what is beside the folder may belong to another run.
        self.reference = self.directory / "reference"
        self.owner = self.directory / "owner.json"
        try:
            fsspec.get_filesystem_class("gcs")
        except ImportError:
            raise RefusedCheckpoint(
                f"checkpoint.dir={url} needs the package gcsfs: pip install -e '.[gcs]'"
            ) from None

    @property
    def steps(self) -> list[int]:
        """Complete steps, ascending."""
        return sorted({version.step for version in self._versions() if version.counts})

    def path(self, step: int) -> Any:
        """Return the folder that counts for a step; where none does, the first that it would get."""
        names = [version.name for version in self._versions(step) if version.counts]
        return self.directory / (names[0] if names else str(step))

    def new_name(self, step: int) -> str:
        """Return a name that no folder of this step has, complete or not."""
        taken = [version.number for version in self._versions(step)]
        return _Version(step, max(taken, default=-1) + 1, frozenset()).name

    def make(self) -> None:
        """Do nothing: a store has no folders, only names with slashes."""

    def swap(self, name: str) -> None:
        """Delete the folders of a step that come before the new one."""
        step, _, number = name.partition(".")
        for version in self._versions(int(step)):
            if version.number < int(number) and ASIDE not in version.objects:
                self._delete(self.directory / version.name)

    def remove(self, step: int) -> None:
        """Delete a step."""
        # Those written later go first: else one of them would count in between.
        for version in reversed(self._versions(step)):
            if ASIDE not in version.objects:
                self._delete(self.directory / version.name)

    def set_aside(self, step: int) -> None:
        """Mark a step with an object that keeps it from counting; one is kept per step."""
        counts = self.path(step)
        for version in reversed(self._versions(step)):
            if version.name != counts.name:
                self._delete(self.directory / version.name)
        with self._telling("written"):
            (counts / ASIDE).write_text("The run went on from an earlier step: this one does not count.\n")

    def recover(self) -> None:
        """Delete what is not complete, and of a step that was written twice the second folder."""
        seen: set[int] = set()
        for version in self._versions():
            if COMPLETE not in version.objects or (version.counts and version.step in seen):
                self._delete(self.directory / version.name)
            elif version.counts:
                seen.add(version.step)

    def drop_reference(self) -> None:
        """Delete the old reference: orbax would ask a third library for the kind of the bucket."""
        self._delete(self.reference)

    def find_reference(self) -> Any:
        """Return the folder that it was written to."""
        return self.reference

    def read_owner(self) -> str:
        """Return the text of the file that names the run."""
        with self._telling("read"):
            return str(self.owner.read_text()) if self.owner.exists() else ""

    def write_owner(self, text: str) -> None:
        """Write the file that names the run."""
        with self._telling("written"):
            self.owner.write_text(text)

    def _versions(self, step: int | None = None) -> list[_Version]:
        """List the folders of all steps, or of one step, in the order of writing."""
        with self._telling("read"):
            found = [_NAME.fullmatch(path.name) for path in _children(self.directory)]
            numbers = sorted((int(match[1]), int(match[2] or 0)) for match in found if match)
            versions = [_Version(*pair, frozenset()) for pair in numbers if step in (None, pair[0])]
            return [
                each._replace(objects=frozenset(path.name for path in _children(self.directory / each.name)))
                for each in versions
            ]

    def _delete(self, path: Any) -> None:
        """Delete a folder, beginning with its mark: what a kill leaves does not count."""
        with self._telling("written"):
            (path / COMPLETE).unlink(missing_ok=True)
            # Where an object has the name of the folder, the first time deletes this one alone.
            for _ in range(2):
                path.rmtree(missing_ok=True)

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of gcsfs, aiohttp or the credentials: they have no common class
            raise CheckpointError(f"{self.directory} cannot be {what}: {first_line(error)}") from error


def check_object_store(url: str, hosts: Hosts, *, is_new: bool) -> None:
    """Write and delete a small object on every host before anything else begins.

    Args:
      url: ``gs://BUCKET/FOLDER``.
      hosts: all check, and all refuse what one of them cannot do.
      is_new: whether the run begins here, so that the folder must hold no checkpoint.

    Raises:
      RefusedCheckpoint: the store cannot be used, or holds the checkpoints of another run.
    """
    problem = None
    try:
        folders = StoreFolders(url)
        _probe(url, f"probe-{hosts.index}")
        if is_new and hosts.is_first and folders.steps:
            problem = f"holds checkpoints of another run ({folders.steps}): choose another folder"
    except RefusedCheckpoint as error:
        problem = str(error)
    except Exception as error:
        is_silent = isinstance(error, TimeoutError)
        what = f"no answer within {PROBE_SECONDS:.0f} s" if is_silent else first_line(error)
        problem = (
            f"cannot be used: {what}; the bucket must exist, and this machine must have the "
            "right to write to it: 'gcloud auth application-default login', "
            "GOOGLE_APPLICATION_CREDENTIALS=KEY.json, or the machine's service account"
        )
    problem = next(filter(None, hosts.agree("object-store", problem)), None)
    if problem is not None:
        told = problem if problem.startswith("checkpoint.dir") else f"checkpoint.dir={url} {problem}"
        raise RefusedCheckpoint(told)


def _probe(url: str, name: str) -> None:
    """Write by the library that writes arrays, then read and delete by the one that lists folders."""
    bucket, _, folder = url.removeprefix("gs://").partition("/")
    driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")  # as orbax
    spec = {"driver": driver, "bucket": bucket, "path": f"{folder.strip('/')}/"}
    store = tensorstore.KvStore.open(spec).result(timeout=PROBE_SECONDS)
    store.write(name, b"empg-jax").result(timeout=PROBE_SECONDS)
    path = epath.Path(url) / name
    path.read_bytes()
    path.unlink()


def _children(directory: Any) -> list[Any]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
