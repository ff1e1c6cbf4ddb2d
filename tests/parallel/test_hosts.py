"""The meeting of hosts, in threads of one process, and what says that there are several."""

import contextlib
import math
import socket
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from empg_jax.errors import ConfigError
from empg_jax.parallel import hosts as hosts_module
from empg_jax.parallel.detect import find_seat, scheduler
from empg_jax.parallel.hosts import ALONE, SMALL_BYTES, HostLost, Hosts
from empg_jax.parallel.rendezvous import Seat, Watch, meet


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


def meet_all(seats, facts):
    """Lets all meet at the same time; returns lines, or the error of each."""
    results = [None] * len(seats)

    def run(place):
        try:
            results[place] = meet(seats[place], facts[place])
        except ConfigError as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(seats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def seats(indices, *, num=None, timeout=20.0):
    port = free_port()
    return [Seat(("127.0.0.1", port), num or len(indices), index, timeout) for index in indices]


def test_hosts_meet_and_hear_of_stops_and_ends():
    places = seats([0, 1, 2])
    lines = meet_all(places, [{"seed": 1}] * 3)
    assert sorted(lines[0]) == [1, 2] and list(lines[1]) == [0]
    stops, losses = ([[], [], []] for _ in range(2))
    watches = [
        Watch(place, line, on_lost=losses[i].append, on_stop=stops[i].append)
        for i, (place, line) in enumerate(zip(places, lines, strict=True))
    ]
    watches[1].tell(stop=15)
    wait_for(lambda: stops[0] == [15] and stops[2] == [15])
    watches[2].close()  # done: nobody misses it
    watches[1].tell(ended="no space left")
    watches[1].close()
    wait_for(lambda: losses[0])
    assert "host 1" in losses[0][0] and "has ended: no space left" in losses[0][0]
    assert not losses[1] and not losses[2]
    watches[0].close()
    wait_for(lambda: not any(thread.name.startswith("host-") for thread in threading.enumerate()))


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_hosts_meet_over_ipv6():
    address = f"[::1]:{free_port()}"
    places = [find_seat(keys(coordinator=address, num=2, index=i, timeout=20.0))[0] for i in (0, 1)]
    lines = meet_all(places, [{}, {}])
    assert list(lines[0]) == [1] and list(lines[1]) == [0]
    for each in (*lines[0].values(), *lines[1].values()):
        each.close()


def test_addresses_of_ipv6_have_brackets():
    seat = find_seat(keys(coordinator="[fe80::1]:5000", num=2, index=1))[0]
    assert (seat.coordinator, seat.address(), seat.address(1)) == (
        ("fe80::1", 5000),
        "[fe80::1]:5000",
        "[fe80::1]:5001",
    )
    assert find_seat(keys(coordinator="node0:5000", num=2, index=1))[0].address(1) == "node0:5001"


def test_a_silent_host_is_gone():
    places = seats([0, 1], timeout=1.0)
    lines = meet_all(places, [{}] * 2)
    losses = []
    watch = Watch(places[0], lines[0], on_lost=losses.append, on_stop=print)
    wait_for(lambda: losses)  # host 1 sends no sign of life
    assert "host 1" in losses[0] and "did not answer for 1 s" in losses[0]
    watch.close()
    for line in (lines[0][1], lines[1][0]):
        line.close()


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_hosts_that_differ_are_refused():
    first, second = meet_all(seats([0, 1]), [{"seed": 1, "version": "2"}, {"seed": 1, "version": "3"}])
    for error in (first, second):
        assert "host 1" in str(error) and "version='3' (host 0: '2')" in str(error)
    first, second = meet_all([seats([0])[0], seats([1], num=2, timeout=1.0)[0]], [{}] * 2)
    assert "nobody answers" in str(second)


def test_an_index_out_of_range_is_refused():
    port = free_port()
    places = [Seat(("127.0.0.1", port), 2, 0, 20.0), Seat(("127.0.0.1", port), 3, 2, 20.0)]
    for error in meet_all(places, [{}] * 2):
        assert "hosts.num=3" in str(error) and "hosts.num=2 on host 0" in str(error)


def test_another_program_on_the_port_is_no_host():
    place = seats([0], num=2, timeout=5.0)[0]
    results = []

    def run():
        with pytest.raises(ConfigError) as caught:
            meet(place, {})
        results.append(str(caught.value))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(200):
        try:
            with socket.create_connection(place.coordinator, timeout=2.0) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except OSError:
            time.sleep(0.02)
    thread.join(60)
    assert "host 1 of 2 did not come" in results[0]


def test_only_the_scheduler_s_variables_count():
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a,b"}
    assert scheduler({}) is None
    assert scheduler(slurm) == "Slurm"
    assert scheduler(slurm | {"SLURM_NTASKS": "1"}) is None
    assert scheduler({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # any pod, for example a notebook's
    assert scheduler({"TPU_WORKER_HOSTNAMES": "a,b"}) == "TPU pod"
    assert scheduler({"TPU_WORKER_HOSTNAMES": "a"}) is None


def keys(**given):
    none = dict(enabled="auto", coordinator=None, num=None, index=None, timeout=1.0)
    return SimpleNamespace(**none | given)


def test_the_seat_follows_from_the_keys(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    given = keys(coordinator="node0:99", num=2, index=1)
    assert find_seat(given)[0] == Seat(("node0", 99), 2, 1, 1.0)
    assert find_seat(keys())[0] is None
    assert find_seat(keys(enabled=False))[0] is None
    assert find_seat(keys(coordinator="node0:99", num=1, index=0))[0] is None
    with pytest.raises(ConfigError, match=r"hosts\.enabled=true, but JAX finds no"):
        find_seat(keys(enabled=True))


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.mark.parametrize(
    ("left", "host", "devices"),
    [
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, "gpu07", None),  # alone on its machine: all devices there
        (SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "1"}, "gpu07", [1]),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "10.96.0.1", None),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            "10.96.0.1",
            [1],
        ),
    ],
)
def test_the_seat_follows_from_what_the_scheduler_left(left, host, devices, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    seat, local_devices = find_seat(keys())
    assert seat.coordinator[0] == host and (seat.num, seat.index) == (2, 1)
    assert local_devices == devices


@pytest.mark.filterwarnings("ignore:\nKubernetes environment detected")
def test_a_jobset_that_jax_cannot_ask_is_told_the_keys(monkeypatch):
    for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "JOBSET_NAME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sys.modules, "kubernetes", None)  # the package that JAX asks with
    assert scheduler() == "JobSet"
    with pytest.raises(ConfigError, match=r"set hosts\.coordinator, hosts\.num and hosts\.index"):
        find_seat(keys())


class SlowStore:
    """A key-value store of the coordinator on a clock of its own: values take time by their size."""

    def __init__(self, seconds_per_byte):
        self.values, self.now, self._pace = {}, 0.0, seconds_per_byte

    def monotonic(self):
        return self.now

    def key_value_set_bytes(self, key, value):
        self.values[key] = value

    def key_value_delete(self, key):
        for each in [each for each in self.values if each == key or each.startswith(f"{key}/")]:
            del self.values[each]

    def blocking_key_value_get_bytes(self, key, milliseconds):
        needed = len(self.values[key]) * self._pace if key in self.values else math.inf
        self.now += min(needed, milliseconds / 1000)
        if needed > milliseconds / 1000:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return self.values[key]


def exchange_with(monkeypatch, store, large, timeout=60.0):
    """Exchanges a large value with a host that has said it, and then a small one."""
    monkeypatch.setattr(hosts_module, "_client", lambda: store)
    monkeypatch.setattr(hosts_module, "time", store)
    first, second = Hosts(0, 2), Hosts(1, 2)
    first._timeout = timeout
    for content in (large, b"small"):
        with pytest.raises(HostLost, match="host 0 did not come to 'batch' in time"):
            second.exchange("batch", content, seconds=0.0)
        second._parted = None
    return [first.exchange("batch", b"own"), first.exchange("batch", b"own")]


def test_a_value_that_takes_longer_than_one_wait_arrives(monkeypatch):
    large = bytes(SMALL_BYTES + 1)
    store = SlowStore(20.0 / len(large))
    assert exchange_with(monkeypatch, store, large) == [[b"own", large], [b"own", b"small"]]
    assert store.now < 60.0
    assert not [key for key in store.values if "/0/0" in key]  # what all have read is deleted


def test_a_value_larger_than_a_message_comes_in_parts(monkeypatch):
    monkeypatch.setattr(hosts_module, "PART_BYTES", SMALL_BYTES // 2)
    large = np.random.default_rng(0).bytes(SMALL_BYTES + 1)
    store = SlowStore(50.0 / SMALL_BYTES)  # each part within its limit, all together not
    assert exchange_with(monkeypatch, store, large) == [[b"own", large], [b"own", b"small"]]
    assert store.now > 60.0 and max(map(len, store.values.values())) <= SMALL_BYTES
    assert not [key for key in store.values if "/0/0" in key]


def test_a_value_that_never_arrives_ends_the_wait(monkeypatch):
    store = SlowStore(1.0)
    with pytest.raises(HostLost, match=r"what host 1 said of 'batch' did not arrive within 30 s"):
        exchange_with(monkeypatch, store, bytes(SMALL_BYTES + 1), timeout=30.0)


def test_alone_everything_is_agreed():
    assert ALONE.agree("x", {"a": 1}) == [{"a": 1}] and ALONE.any("x", True)
    assert ALONE.exchange("x", b"1") == [b"1"] and ALONE.first("x", lambda: 3) == 3
