"""A judge and a task that several tests share."""

from collections.abc import Iterator

import pytest

from empg_envs.swe.backends import TreeBackend
from empg_envs.swe.tasks import Task, load_panels
from tests.cages import need_cages


@pytest.fixture(scope="module")
def backend() -> Iterator[TreeBackend]:
    need_cages()
    yield TreeBackend()


@pytest.fixture(scope="module")
def task() -> Task:
    return next(task for task in load_panels("tiny")["train"] if task.repo == "spans")
