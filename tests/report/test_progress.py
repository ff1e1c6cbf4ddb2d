"""Progress: plain lines without a terminal, a bar with one, silence when switched off."""

import io
import re

from rich.console import Console

from empg_jax.report.progress import Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def _run(terminal, enabled=True):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=160, highlight=False)
    with Progress(enabled, console=console, interval=5.0, clock=clock) as progress:
        progress.phase("RL", 10, "updates")
        for _ in range(10):
            clock.now += 2.0
            progress.advance(1, {"success_rate": 0.5, "tokens_per_second": 1234.0, "grad_norm": 3.0})
        progress.message("saved [checkpoint]")
    progress.close()
    return out.getvalue()


def test_plain_lines_come_every_few_seconds():
    lines = _run(terminal=False).splitlines()
    assert lines[0] == "RL: 10 updates"
    assert lines[1] == "RL: 3/10 updates, success 50%, tok/s 1,234, 6 s, 14 s left"
    assert [line.split(",")[0] for line in lines[2:4]] == ["RL: 6/10 updates", "RL: 9/10 updates"]
    assert lines[4] == "saved [checkpoint]"
    assert lines[5] == "RL: 10/10 updates, success 50%, tok/s 1,234, 20 s"
    assert len(lines) == 6


def test_a_terminal_gets_a_bar_with_the_numbers():
    text = _run(terminal=True)
    assert "10/10" in text and "success 50%" in text and "\x1b[" in text and "saved [checkpoint]" in text


def test_switched_off_only_messages_remain():
    assert _run(terminal=False, enabled=False) == "saved [checkpoint]\n"


def test_messages_are_shown_as_they_are(capsys):
    with Progress(enabled=False) as progress:
        progress.message("env.entry_point=my.houses:house: the reward is [bold] 3")
    assert "env.entry_point=my.houses:house: the reward is [bold] 3" in capsys.readouterr().err


def test_a_new_phase_ends_the_one_before():
    out = io.StringIO()
    with Progress(console=Console(file=out, width=160), clock=Clock()) as progress:
        progress.phase("warm start", 2, "updates")
        progress.advance(2, {"sft_loss": 0.25})
        progress.phase("RL", 3, "updates")
    assert out.getvalue().splitlines() == [
        "warm start: 2 updates",
        "warm start: 2/2 updates, loss 0.250, 0 s",
        "RL: 3 updates",
        "RL: 0/3 updates, 0 s",
    ]


def _lines(total, *, done, seconds, terminal=False, width=160):
    """What is shown when each unit takes so many seconds."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False)
    with Progress(console=console, interval=0.0, clock=clock) as progress:
        progress.phase("RL", total, "updates", done=done)
        for spent in seconds:
            clock.now += spent
            values = {"success_rate": 0.5, "eval_success": 0.41, "episode_return": 0.5, "entropy": 0.7}
            progress.advance(1, values)
    return out.getvalue().splitlines()


def test_what_an_earlier_process_did_says_nothing_of_the_speed():
    """79 updates of 6 s are left, whatever share of the run was done before."""
    lines = _lines(180, done=99, seconds=[6.0, 6.0])
    assert lines[2].startswith("RL: 101/180 updates") and lines[2].endswith("12 s, 7 min 54 s left")


def test_the_first_update_which_compiles_is_no_measure():
    lines = _lines(8, done=0, seconds=[60.0, 1.0, 1.0])
    assert lines[1].endswith(", 1 min 00 s")  # nothing is known yet
    assert lines[3].endswith("1 min 02 s, 5 s left")


def test_faults_are_added_up_and_shown_once_there_are_any():
    out, clock = io.StringIO(), Clock()
    with Progress(console=Console(file=out, width=160), interval=0.0, clock=clock) as progress:
        progress.phase("RL", 4, "updates")
        for discarded in (0.0, 2.0, 1.0):
            clock.now += 1.0
            progress.advance(
                1, {"success_rate": 0.5, "episodes_discarded": discarded, "worker_restarts": 0.0}
            )
    lines = out.getvalue().splitlines()
    assert lines[1].startswith("RL: 1/4 updates, success 50%")
    assert lines[2].startswith("RL: 2/4 updates, discarded 2, success 50%")
    assert lines[3].startswith("RL: 3/4 updates, discarded 3, success 50%")


def test_compiled_programs_are_counted_and_can_be_stopped():
    out, calls = io.StringIO(), []
    with Progress(console=Console(file=out, width=80), interval=0.0, clock=Clock()) as progress:
        count = progress.counting(lambda: calls.append(1), "compiling the learner", 3)
        for _ in range(3):
            count()
    lines = out.getvalue().splitlines()
    assert lines[1] == "compiling the learner: 1/3 programs, 0 s" and len(calls) == 3
    assert lines[-1] == "compiling the learner: 3/3 programs, 0 s"


def test_a_narrow_terminal_shows_phase_count_and_time():
    lines = _lines(10, done=0, seconds=[2.0] * 3, terminal=True, width=80)
    shown = [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", line).strip() for line in lines]
    assert re.fullmatch(r"RL ━+╸?━+ +3/10 updates \S+ left \S+", shown[-3]), shown
    assert shown[-2] == "success 50%, held-out 41.0%, reward 0.50, entropy 0.700"
