"""What every environment in the table must do."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import empg_envs
from empg_envs import ENVS, EnvSpec, PlainParser, PlainPrompts, TextEnv, make_env, resolve_spec
from empg_envs.conformance import CHECKS, Subject
from empg_envs.conformance.checks import check_any_text, check_parser
from empg_envs.conformance.replies import check_reply
from tests.cages import has_cages, need_cages

ROOT = Path(empg_envs.__file__).resolve().parents[2]

# Options under which an environment can be built here without any outside data.
OPTIONS: dict[str, list[dict]] = {
    "alfworld": [
        {"source": "generated", "level": "tiny"},
        {"source": "generated", "level": "rooms", "release": "2.1.1"},
    ],
    "household": [
        {"level": level, "style": style} for level in ("tiny", "hard") for style in ("terse", "alfworld")
    ],
    "deepsearch": [
        {"level": "tiny", "style": "terse"},
        {"level": "hard", "style": "search_r1", "snippet_words": 8},
        {"level": "tiny", "tools": ["search", "browse"], "piece_words": 5},
    ],
    "swe": [{"tools": "functions", "max_turns": 7}, {"tools": "terse", "max_turns": 7}],
    "harness": [{"command": f"python {ROOT / 'tests' / 'harness' / 'agents.py'} steady"}],
    "webshop": [{"level": "tiny"}, {"level": "standard", "style": "page"}],
    "gymnasium": [{"id": "tests.adapters.games:Guess-v0"}],
    "reasoning_gym": [{"dataset": "chain_sum", "params": {"max_terms": 3}}],
    "mcp": [
        {
            "command": f"python {ROOT / 'tests' / 'adapters' / 'mcp_server.py'}",
            "tasks": str(ROOT / "tests" / "adapters" / "drawers.jsonl"),
            "setup_tool": "prepare",
            "reward_tool": "judge",
        }
    ],
    "textarena": [{"id": "TicTacToe-v0"}],
}
# They need a server, or a package that no other test needs: see their own tests in tests/adapters.
ELSEWHERE = {"openenv", "verifiers"}
CASES = [(name, options) for name in ENVS if name not in ELSEWHERE for options in OPTIONS.get(name, [{}])]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]
CAGED = {"swe"}  # environments that need a sandbox
ADAPTERS = {"gymnasium", "reasoning_gym", "textarena"}  # environments that need a package of their name
ENDS_ANY_TIME = {"reasoning_gym", "mcp", "textarena"}  # an answer, or a few illegal moves, end an episode
every_env = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


@pytest.fixture(autouse=True)
def needed(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    name = None if callspec is None else callspec.params.get("name")
    if name in CAGED:
        need_cages()
    if name in ADAPTERS:
        pytest.importorskip(name, reason=f"needs the extra 'adapters' ({name})")


@every_env
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_checks(name: str, options: dict, check) -> None:
    # A server starts for each episode.
    check.run(Subject(name, options, episodes=1 if name == "mcp" else 2))


@every_env
def test_every_info_names_the_task(name: str, options: dict) -> None:
    env = make_env(name, **options)
    assert isinstance(env, TextEnv)
    env.reset(split="train", index=0)
    assert env.step("look")[4]["task"]


@every_env
def test_seeds_draw_different_tasks(name: str, options: dict) -> None:
    env = make_env(name, **options)
    drawn = {env.reset(seed=seed)[1]["task"] + env.reset()[0] for seed in range(8)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("name", "options"),
    [case for case in CASES if case[0] != "mcp"],
    ids=[each for each, case in zip(IDS, CASES, strict=True) if case[0] != "mcp"],
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.text(max_size=60), min_size=1, max_size=6))
def test_nonsense_earns_nothing_and_ends_nothing(name: str, options: dict, actions: list[str]) -> None:
    if name in ENDS_ANY_TIME:
        check_any_text(Subject(name, options, episodes=1), actions)
        return
    env = make_env(name, **options)
    env.reset(split="train", index=0)
    for action in actions:
        reply = env.step(action)
        check_reply(reply)
        assert reply[1] == 0.0 and not reply[2] and not reply[3]


@every_env
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(responses=st.lists(st.text(max_size=80), min_size=10, max_size=20))
def test_parsers_never_raise(name: str, options: dict, responses: list[str]) -> None:
    check_parser(Subject(name, options), responses)


@pytest.mark.parametrize(
    ("name", "options", "prompt_options"),
    [
        ("alfworld", {"source": "generated", "level": "tiny"}, {"parser": "line"}),
        ("household", {"level": "tiny"}, {}),
        ("household", {"level": "tiny"}, {"require_admissible": True}),
        ("household", {"level": "tiny", "style": "alfworld"}, {"style": "alfworld"}),
        ("swe", {"tools": "terse"}, {"tools": "terse"}),
        ("webshop", {"level": "tiny"}, {}),
        ("webshop", {"level": "tiny", "style": "page"}, {"style": "page"}),
    ],
)
def test_a_parser_of_lines_looks_behind_the_thought(name: str, options: dict, prompt_options: dict) -> None:
    env, parse = make_env(name, **options), resolve_spec(name).parser(**prompt_options)
    _, info = env.reset(split="train", index=0)
    ended = False
    while not ended:
        action = env.expert_action()
        for thought in ("<think>\nFirst look, then go.\n</think>\n\n", "look</think>"):
            assert parse(thought + action, info) == empg_envs.ParsedAction(action, True)
        assert not parse(f"<think>\n{action}", info).is_valid
        *_, ended, _, info = env.step(action)


def test_names_and_entry_points() -> None:
    with pytest.raises(ValueError, match="unknown environment 'houshold'; did you mean 'household'"):
        make_env("houshold")
    assert resolve_spec("empg_envs.household.env:HouseholdEnv").prompts is PlainPrompts
    assert make_env("empg_envs.household.env:HouseholdEnv", level="easy").list_splits() == [
        "train",
        "valid",
        "test",
    ]
    with pytest.raises(ValueError, match="has no attribute 'HouseholdEn'; did you mean 'HouseholdEnv'"):
        resolve_spec("empg_envs.household.env:HouseholdEn")
    with pytest.raises(ValueError, match="cannot import 'no_such_module'"):
        resolve_spec("no_such_module:thing")
    with pytest.raises(TypeError, match=r"envs\.household\.tables:LEVELS"):
        resolve_spec("empg_envs.household.tables:LEVELS")
    with pytest.raises(TypeError, match="max_turn"):
        make_env("household", max_turn=3)
    for name, spec in ENVS.items():
        assert isinstance(spec, EnvSpec) and spec.name == name


def test_plain_prompts_and_parser() -> None:
    prompts, parser = PlainPrompts(), PlainParser()
    assert prompts.start("o", {}) == [{"role": "user", "content": "o"}]
    assert [m["content"] for m in prompts.window([("a", "b")], "o", {}, 1)] == ["a", "b", "o"]
    assert parser("\n go \nmore", {}) == empg_envs.ParsedAction("go", True)
    assert parser(" \n", {}) == empg_envs.ParsedAction("", False)


def test_environments_load_neither_jax_nor_the_trainer() -> None:
    # Programs must be named, and packages that are adapted bring NumPy.
    ours = [name for name in ENVS if name not in {"harness", "mcp", *ELSEWHERE, *ADAPTERS}]
    runnable = [name for name in ours if name not in CAGED or has_cages()]
    script = (
        "import sys, empg_envs\n"
        "assert 'empg_envs.household' not in sys.modules\n"
        f"for name in {runnable}: spec = empg_envs.ENVS[name]; spec.make(), spec.prompts(), spec.parser()\n"
        "print(sorted({'jax', 'numpy', 'empg_jax'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "envs")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
