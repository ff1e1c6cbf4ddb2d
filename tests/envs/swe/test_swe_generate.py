"""Bugs by mutation, and tasks made of them."""

import json
from pathlib import Path

import pytest

from empg_envs.swe import generate, mutate, patches, terse
from empg_envs.swe.backends import TreeBackend
from empg_envs.swe.fetch import FetchError, fetch_sdist
from empg_envs.swe.tasks import broken_tree, load_base, load_panels, parse_row
from tests.cages import need_cages

SOURCE = '''\
"""Text with 1 < 2 and True."""

def f(a: int = 3, *, b: "x < y" = None) -> bool:
    if a < 0:  # a < 0 and more
        return False
    é = "ü" if a is None else min(a, b)
    return not a == 1 and b or é + 2 > 3
'''


def test_families_golden() -> None:
    found = {(m.family, m.line) for m in mutate.mutations(SOURCE)}
    assert found == {
        ("constant", 3),
        ("compare", 4),
        ("condition", 4),
        ("constant", 4),
        ("guard", 4),
        ("constant", 5),
        ("compare", 6),
        ("condition", 6),
        ("arguments", 6),
        ("boolean", 7),
        ("compare", 7),
        ("arithmetic", 7),
        ("constant", 7),
    }
    texts = {m.source.split("\n")[m.line - 1].strip() for m in mutate.mutations(SOURCE)}
    assert "if a <= 0:  # a < 0 and more" in texts and "if not (a < 0):  # a < 0 and more" in texts
    assert 'é = "ü" if a is None else min(b, a)' in texts and "return a == 1 and b or é + 2 > 3" in texts
    assert "return not a == 1 or b or é + 2 > 3" in texts and "return not a == 1 and b or é - 2 > 3" in texts


def test_every_mutation_is_one_place_and_parses() -> None:
    for mutation in mutate.mutations(SOURCE):
        compile(mutation.source, "m", "exec")
        assert mutation.source != SOURCE
    with pytest.raises(SyntaxError):
        mutate.mutations("def f(:")


def test_tasks_of_a_local_repository_are_verified(tmp_path: Path) -> None:
    need_cages()
    for path, file in load_base("embedded:spans").items():
        (tmp_path / "repo" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / path).write_bytes(file.data)
    (tmp_path / "repo" / "__pycache__").mkdir()
    sources = tmp_path / "sources"
    repository = generate.open_repository(str(tmp_path / "repo"), sources)
    backend = TreeBackend(sources=sources)
    rows = list(generate.generate(repository, backend, count=2, seed=1, runner="unittest", test_path="tests"))
    assert len(rows) == 2 and rows[0] != rows[1]
    for row in json.loads(json.dumps(rows)):
        task = parse_row(row)
        broken = broken_tree(task, sources)
        assert patches.apply(broken, task.patch) == repository.tree == load_base(task.base, str(sources))
        red = backend.run_tests(task, broken, 20)
        assert not red.resolved and red.fail_to_pass[0] == 0 and red.pass_to_pass[0] == red.pass_to_pass[1]
        assert backend.grade(task, task.patch, 20).resolved
        assert row["family"] in mutate.FAMILIES and "its tests" in task.problem_statement


def test_embedded_tasks_are_what_the_generator_makes() -> None:
    made = {task.instance_id: task for panel in load_panels("tiny").values() for task in panel}
    assert set(generate.embedded_repositories()) == {task.repo for task in made.values()}
    for name in generate.embedded_repositories():
        tree = load_base(f"embedded:{name}")
        candidates = [patches.diff(tree, broken)[0] for *_, broken in mutate.bugs(tree, 0, one_line=True)]
        places = [candidates.index(task.bug_patch) for task in made.values() if task.repo == name]
        assert len(places) == 20 and len(candidates) > 30


def test_the_terse_vocabulary_is_closed() -> None:
    vocabulary = set(
        terse.vocabulary(load_base(f"embedded:{name}") for name in generate.embedded_repositories())
    )
    for panel in load_panels("tiny").values():
        for task in panel:
            lines = task.patch.split("\n") + task.bug_patch.split("\n")
            code = [line[1:] for line in lines if line[:1] in "+-" and not line.startswith(("+++", "---"))]
            for line in code:
                assert set(terse.code_tokens(line)) <= vocabulary, line
            assert set(terse.opening(task).split()) <= vocabulary


def test_a_download_that_fails_is_named(tmp_path: Path) -> None:
    kept = tmp_path / f"{'a' * 64}.tar.gz"
    kept.write_bytes(b"x")
    assert fetch_sdist("any", "1", "a" * 64, tmp_path) == kept
    with pytest.raises(FetchError, match="cannot download the source of any 1"):
        fetch_sdist("any", "1", "b" * 64, tmp_path, python="/bin/false")
