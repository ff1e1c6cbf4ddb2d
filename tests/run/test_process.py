"""Stop requests, phase times, the count of compilations."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from empg_jax.run.process import CompileCounter, PhaseClock, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_an_interrupt(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop() and stop.signum == 0
        os.kill(os.getpid(), number)
        assert stop() and stop.signum == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_the_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_a_stop_is_set_by_hand():
    found = []

    def work():
        with StopRequest() as stop:
            stop.set()
            found.append((stop(), stop.signum))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(True, signal.SIGTERM)]


def test_phases_add_up_even_when_one_fails(monkeypatch):
    times = iter([0.0, 2.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr("empg_jax.run.process.time.monotonic", lambda: next(times))
    clock = PhaseClock({"rollout": 1.0})
    with clock.phase("rollout"):
        pass
    with pytest.raises(ZeroDivisionError), clock.phase("update"):
        raise ZeroDivisionError
    with clock.phase("update"):
        pass
    assert clock.seconds == {"rollout": 3.0, "update": 3.5}
    assert clock.lap() == {"rollout": 2.0, "update": 3.5} and clock.lap() == {}


def test_a_phase_inside_another_stops_its_time_and_one_that_is_open_counts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("empg_jax.run.process.time.monotonic", lambda: now[0])
    clock = PhaseClock()
    with clock.phase("sft"):
        now[0] = 4.0
        assert clock.seconds == {"sft": 4.0}  # what a checkpoint of the warm start keeps
        with clock.phase("checkpoint"):
            now[0] = 5.0
            assert clock.seconds == {"sft": 4.0, "checkpoint": 1.0}
        now[0] = 7.0
        assert clock.lap() == {"sft": 6.0, "checkpoint": 1.0}
        now[0] = 7.5
    now[0] = 9.0
    assert clock.seconds == {"sft": 6.5, "checkpoint": 1.0} and clock.lap() == {"sft": 0.5}
    clock.add({"sft": 2.0, "eval": 1.0})
    assert clock.seconds == {"sft": 8.5, "checkpoint": 1.0, "eval": 1.0}


def test_every_new_shape_is_counted_once():
    double = jax.jit(lambda x: x * 2)
    short, long = jnp.ones(3), jnp.ones(5)
    with CompileCounter() as counter:
        double(short)
        double(short)
        assert counter.count == 1
        double(long)
        assert counter.count == 2
    double(jnp.ones(7))
    assert counter.count == 2  # outside, nothing is counted


def test_programs_from_the_persistent_cache_count_too():
    with CompileCounter() as counter:
        for _ in range(2):
            jax.jit(lambda x: x * 3 + 1)(jnp.ones(11)).block_until_ready()
        assert counter.count >= 2
