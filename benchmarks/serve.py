"""What a server gets through: many clients at once against one request at a time, and what a stop loses.

    python benchmarks/serve.py [--seconds 60] [--clients 64] [--threads N]

Three parts, each against a `clipadapt serve` of its own, with a model adapted to handwritten digits on the embedded
backbone. `together`: CLIENTS clients, each of which sends its next picture when it has the answer to the last (a closed
loop). `alone`: one client, batch size 1, no waiting. `stop`: SIGTERM while all clients are asking; a request is lost
when its client has sent it and gets no whole answer. The first two take turns, a quarter of the time each, so that
both see the same machine; the servers sleep while they are not asked. Prints one JSON line and appends it to
serve.jsonl. Clients are one process of their own, which shares the cores with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import clipadapt
from clipadapt.data import Dataset
from clipadapt.data.digits import handwritten_digits

LOG = Path(__file__).with_suffix(".jsonl")


class Tally:
    """What clients saw: seconds of each answer, and what went wrong."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.errors: list[str] = []
        self.seconds = 0.0

    def figures(self) -> dict[str, Any]:
        p50, p99 = np.percentile(self.latencies, [50, 99]) * 1000
        return {
            "requests": len(self.latencies),
            "errors": len(self.errors),
            "per_second": round(len(self.latencies) / self.seconds, 1),
            "p50_ms": round(p50, 1),
            "p99_ms": round(p99, 1),
        }


@contextmanager
def server(model: Path, threads: int, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server: (its process, its address)."""
    command = [sys.executable, "-m", "clipadapt.cli", "serve", str(model), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert running.stdout is not None
        found = re.search(r"http://\S+", running.stdout.readline())
        if found is None:
            raise SystemExit("The server did not start.")
        yield running, found.group()
    finally:
        running.kill()
        running.wait()


def bodies(digits: Dataset, count: int) -> list[bytes]:
    """Requests to classify one picture each, as they go over the wire."""
    requests = []
    for item in digits.items[:count]:
        file = BytesIO()
        item.open().save(file, "PNG")
        request = httpx.Request("POST", "http://server/v1/classify", files={"image": ("digit.png", file.getvalue())})
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        requests.append(f"POST /v1/classify HTTP/1.1\r\n{head}\r\n".encode() + request.read())
    return requests


class Connection:
    """As little of an HTTP client as will do, since it takes its time from the server's cores."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.removeprefix("http://").partition(":")
        self.open = False

    async def connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))
        self.open = True

    async def ask(self, request: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer; raises OSError, EOFError or ValueError if there is no whole one."""
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", head)
        if length is None:
            raise ValueError(f"an answer without a length: {head}")
        body = await self._reader.readexactly(int(length[1]))
        if "connection: close" in head:
            self._writer.close()
            self.open = False
        return int(head.split()[1]), json.loads(body)


async def load(address: str, requests: list[bytes], clients: int, seconds: float, tally: Tally) -> None:
    """Ask in a closed loop for some seconds; where these are infinite, until the server listens no more."""
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        connection = Connection(address)
        for request in cycle(requests[number:] + requests[:number]):
            if time.perf_counter() >= end:
                return
            try:
                if not connection.open:
                    await connection.connect()
            except OSError as error:
                if seconds != float("inf"):
                    tally.errors.append(repr(error))
                return  # nothing was sent
            began = time.perf_counter()
            try:
                status, answer = await connection.ask(request)
            except (OSError, EOFError, ValueError) as error:
                tally.errors.append(repr(error))
                return
            tally.latencies.append(time.perf_counter() - began)
            if status != 200 or len(answer["results"][0]["predictions"]) != 5:
                tally.errors.append(f"{status} {answer}"[:200])

    began = time.perf_counter()
    await asyncio.gather(*(client(number % len(requests)) for number in range(clients)))
    tally.seconds += time.perf_counter() - began


def measure(model: Path, requests: list[bytes], clients: int, seconds: float, threads: int) -> dict[str, Any]:
    together, alone, stopped = Tally(), Tally(), Tally()
    one_at_a_time = ("--batch-size", "1", "--wait-ms", "0")
    with server(model, threads) as (_, many), server(model, threads, *one_at_a_time) as (_, single):
        for address in (many, single):  # what is made at the first request is not counted
            asyncio.run(load(address, requests, 8, 2.0, Tally()))
        for _ in range(4):
            asyncio.run(load(many, requests, clients, seconds / 4, together))
            asyncio.run(load(single, requests, 1, seconds / 4, alone))
    with server(model, threads) as (running, address):

        async def stop() -> None:
            asking = asyncio.create_task(load(address, requests, clients, float("inf"), stopped))
            await asyncio.sleep(min(seconds / 4, 5.0))
            running.send_signal(signal.SIGTERM)
            await asking

        asyncio.run(stop())
        code = running.wait(60)
    figures = {"together": together.figures(), "alone": alone.figures()}
    return {
        "clients": clients,
        **figures,
        "ratio": round(figures["together"]["per_second"] / figures["alone"]["per_second"], 2),
        "stop": {"answered": len(stopped.latencies), "lost": len(stopped.errors), "exit": code},
        "first_errors": [*together.errors[:3], *alone.errors[:3], *stopped.errors[:3]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two ways of asking")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    args = parser.parse_args()
    train, test = handwritten_digits().split(test=0.3, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "digits"
        method = clipadapt.create("tip-adapter", templates="a picture of the digit {}.")
        method.fit(clipadapt.load_backbone(), train.few_shot(16, seed=1)).save(model)
        line = measure(model, bodies(test, 500), args.clients, args.seconds, args.threads)
    line |= {
        "seconds": args.seconds,
        "threads": args.threads,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(line), flush=True)
    with LOG.open("a") as log:
        log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
