"""Parsers of logs and the rule of grading, beside the official package where it is installed."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from empg_envs.swe import grading, reports
from empg_envs.swe.tasks import parse_row

REPOSITORIES = (
    *("astropy/astropy", "django/django", "marshmallow-code/marshmallow", "matplotlib/matplotlib"),
    *("mwaskom/seaborn", "pallets/flask", "psf/requests", "pvlib/pvlib-python", "pydata/xarray"),
    *("pydicom/pydicom", "pylint-dev/astroid", "pylint-dev/pylint", "pytest-dev/pytest"),
    *("pyvista/pyvista", "scikit-learn/scikit-learn", "sqlfluff/sqlfluff", "sphinx-doc/sphinx"),
    "sympy/sympy",
)
LOG = """\
============================= test session starts ==============================
lib/tests/test_a.py::test_q[x - y] PASSED                                [ 50%]
PASSED lib/tests/test_a.py::test_q[x - y]
PASSED [100%]
SKIPPED [2] lib/tests/test_a.py:9: needs a network
SKIPPED lib/tests/test_a.py::test_skip
FAILED lib/tests/test_a.py::T::test_f[a b] - assert 1 == 2
FAILED lib/tests/test_a.py::test_dash[a - b] - ValueError: x - y
ERROR lib/tests/test_b.py - ImportError
ERROR lib/tests/test_b.py::test_e - boom
XFAIL lib/tests/test_a.py::test_x - reason
XPASS lib/tests/test_a.py::test_xp
PASSED t.py::test_path[/a/b/f.txt]
PASSED t.py::test_path[//a/b]
PASSED t.py::test_path[/a/*/b]
PASSED t.py::test_nested[/a/b][c]/d
PASSED t.py::test_mouse[MouseButton.LEFT-MouseButton.RIGHT]
\x1b[32mPASSED\x1b[0m t.py::test_color
[32mPASSED[0m t.py::test_half_color
t.py::test_old PASSED
t.py::test_old[a b] FAILED
t.py::test_progress PASSED [ 50%]
PASSED
test_a (m.T) ... ok
test_b (m.T) ... skipped 'x'
test_c (m.T) ... FAIL
test_d (m.T) ... ERROR
test_e (m.T) ...  OK
test_f (m.T) ... output
ok
FAIL: test_g (m.T)
ERROR: test_h (m.T)
test_i (m.T) ... Internal Server Error: /x/
ok
test_j (m.T) ... System check identified no issues (0 silenced)
ok
test_k (m.T) ... Testing against Django installed in '/x' with up to 4 processes
System check identified no issues (0 silenced).
ok
Applying sites.0002_alter_domain_unique...test_no_migrations (m.T) ... ok
--version is equivalent to version ... ok
test_l (m.T)
A docstring ... ok
test_f (slow) ok
test_g F
test_h E
test_i f
________ sympy/core/tests/test_x.py:test_fails _________
_______________ a b.py:c _____ d ___
= 3 passed in 0.1s =
"""


@pytest.fixture(scope="module")
def official() -> dict[str, object]:
    python = pytest.importorskip(
        "swebench.harness.log_parsers.python", reason="needs the package swebench, the oracle of the parsers"
    )
    return python.MAP_REPO_TO_PARSER_PY


def test_every_repository_has_a_parser(official: dict) -> None:
    assert set(REPOSITORIES) == set(official) and set(reports.PARSERS) <= set(official)


@pytest.mark.parametrize("repo", REPOSITORIES)
def test_a_log_of_everything_is_read_alike(official: dict, repo: str) -> None:
    found = reports.parser_of(repo)(LOG)
    assert found == official[repo](LOG, None) and len(found) > 5


PARTS = st.sampled_from(
    (
        *reports.STATUSES,
        *(
            "XPASS",
            " ",
            "  ",
            "\t",
            " - ",
            " ... ",
            " ...  OK",
            " ... ok",
            " ... OK",
            "ok",
            "[",
            "]",
            "\n",
            "\n",
        ),
        *("[100%]", "[2]", "[ 50%]", "a.py::test_x", "::test_y", "test_z", "[a b]", "[a - b]", "[/a/b.txt]"),
        *("[//x]", "(m.T)", "FAIL:", "ERROR:", " ... FAIL", " ... ERROR", " ... skipped", " E", " F", " f"),
        *("___", "_", "x.py:y", ".py:", "\x1b[32m", "[0m", "\r", "\x0b", "\u2028", "é", "MouseButton.LEFT"),
        *("--version is equivalent to version", "System check identified no issues (0 silenced)"),
        *("Testing against Django installed in ", " silenced).", "Internal Server Error: /x/", " PASSED "),
        "Applying sites.0002_alter_domain_unique...test_no_migrations",
    )
)
LOGS = st.lists(st.one_of(PARTS, st.text(max_size=3)), max_size=30).map("".join)


@pytest.mark.parametrize("repo", [*sorted(reports.PARSERS), "pytest-dev/pytest"])
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(log=LOGS)
def test_any_log_is_read_alike(official: dict, repo: str, log: str) -> None:
    try:
        expected = official[repo](log, None)
    except IndexError:  # the original falls over a line "FAIL:" without a name
        return
    assert reports.parser_of(repo)(log) == expected


NAMES = st.sampled_from(
    ("a", "a[", "a[x", "a[x y", "a[x y]", "a[x y-1]", "a[x y-2]", "b", "b[(c]", "b[(c] d")
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    statuses=st.dictionaries(NAMES, st.sampled_from(reports.STATUSES)),
    broken=st.lists(NAMES, min_size=1, max_size=3, unique=True),
    kept=st.lists(NAMES, max_size=3, unique=True),
)
def test_the_rule_is_the_official_one(
    official: dict, statuses: dict[str, str], broken: list[str], kept: list[str]
) -> None:
    from swebench.harness import grading as original

    lists = {"FAIL_TO_PASS": broken, "PASS_TO_PASS": kept}
    report = original.get_eval_tests_report(statuses, lists)
    row = {"instance_id": "i", "repo": "r", "base_commit": "c", "problem_statement": "p", **lists}
    grade = grading.judge(parse_row(row), statuses)
    assert grade.resolved == (original.get_resolution_status(report) == "RESOLVED_FULL")
    assert grade.fail_to_pass[0] == len(report["FAIL_TO_PASS"]["success"])
    assert grade.pass_to_pass[0] == len(report["PASS_TO_PASS"]["success"])


def test_logs_without_the_oracle() -> None:
    log = "PASSED t.py::test_q[x - y]\nPASSED [100%]\nFAILED t.py::f - why\n"
    assert reports.parse_pytest(log) == {
        "t.py::test_q[x": "PASSED",
        "[100%]": "PASSED",
        "t.py::f": "FAILED",
    }
    assert reports.parse_pytest_v2(log)["t.py::test_q[x - y]"] == "PASSED"
    assert reports.parse_pytest_options("PASSED t.py::p[/a/b/f.txt]\n") == {"t.py::p[/f.txt]": "PASSED"}
    assert reports.parse_matplotlib("PASSED t.py::p[MouseButton.LEFT]\n") == {"t.py::p[1]": "PASSED"}
    assert reports.parse_seaborn("t.py::a PASSED [ 50%]\n") == {"t.py::a": "PASSED"}
    of_r2e = "ERROR    root:a.py:5 logged\n== short test summary info ==\nFAILED a.py::T::x - why\n"
    of_r2e += "PASSED a.py::y[1]\nXFAIL a.py::z\nSKIPPED [1] a.py:3: no\nERROR b.py - ImportError: PASSED\n"
    assert reports.parse_r2e(of_r2e) == {"T.x": "FAILED", "y[1]": "PASSED", "": "ERROR"}
    assert reports.parse_r2e("PASSED a.py::T::x\n") == {}
    django = (
        "test_a (m.T) ... ok\ntest_b (m.T) ... skipped 'x'\ntest_c (m.T) ... noise\nok\nERROR: test_d (m.T)\n"
    )
    assert list(reports.parse_django(django).values()) == ["PASSED", "SKIPPED", "PASSED", "ERROR"]
    assert reports.parse_sympy("test_a (slow) ok\ntest_b F\n") == {"test_a": "PASSED", "test_b": "FAILED"}
    assert reports.test_targets("django/django", {"tests/a/test_b.py", "x.txt"}) == ["a.test_b"]


def test_logs_that_do_not_agree_with_themselves() -> None:
    honest = "PASSED t.py::a\nFAILED t.py::b - why\nERROR t.py::a - at its end\n"
    assert reports.doubts(honest, reports.parse_pytest, 1) == []
    assert "contradiction" in reports.doubts(honest + "PASSED t.py::b\n", reports.parse_pytest, 1)[0]
    assert "exit code 0" in reports.doubts(honest, reports.parse_pytest, 0)[0]
    logged = "ERROR    lib:lib.py:4 expected\n== short test summary info ==\nPASSED t.py::a\n"
    assert reports.doubts(logged, reports.parse_pytest, 0) == []
    twice = "== short test summary info ==\nFAILED t.py::a\n== short test summary info ==\nPASSED t.py::a\n"
    assert "contradiction" in reports.doubts(twice, reports.parse_r2e, None)[0]
    assert not reports.is_believable({"a": "PASSED"}, 1) and reports.is_believable({"a": "FAILED"}, 1)
