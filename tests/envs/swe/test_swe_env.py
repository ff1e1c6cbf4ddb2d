"""The environment: episodes in every tool protocol, limits, refusals, clean-up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import empg_envs
from empg_envs import ENVS, make_env
from empg_envs.base import ParsedAction
from empg_envs.swe import bubblewrap, score
from empg_envs.swe.backends import make_backend
from empg_envs.swe.env import SweEnv
from empg_envs.swe.predictions import prediction, read_predictions, write_predictions
from empg_envs.swe.prompt import make_parser
from empg_envs.swe.sandbox import SandboxError
from empg_envs.swe.tools import SUBMIT, Reply, parse_call, render_call
from tests.cages import need_cages

ROOT = Path(empg_envs.__file__).resolve().parents[2]


@pytest.fixture
def caged() -> None:
    need_cages()


@pytest.fixture
def make(caged: None) -> Iterator[Any]:
    made: list[SweEnv] = []

    def build(**options: Any) -> SweEnv:
        made.append(SweEnv(**options))
        return made[-1]

    yield build
    for env in made:
        env.close()


@pytest.mark.parametrize("tools", ["functions", "bash", "terse"])
def test_the_expert_repairs_through_every_protocol(make: Any, tools: str, tmp_path: Path) -> None:
    env = make(tools=tools, predictions=str(tmp_path / "p.jsonl"), model_name="expert")
    parser, spec = ENVS["swe"].parser(tools=tools), ENVS["swe"].prompts(tools=tools)
    for index in (0, 7):
        observation, info = env.reset(split="test", index=index)
        assert spec.start(observation, info)[-1]["role"] == "user"
        done, turns = False, 0
        while not done:
            action = env.expert_action()
            said = f"I see.\n```bash\n{action}\n```" if tools == "bash" else action
            parsed = parser(said, info)
            assert parsed.is_valid and parsed.action.strip() == action.strip()
            observation, reward, terminated, truncated, info = env.step(parsed.action)
            done, turns = terminated or truncated, turns + 1
        assert (reward, terminated, info["won"], info["reason"]) == (1.0, True, True, "resolved")
        assert info["metrics"] == {"fail_to_pass": 1.0, "pass_to_pass": 1.0, "suspect": 0.0} and turns == 3
    assert len(read_predictions(tmp_path / "p.jsonl")) == 2


def test_the_expert_finds_its_way_after_other_actions(make: Any) -> None:
    env = make()
    _, info = env.reset(split="train", index=1)
    repo = info["group"]
    spoil = f"sed -i '1s/.*/import os/' {repo}.py; echo 1 > new.txt; rm -f tests/*"
    env.step(render_call("execute_bash", cmd=spoil))
    for _ in range(12):
        _, reward, terminated, _, info = env.step(env.expert_action())
        if terminated:
            break
    assert reward == 1.0 and info["won"]


def test_handing_in_nothing_is_worth_nothing(make: Any) -> None:
    env = make(tools="bash")
    env.reset(split="train", index=0)
    _, reward, terminated, _, info = env.step(f"echo {SUBMIT}")
    assert (reward, terminated, info["won"], info["reason"]) == (0.0, True, False, "no_patch")


def test_limits_truncate(make: Any) -> None:
    env = make(max_turns=2)
    env.reset(split="train", index=0)
    assert env.step("x")[2:4] == (False, False)
    _, reward, terminated, truncated, info = env.step("x")
    assert (reward, terminated, truncated, info["reason"]) == (0.0, False, True, "turn_limit")
    short = make(episode_timeout=3, tools="bash")
    short.reset(split="train", index=0)
    assert "the command was ended" in short.step("sleep 30")[0]  # no command outlives its episode
    _, reward, terminated, truncated, info = short.step("ls")
    assert (reward, terminated, truncated, info["reason"]) == (0.0, False, True, "episode_timeout")
    judged = make(max_turns=3, submit_at_limit=True)
    judged.reset(split="train", index=0)
    for action in (judged.expert_action(), None, "x"):
        _, reward, terminated, truncated, info = judged.step(action or judged.expert_action())
    assert (reward, terminated, truncated, info["won"]) == (1.0, False, True, True)


def test_a_command_beyond_its_time_is_an_observation(make: Any) -> None:
    env = make(command_timeout=2, tools="bash")
    env.reset(split="train", index=0)
    text = env.step("echo before; sleep 30")[0]
    assert "longer than 2 seconds" in text and "before" in text


def test_an_episode_starts_from_the_original_files(make: Any) -> None:
    env = make(tools="bash")
    env.reset(split="train", index=0)
    env.step("echo spoiled > /tmp/left; echo spoiled > left; sleep 300 &")
    env.reset(split="train", index=0)
    assert "left" not in env.step("ls /tmp . ; pgrep sleep")[0]


def test_lines_that_end_with_crlf_are_edited_as_others_and_stay_so(make: Any) -> None:
    env = make()
    env.reset(split="train", index=0)

    def call(name: str, **arguments: str) -> str:
        return env.step(render_call(name, **arguments))[0]

    def edit(command: str, **arguments: str) -> str:
        return call("file_editor", command=command, path="a.txt", **arguments)

    call("execute_bash", cmd=r"printf 'a\r\nb\r\nc\r\n' > a.txt; printf 'a\r\nb\n' > mixed.txt")
    assert "\r" not in edit("view")
    shown = edit("str_replace", old_str="a\nb\n", new_str="A\nB\nB\n")
    assert "\r" not in shown and "     3\tB" in shown
    edit("insert", insert_line="4", new_str="d\r\ne")
    assert "61 0d 0a" in call("execute_bash", cmd="od -An -tx1 mixed.txt")
    bytes_now = "41 0d 0a 42 0d 0a 42 0d 0a 63 0d 0a 64 0d 0a 65 0d 0a"
    assert bytes_now in " ".join(call("execute_bash", cmd="od -An -tx1 a.txt").split())
    edit("undo_edit")
    edit("undo_edit")
    assert "61 0d 0a 62 0d 0a 63 0d 0a" in call("execute_bash", cmd="od -An -tx1 a.txt")
    call("execute_bash", cmd=r"printf 'a\r\r\nb\r\n' > a.txt")
    edit("str_replace", old_str="b", new_str="B\r\nc")
    assert "61 0d 0d 0a 42 0d 0a 63 0d 0a" in call("execute_bash", cmd="od -An -tx1 a.txt")
    # Where line ends are mixed, every byte is what it is.
    for old, found in (("a\nb", "it occurs 0 times"), ("a\r\n", "mixed.txt was changed")):
        assert found in call("file_editor", command="str_replace", path="mixed.txt", old_str=old, new_str="x")


def test_r2e_calls(make: Any) -> None:
    env = make()
    env.reset(split="train", index=0)

    def call(name: str, **arguments: str) -> str:
        return env.step(render_call(name, **arguments))[0]

    assert "was created" in call("file_editor", command="create", path="/testbed/a.py", file_text="a\nb\na\n")
    assert "already exists" in call("file_editor", command="create", path="a.py", file_text="x")
    assert "exactly once in a.py; it occurs 2 times (lines 1, 3)" in call(
        "file_editor", command="str_replace", path="a.py", old_str="a", new_str="x"
    )
    assert "     2\tB" in call("file_editor", command="str_replace", path="a.py", old_str="b", new_str="B")
    assert "     1\tnew" in call("file_editor", command="insert", path="a.py", insert_line="0", new_str="new")
    assert "insert_line must be" in call(
        "file_editor", command="insert", path="a.py", insert_line="9", new_str=""
    )
    for odd in ("\u00b2", "9" * 5000):
        found = call("file_editor", command="insert", path="a.py", insert_line=odd, new_str="")
        assert "insert_line must be" in found and len(found) < 300
    nested = call("file_editor", command="view", path="a.py", view_range="[" * 5000)
    assert "view_range must be like [10, 20]" in nested and len(nested) < 300
    assert "undone" in call("file_editor", command="undo_edit", path="a.py")
    assert "undone" in call("file_editor", command="undo_edit", path="a.py")
    assert "no edit of a.py" in call("file_editor", command="undo_edit", path="a.py")
    view = call("file_editor", command="view", path="a.py", view_range="[2, -1]")
    assert "lines 2 to 3 of 3" in view and "     2\tb" in view
    assert "view_range" in call("file_editor", command="view", path="a.py", view_range="[3, 1]")
    assert "./tests" in call("file_editor", command="view", path=".")
    assert "No such file" in call("file_editor", command="view", path="none.py")
    assert "unknown command 'remove'" in call("file_editor", command="remove", path="a.py")
    assert "'path' is missing" in call("file_editor", command="view")
    assert "2:b" in call("search", search_term="b", path="a.py")
    assert "./a.py:2" in call("search", search_term="a", path=".")
    assert "No match" in call("search", search_term="$(id) ' \" -e zzz", path=".")
    assert "[exit code 3]" in call("execute_bash", cmd="echo out; exit 3")
    assert "'cmd' is missing" in call("execute_bash")
    assert "no function 'sudo'" in call("sudo", x="1")
    assert "No function call was found" in env.step("hello")[0]


def test_a_call_that_is_only_thought_of_is_not_made() -> None:
    thought = f"<think>{render_call('finish')} is too early.</think>"
    found = make_parser("functions")(thought + render_call("search", search_term="b"), {})
    assert found.is_valid and "search" in found.action and "finish" not in found.action
    # The environment looks for a call in the action again.
    for rest, action in ((" First I read.", " First I read."), ("", "")):
        assert make_parser("functions")(thought + rest, {}) == ParsedAction(action, False)
    assert make_parser("functions")(thought.removesuffix("</think>"), {}) == ParsedAction("", False)
    thought = "<think>```bash\nrm x\n``` no</think>\n```bash\nls\n```"
    assert make_parser("bash")(thought, {}) == ParsedAction("ls", True)


def test_calls_are_read_as_they_are_written() -> None:
    text = render_call("file_editor", command="create", file_text="  a\n\n b </x>\n")
    assert parse_call(f"thought {text} more {text}") == (
        "file_editor",
        {"command": "create", "file_text": "  a\n\n b </x>"},
    )
    assert parse_call("<function=x><parameter=y>z") is None
    # Linear in the length: with a quadratic scan this would take minutes.
    assert parse_call("</function>" + "<function=x>" * 200_000) is None


ACTIONS = st.one_of(
    st.text(max_size=60),
    st.builds(lambda text: render_call("execute_bash", cmd=text), st.text(max_size=40)),
    st.builds(
        lambda command, path, more: render_call("file_editor", command=command, path=path, **more),
        st.sampled_from(["view", "create", "str_replace", "insert", "undo_edit", ""]),
        st.one_of(
            st.text(max_size=20), st.sampled_from([".", "..", "/", "/etc/passwd", "tests", "a" * 5000])
        ),
        st.dictionaries(
            st.sampled_from(["file_text", "old_str", "new_str", "insert_line", "view_range"]),
            st.text(max_size=9),
        ),
    ),
    st.builds(lambda term: render_call("search", search_term=term, path=term), st.text(max_size=20)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(ACTIONS, min_size=1, max_size=5))
def test_any_call_gets_a_defined_reply(make: Any, actions: list[str]) -> None:
    env = make(max_turns=100, command_timeout=5)
    env.reset(split="train", index=0)
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        assert isinstance(observation, str) and len(observation) < 11_000
        assert reward == 0.0 and not terminated and not truncated and json.dumps(info)
        observation.encode()
    env.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "hammer"}, "unknown swe tools 'hammer'"),
        ({"backend": "bublewrap"}, "did you mean 'bubblewrap'"),
        ({"backend": "local"}, "allow_local=true"),
        ({"limits": {"memory": 1}}, "unknown sandbox limit 'memory'; the limits are memory_mb"),
        ({"limits": {"memory_mb": 0}}, "memory_mb must be a positive number"),
        ({"max_turns": 0}, "max_turns must be positive"),
        ({"backend": "docker"}, "has no image: use backend 'bubblewrap'"),
        ({"tasks": "missing.jsonl"}, "no file missing.jsonl"),
        ({"backend": "bubblewrap", "docker": "podman"}, "has no option 'docker'"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweEnv(**options)


def test_without_bubblewrap_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    bubblewrap.probe.cache_clear()
    try:
        with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
            make_env("swe")
    finally:
        bubblewrap.probe.cache_clear()


def test_the_local_backend_needs_consent_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = tmp_path / f"empg-swe-{os.getuid()}"
    numbering = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    orphan = home / f"999999999-{numbering}-x"  # above the largest process number there is
    orphan.mkdir(parents=True)
    env = SweEnv(backend="local", allow_local=True, tools="terse", max_turns=5)
    assert not orphan.exists()
    env.reset(split="train", index=0)
    rewards = [env.step(env.expert_action())[1] for _ in range(3)]
    assert rewards == [0.0, 0.0, 1.0]
    env.close()
    assert list(home.iterdir()) == []


def test_the_judge_leaves_no_folder_and_removes_those_of_killed_workers(
    caged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = tmp_path / f"empg-swe-judge-{os.getuid()}"
    numbering = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    for name in (f"999999999-{numbering}-x", "999999999-1-of-another-container"):
        (home / name / "tree").mkdir(parents=True)
        (home / name).chmod(0o111)
    env = SweEnv()
    task = env._find("train", 0)
    assert env._backend.grade(task, task.patch, 60).resolved
    env.close()
    assert [path.name for path in home.iterdir()] == ["999999999-1-of-another-container"]


def _running(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words:
            found.append(int(path.parent.name))
    return found


def test_nothing_is_left_of_a_killed_worker(caged: None) -> None:
    mark = f"3000.{os.getpid()}"
    script = (
        "import sys; from empg_envs import make_env\n"
        "env = make_env('swe', tools='bash'); env.reset(split='train', index=0)\n"
        f"env.step('head -c 1M /dev/zero > big; sleep {mark}')"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT / "envs")}
    )
    try:
        _wait_for(lambda: bool(_running(mark)))
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    # The files were in memory that only the cage could see, so they ended with its last process.
    _wait_for(lambda: not _running(mark))


def _wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 seconds")


def test_parallel_evaluations_do_not_disturb_each_other(caged: None) -> None:
    env = SweEnv()
    tasks = [env._find("train", index) for index in range(8)]
    env.close()
    backend, verdicts = make_backend(limits={"processes": 16}), {}

    def work(number: int) -> None:
        patch = tasks[number].patch if number % 2 else tasks[number - 1].patch
        verdicts[number] = backend.grade(tasks[number], patch, 60).resolved

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A patch resolves its own task and no other.
    assert verdicts == {number: bool(number % 2) for number in range(8)}


def test_a_sandbox_that_is_lost_after_an_action_counts_against_the_agent(make: Any) -> None:
    env = make(tools="bash")
    for submit in (False, True):
        env.reset(split="train", index=0)
        env.step("echo '# changed' >> $(ls *.py)")
        env._sandbox._process.kill()
        env._sandbox._process.wait()
        if submit:  # it is lost when the work is collected
            env._tools.run = lambda action, seconds: Reply("", is_final=True)
        _, reward, terminated, truncated, info = env.step("ls")
        assert (reward, terminated or truncated, info["won"]) == (0.0, True, False)
        assert info["reason"] == "sandbox_lost"
    env.reset(split="train", index=0)
    assert "tests" in env.step("ls")[0]


def test_limits_reach_the_sandbox(make: Any) -> None:
    env = make(limits={"processes": 8, "disk_mb": 4}, tools="bash")
    env.reset(split="train", index=0)
    assert "too many processes" in env.step("for i in $(seq 20); do sleep 9 & done; wait")[0]
    assert "No space left" in env.step("head -c 5M /dev/zero > big")[0]


def test_a_predictions_file_is_judged(
    caged: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = SweEnv()
    tasks = [env._find("valid", index) for index in range(3)]
    env.close()
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(dict(task.row)) for task in tasks))
    rows = [
        prediction(tasks[0].instance_id, "m", tasks[0].patch),
        prediction(tasks[1].instance_id, "m", tasks[0].patch),
        prediction("stranger", "m", ""),
    ]
    write_predictions(tmp_path / "p.jsonl", rows)
    out = tmp_path / "report.json"
    score.main([str(tmp_path / "tasks.jsonl"), str(tmp_path / "p.jsonl"), "--out", str(out), "--jobs", "2"])
    report = json.loads(out.read_text())
    one, two, three = (task.instance_id for task in tasks)
    assert report["resolved_ids"] == [one] and report["unresolved_ids"] == [two]
    assert report["missing_ids"] == [three] and report["unknown_ids"] == ["stranger"]
    assert "resolved 1 of 3" in capsys.readouterr().out
    # A task whose own patch does not fit its files costs the report nothing else.
    unfit = {**tasks[2].row, "bug_patch": "--- a/no.py\n+++ b/no.py\n@@ -1 +1 @@\n-a\n+b\n"}
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(dict(row)) for row in (unfit, tasks[0].row)))
    write_predictions(tmp_path / "p.jsonl", [prediction(three, "m", tasks[2].patch), rows[0]])
    with pytest.raises(SystemExit) as ended:
        score.main([str(tmp_path / "tasks.jsonl"), str(tmp_path / "p.jsonl"), "--out", str(out)])
    report, said = json.loads(out.read_text()), capsys.readouterr()
    assert ended.value.code == 1 and "resolved 1 of 2" in said.out
    assert f"error: {three} cannot be graded: task {three}: its bug_patch does not fit" in said.err
    assert list(report["errors"]) == [three] and report["unresolved_ids"] == report["missing_ids"] == []
