"""Run a study of paired seeds, look how far it is, and write its report.

A study is a folder with a ``study.yaml``: what was registered before, tasks, arms, seeds. Any number of
processes may run one study; each run that ends becomes a line of ``runs.jsonl`` beside it, and a study that
was stopped or killed goes on where it was.

    python scripts/study.py run scripts/studies/confirm
    python scripts/study.py status scripts/studies/confirm
    python scripts/study.py report scripts/studies/confirm --out report.md --png curves.png
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from study_ledger import Ledger, triple_of
from study_plan import Study, read_study

from empg_jax.errors import ConfigError, nearest


def main(words: list[str] | None = None) -> int:
    """Parse the command line and do what it says; return the exit code."""
    arguments = _parser().parse_args(words)
    try:
        return arguments.do(read_study(arguments.study), arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(study: Study, arguments: argparse.Namespace) -> int:
    """Make the runs that are still to do."""
    from study_runs import Runner

    for option, wanted, known in (
        ("arms", arguments.arms, study.arms),
        ("tasks", arguments.tasks, study.tasks),
    ):
        for name in wanted or ():
            if name not in known:
                hint, there_are = nearest(name, known), ", ".join(known)
                raise ConfigError(f"--{option} {name}: no such {option[:-1]}{hint}; there are {there_are}")
    os.nice(arguments.nice)
    runner = Runner(
        study,
        arguments.runs_dir or Path("runs") / "studies" / study.folder.resolve().name,
        arms=arguments.arms,
        tasks=arguments.tasks,
        limit=arguments.limit,
        retry=arguments.retry,
        any_processor=arguments.any_processor,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    signum = runner.run(arguments.jobs)
    return 128 + signum if signum else status(study, arguments)


def status(study: Study, arguments: argparse.Namespace) -> int:
    """Print how many runs of each cell are finished, failed, being made and to do."""
    ledger = Ledger(study)
    states = {triple_of(line): line["status"] for line in ledger.read()}
    states |= {triple: "running" for triple in ledger.claimed()}
    triples = list(study.triples())
    names = ("finished", "failed", "running", "to do")
    width = max(len(f"{task} {arm}") for task in study.tasks for arm in study.arms)
    for task in study.tasks:
        for arm in study.arms:
            found = [states.get(each, "to do") for each in triples if (each.task, each.arm) == (task, arm)]
            counts = ", ".join(f"{found.count(name)} {name}" for name in names)
            print(f"{f'{task} {arm}':<{width}}  {counts}")
    return 0


def report(study: Study, arguments: argparse.Namespace) -> int:
    """Write the report, to stdout without ``--out``, and the picture."""
    from study_report import write_report

    for option, path in (("out", arguments.out), ("png", arguments.png)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--{option} {path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise ConfigError(f"--{option} {path}: that is a folder, and a file is written")
    lines = Ledger(study).read()
    text = write_report(study, lines)
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text, encoding="utf-8")
    if arguments.png is not None:
        from study_pictures import draw

        draw(study, lines, arguments.png)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for do, name in ((run, "run"), (status, "status"), (report, "report")):
        command = commands.add_parser(name, help=do.__doc__)
        command.set_defaults(do=do)
        command.add_argument("study", type=Path, help="folder with a study.yaml")
        if do is run:
            command.add_argument("--jobs", type=_count, default=1, help="runs at one time")
            command.add_argument("--nice", type=int, default=10, help="added to the process's niceness")
            command.add_argument("--arms", nargs="+", metavar="ARM", help="run these arms only")
            command.add_argument("--tasks", nargs="+", metavar="TASK", help="run these tasks only")
            command.add_argument("--limit", type=_count, help="runs to start at most")
            command.add_argument("--retry", action="store_true", help="also go on with runs that failed")
            command.add_argument(
                "--any-processor",
                action="store_true",
                help="also make runs of seeds that another kind of processor began, which seldom pair",
            )
            command.add_argument(
                "--runs-dir", type=Path, help="parent of the runs' folders (runs/studies/NAME)"
            )
        if do is report:
            command.add_argument("--out", type=Path, help="file of the report (stdout)")
            command.add_argument("--png", type=Path, help="file of the picture (none)")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
