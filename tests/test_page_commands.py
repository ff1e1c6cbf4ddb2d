"""The commands of the pages are such as their scripts take; nothing of the scripts runs but the reading."""

import json
import re
import subprocess
import sys

import pytest

from tests.test_readme import PAGES, ROOT

COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(python )?(scripts/\S+\.py)\b ?([^#]*)")
# Runs each script up to the end of `parse_args`; prints what the refused ones say.
READ = """
import argparse, contextlib, io, json, os, runpy, sys


class Taken(Exception):
    pass


def parse_args(self, *arguments, plain=argparse.ArgumentParser.parse_args):
    plain(self, *arguments)
    raise Taken


argparse.ArgumentParser.parse_args = parse_args
refused = {}
for command in json.load(sys.stdin):
    sys.argv, sys.path[0] = command.split(), os.path.dirname(command.split()[0])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except Taken:
        continue
    except SystemExit as error:
        refused[command] = f"{error}: {said.getvalue()[-300:]}"
print(json.dumps(refused))
"""


def commands_of(page):
    """The command lines of a page, in fences and in text; a script that is only named is none."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    lines = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    for line in lines:
        if (found := COMMAND.match(" ".join(line.split()))) and (found[1] or found[3]):
            yield found[2], found[3]


@pytest.mark.slow
def test_scripts_take_the_options_that_the_pages_give():
    commands = [
        # What stands for the reader's own value may be a number.
        f"{script} {re.sub(r'(?<= )[A-Z]+(?= |$)', '1', ' ' + options).strip()}"
        for page in PAGES
        for script, options in commands_of(page)
        if "argparse" in (ROOT / script).read_text(encoding="utf-8")
    ]
    assert len(commands) > 25
    done = subprocess.run(
        [sys.executable, "-c", READ], input=json.dumps(commands), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
