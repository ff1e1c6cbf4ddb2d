"""Make the images of tasks ready before training, or remove them afterwards.

    python -m empg_envs.swe.prepare data/verified.parquet --split test --jobs 4
    python -m empg_envs.swe.prepare hub:owner/name --options '{"docker": "podman"}' --bugs
    python -m empg_envs.swe.prepare data/verified.parquet --remove

Images that are here are not pulled again. With ``--bugs`` each task's second bug is made (up to 13 runs of
its tests, once), without which the judge does without its second session. ``--remove`` also removes what
killed processes left.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from empg_envs.rows import FORM, DataError
from empg_envs.swe import containers, owners
from empg_envs.swe.backends import check_has_files, make_backend
from empg_envs.swe.images import ImageBackend
from empg_envs.swe.refusals import FAILED, one_line
from empg_envs.swe.sandbox import SandboxError
from empg_envs.swe.tasks import Task, load_panels


def pull_images(tasks: Iterable[Task], docker: str, jobs: int, say: Callable[[str], None]) -> list[str]:
    """Pull the images of tasks that are not here; return those that cannot be had."""

    def pull(image: str) -> str | None:
        try:
            say(f"{image}: {'pulled' if containers.pull(image, docker) else 'here'}")
        except SandboxError as error:
            say(f"{image}: {error}")
            return image
        return None

    images = sorted({task.image for task in tasks if task.image is not None})
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        return [image for image in pool.map(pull, images) if image is not None]


def make_bugs(
    tasks: Iterable[Task], backend: ImageBackend, timeout: float, say: Callable[[str], None]
) -> list[str]:
    """Make the second bugs of tasks; return the ids of those for which this fails."""
    failed = []
    for task in tasks:
        try:
            count = len(backend.second_bugs(task, timeout))
        except (SandboxError, DataError) as error:
            say(f"{task.instance_id}: {error}")
            failed.append(task.instance_id)
        else:
            say(f"{task.instance_id}: {'a second bug' if count else 'no second bug is found'}")
    return failed


def remove_images(tasks: Iterable[Task], docker: str, say: Callable[[str], None]) -> None:
    """Remove the images of tasks, and what ended processes left of containers and images."""
    for name in (*owners.remove_orphans(docker), *owners.remove_frozen(docker)):
        say(f"{name}: removed, its process has ended")
    for image in sorted({task.image for task in tasks if task.image is not None}):
        if containers.discard(image, docker):
            say(f"{image}: removed")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", help=f"file of task rows, or {FORM}")
    parser.add_argument("--split", default=None, help="one split only")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: the backend's env.options")
    parser.add_argument("--jobs", type=int, default=2, help="images pulled at the same time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one run of tests")
    parser.add_argument("--bugs", action="store_true", help="make second bugs, too")
    parser.add_argument("--remove", action="store_true", help="remove instead")
    return parser.parse_args(argv)


def _read(options: argparse.Namespace) -> tuple[list[Task], ImageBackend]:
    panels = load_panels(options.tasks, has_commit=options.bugs)
    if options.split is not None and options.split not in panels:
        raise ValueError(f"unknown split {options.split!r}; the splits are {', '.join(panels)}")
    chosen = panels.values() if options.split is None else [panels[options.split]]
    tasks = [task for panel in chosen for task in panel]
    check_has_files(tasks, "docker")
    backend = make_backend("docker", **options.options)
    assert isinstance(backend, ImageBackend)
    return tasks, backend


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's text."""
    options = _parse(argv)

    def say(line: str) -> None:
        print(" ".join(line.split()), flush=True)

    with one_line():
        tasks, backend = _read(options)
    docker: Any = options.options.get("docker", "docker")
    with one_line(FAILED):
        if options.remove:
            remove_images(tasks, docker, say)
            return
        failed = pull_images(tasks, docker, options.jobs, say)
        if options.bugs:
            ready = [task for task in tasks if task.image not in failed]
            failed += make_bugs(ready, backend, options.timeout, say)
        if failed:
            raise SandboxError(f"{len(failed)} could not be made ready: {', '.join(failed[:5])}")


if __name__ == "__main__":
    main()
