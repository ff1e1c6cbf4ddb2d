"""Measure the server beside the bare engine on this machine; prints one JSON object.

Server and engine are measured in turns, `--rounds` times, so that both meet the same load of the machine.

* latency: `--clients` clients ask, one request after another, for `--tokens` tokens each: over HTTP from a
  server in a second process, and from the engine's thread without HTTP. The difference of the medians is what
  the wire costs, apart from this: clients that take their time are answered in smaller, quicker batches.
* alone: the same with one client, where the difference is the wire's alone.
* cpu: CPU time of the server and of the bare engine for the same requests; the difference is the wire's work,
  which other programs on the machine hardly change.
* bursts: how often the engine ran for a request of every client; more than the bare engine's own means that
  requests came too late to share a batch. Like `cpu`, it hardly depends on the machine's load.
* first: seconds to the first tokens of a stream, both ways: under `server` and beside it under `engine`.
* mixed: `--mixed` requests of all kinds, also wrong ones and clients that go away; afterwards no slot is
  busy, and the server's memory is told after a tenth, half and all.

    python scripts/bench_serve.py --mixed 10000 --out serve.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", help="also write the JSON here")
parser.add_argument("--source", default="quickstart", help="what to serve, as of empg-jax serve")
parser.add_argument("--overrides", nargs="*", default=["model.tokenizer=bytes", "serve.max_tokens=256"])
parser.add_argument("--clients", type=int, default=32)
parser.add_argument("--requests", type=int, default=8, help="of each client in each round")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--tokens", type=int, default=32)
parser.add_argument("--mixed", type=int, default=1000)
args = parser.parse_args()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "envs")]

import numpy as np
from serving import serving

from empg_jax.serve.driver import Driver, Job
from empg_jax.serve.policy import open_policy

OVERRIDES = [*args.overrides, f"serve.slots={args.clients}"]


def make_prompt(client: int, number: int) -> list[int]:
    return [65 + client % 26, 97 + number % 26, *range(40, 70)]


# ---------------------------------------------------------------------------------- without HTTP


def measure_engine(driver: Driver, clients: int, *, is_streamed: bool) -> list[float]:
    """Ask as the clients do, from callbacks; returns seconds per request, or to the first tokens."""
    taken: list[float] = []
    done = threading.Semaphore(0)

    def ask(client: int, number: int) -> None:
        began, is_first = time.monotonic(), [True]

        def receive(update):
            if is_first[0] and (is_streamed or update.is_final):
                taken.append(time.monotonic() - began)
                is_first[0] = False
            if not update.is_final:
                return
            if number + 1 < args.requests:
                ask(client, number + 1)
            else:
                done.release()

        prompt = np.asarray(make_prompt(client, number), np.int32)
        driver.submit([Job(prompt, args.tokens, 1.0, number, 0, receive, is_streamed=is_streamed)])

    for client in range(clients):
        ask(client, 0)
    for _ in range(clients):
        done.acquire()
    return taken


# ------------------------------------------------------------------------------------- over HTTP


class Client:
    """A connection that is kept; as little work as possible beside the server's."""

    def __init__(self, url: str) -> None:
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, path: str, body: bytes) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)

    async def post(self, path: str, body: dict) -> tuple[int, float]:
        """Return the status, and the seconds to the first bytes of the answer's body."""
        began = time.monotonic()
        self.send(path, json.dumps(body).encode())
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(head.split()[1])
        if "content-length: " in head:
            await self.reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
            return status, time.monotonic() - began
        first = None
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            await self.reader.readexactly(size + 2)
            first = first or time.monotonic() - began
        await self.reader.readexactly(2)
        return status, first or 0.0


async def measure_http(url: str, clients: int, *, is_streamed: bool) -> list[float]:
    async def run(client: int) -> list[float]:
        taken = []
        async with Client(url) as connection:
            for number in range(args.requests):
                body = {"prompt": make_prompt(client, number), "max_tokens": args.tokens, "seed": number}
                _, seconds = await connection.post("/v1/completions", body | {"stream": is_streamed})
                taken.append(seconds)
        return taken

    return [s for taken in await asyncio.gather(*map(run, range(clients))) for s in taken]


async def send_mixed(url: str, count: int, seed: int) -> dict[str, int]:
    """Send requests of all kinds; returns how often each status came."""
    draw = random.Random(seed)
    left = [count]
    statuses: dict[str, int] = {}

    async def run() -> None:
        while left[0] > 0:
            async with Client(url) as connection:
                for _ in range(20):
                    left[0] -= 1
                    kind = draw.choice(["chat", "stream", "tokens", "stop", "wrong", "leave"])
                    path, body = make_request(draw, kind)
                    if kind == "leave":
                        connection.send(path, json.dumps(body).encode())
                        await connection.writer.drain()
                        status = "left"
                        break
                    status = str((await connection.post(path, body))[0])
                    statuses[status] = statuses.get(status, 0) + 1
                if status == "left":
                    statuses["left"] = statuses.get("left", 0) + 1

    await asyncio.gather(*(run() for _ in range(args.clients)))
    return statuses


