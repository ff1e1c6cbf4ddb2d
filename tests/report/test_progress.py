"""Progress: plain lines without a terminal, a bar with one, silence when switched off."""

import io

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
