"""Lines and claims that any number of processes share."""

import concurrent.futures
import os
import subprocess
import sys

import pytest
from study_ledger import Ledger, newest
from study_plan import Triple

from empg_jax.errors import ConfigError
from tests.study import made_up

TRIPLE = Triple("house", "aem", 4)


@pytest.fixture
def study(tmp_path):
    return made_up.make_study(tmp_path / "study")


def test_lines_of_many_writers_are_whole(study):
    line = made_up.line(study, TRIPLE, [0.1, 0.2]) | {"series": {"long": ["x" * 100_000]}}

    def write(number):
        Ledger(study).append(line | {"number": number})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert sorted(each["number"] for each in Ledger(study).read()) == list(range(40))


def test_a_line_that_was_cut_short_costs_itself_alone(study):
    ledger = Ledger(study)
    ledger.append(made_up.line(study, TRIPLE, [0.1, 0.2]))
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(content + content[:70])
    assert len(ledger.read()) == 1
    ledger.append(made_up.line(study, TRIPLE, [0.3, float("nan")]))
    lines = ledger.read()
    assert [each["curve"][0] for each in lines] == [[0, 0.1], [0, 0.3]]
    assert lines[1]["curve"][1] == [10, None]  # JSON has no NaN
    assert newest(lines) == {TRIPLE: lines[1]} and ledger.count() == {TRIPLE: 2}


def test_a_claim_has_one_owner_and_outlives_it_in_its_child(study):
    ledger = Ledger(study)
    first = ledger.claim(TRIPLE)
    assert first is not None and ledger.claim(TRIPLE) is None
    assert list(ledger.claimed()) == [TRIPLE]
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(first,))
    os.close(first)
    assert list(ledger.claimed()) == [TRIPLE]
    child.communicate(b"\n")
    assert list(ledger.claimed()) == []
    os.close(ledger.claim(TRIPLE))


def test_lines_of_other_settings_are_refused(study, tmp_path):
    Ledger(study).append(made_up.line(study, TRIPLE, [0.1, 0.2]))
    changed = made_up.make_study(tmp_path / "study", replace={"grpo_aem]": "grpo_aem, algorithm.aem.lam=2]"})
    with pytest.raises(
        ConfigError, match=r"house-aem-4 was run with \[.*give changed arms and tasks a new name"
    ):
        Ledger(changed).read()
    # More seeds change nothing of what was run.
    more = made_up.make_study(tmp_path / "study", seeds=(3, 4, 5, 6))
    assert len(Ledger(more).read()) == 1