def make_request(draw: random.Random, kind: str) -> tuple[str, dict]:
    prompt = [draw.randrange(32, 127) for _ in range(draw.randrange(1, 100))]
    text, length = bytes(prompt).decode(), draw.randrange(1, 40)
    match kind:
        case "chat":
            messages = [{"role": "user", "content": text}]
            return "/v1/chat/completions", {"messages": messages, "max_tokens": length, "logprobs": True}
        case "tokens":
            return "/inference/v1/generate", {"token_ids": prompt, "sampling_params": {"max_tokens": length}}
        case "wrong":
            return "/v1/completions", {"prompt": [7] * draw.choice([1, 500]), "top_p": 0.5}
    stop = {"stop": "e"} if kind == "stop" else {}
    return "/v1/completions", {"prompt": text, "max_tokens": length, "stream": kind != "stop", **stop}


def resident_mb(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def read_health(url: str) -> dict:
    """Return the server's counts."""
    with urllib.request.urlopen(f"{url}/health") as answer:
        return json.load(answer)


async def settle(url: str) -> dict:
    """Wait until no slot is busy; returns the server's counts."""
    for _ in range(500):
        health = read_health(url)
        if not health["busy"] and not health["waiting"]:
            break
        await asyncio.sleep(0.02)
    return health


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {f"p{p}_ms": round(1e3 * cuts[p - 1], 3) for p in (50, 95)}


def measure_round(process: subprocess.Popen, url: str, driver: Driver) -> dict[str, dict]:
    """Measure the server, then the bare engine, at nearly the same time: the machine's load is the same."""

    def ask(clients: int, is_streamed: bool) -> list[float]:
        return asyncio.run(measure_http(url, clients, is_streamed=is_streamed))

    began, before = cpu_seconds(process.pid), read_health(url)["bursts"]
    over_http = {"latency": ask(args.clients, False)}
    cpu = {"server": (cpu_seconds(process.pid) - began) / len(over_http["latency"])}
    bursts = {"server": (read_health(url)["bursts"] - before) / args.requests}
    began, before = time.process_time(), driver.engine.stats.bursts
    bare = {"latency": measure_engine(driver, args.clients, is_streamed=False)}
    cpu["engine"] = (time.process_time() - began) / len(bare["latency"])
    bursts["engine"] = (driver.engine.stats.bursts - before) / args.requests
    for name, clients, is_streamed in (("first", args.clients, True), ("alone", 1, False)):
        over_http[name] = ask(clients, is_streamed)
        bare[name] = measure_engine(driver, clients, is_streamed=is_streamed)
    return {"server": over_http, "engine": bare, "cpu": cpu, "bursts": bursts}


async def measure_mixed(process: subprocess.Popen, url: str) -> dict:
    statuses: dict[str, int] = {}
    memory = {}
    tenth = max(1, args.mixed // 10)
    for name, count in (("a_tenth", tenth), ("half", 4 * tenth), ("all", args.mixed - 5 * tenth)):
        for status, found in (await send_mixed(url, count, seed=count)).items():
            statuses[status] = statuses.get(status, 0) + found
        health = await settle(url)
        memory[name] = round(resident_mb(process.pid), 1)
    return {
        "requests": args.mixed,
        "statuses": statuses,
        "busy_after": health["busy"],
        "waiting_after": health["waiting"],
        "rss_mb_after": memory,
    }


def summarize(rounds: list[dict[str, dict]]) -> dict:
    """Return percentiles over all rounds, and medians of the rounds' differences."""
    result: dict = {"clients": args.clients, "tokens": args.tokens, "rounds": len(rounds)}
    for name in ("latency", "first", "alone"):
        medians = [
            [statistics.median(found[side][name]) for side in ("server", "engine")] for found in rounds
        ]
        result[f"{name}_over_the_engine_ms"] = round(1e3 * statistics.median(a - b for a, b in medians), 3)
    over = [found["cpu"]["server"] - found["cpu"]["engine"] for found in rounds]
    result["cpu_over_the_engine_ms"] = round(1e3 * statistics.median(over), 3)
    for side in ("server", "engine"):
        result[side] = {
            name: percentiles([s for found in rounds for s in found[side][name]])
            for name in ("latency", "first", "alone")
        } | {
            "cpu_ms": round(1e3 * statistics.median(found["cpu"][side] for found in rounds), 3),
            "bursts": statistics.median(found["bursts"][side] for found in rounds),
        }
    return result


def main() -> int:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(folder, "serve", args.source, *OVERRIDES) as found,
    ):
        policy = open_policy(args.source, OVERRIDES, print)
        policy.engine.warm_up()
        with Driver(policy.engine, max_waiting=args.clients) as driver:
            measure_round(found.process, found.url, driver)  # whatever is slow only once
            rounds = [measure_round(found.process, found.url, driver) for _ in range(args.rounds)]
        result = summarize(rounds) | {"mixed": asyncio.run(measure_mixed(found.process, found.url))}
    print(json.dumps(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
