"""The real thing: `clipadapt serve` in a process of its own, stopped under load, fed raw bytes."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
from typer.testing import CliRunner

from clipadapt.cli.app import app
from tests.serve.conftest import files
from tests.tiny import tiny_clip


@contextmanager
def process(*arguments, **environment):
    """A running server: (its process, its address). It is killed in the end if it still runs."""
    command = [sys.executable, "-m", "clipadapt.cli", "serve", *map(str, arguments), "--port", "0"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        # A shell that runs the tests in the background has them ignore Ctrl-C, and so would the server.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        line = running.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, line + running.stderr.read()
        yield running, address.group()
    finally:
        running.kill()
        running.communicate()


class Client(threading.Thread):
    """Asks without a pause, on one connection that is kept alive, until the server takes no more."""

    def __init__(self, address, image):
        super().__init__()
        self.host, self.image = address.removeprefix("http://"), image
        self.answered, self.lost, self.statuses = 0, [], set()

    def run(self):
        body, kind = multipart(self.image)
        while True:
            connection = http.client.HTTPConnection(self.host, timeout=30)
            try:
                connection.connect()
            except OSError:
                return  # the server listens no more
            try:
                while connection.sock is not None:
                    connection.request("POST", "/v1/classify", body, {"Content-Type": kind})
                    answer = connection.getresponse()
                    json.loads(answer.read())
                    self.statuses.add(answer.status)
                    self.answered += 1
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.lost.append(repr(error))
                return


def multipart(image):
    request = httpx.Request("POST", "http://x", files=files(image))
    return request.read(), request.headers["content-type"]


def test_a_stop_under_load_loses_no_request_and_ends_well(folders):
    with process(folders.pets, "--wait-ms", 20) as (running, address):
        clients = [Client(address, image) for image in folders.images[:12]]
        for client in clients:
            client.start()
        while any(client.answered < 3 for client in clients):
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(30)
        _, errors = running.communicate(timeout=30)
        assert running.returncode == 0
        assert [client.lost for client in clients] == [[]] * 12
        assert {status for client in clients for status in client.statuses} == {200}
    lines = [json.loads(line) for line in errors.splitlines()]  # every one of them is JSON
    answered = sum(line.get("path") == "/v1/classify" and line["status"] == 200 for line in lines)
    assert answered == sum(client.answered for client in clients)


def raw(address, data, *, wait=5.0):
    """Send bytes, give back the status line of what comes."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        return connection.recv(65_536).split(b"\r\n")[0].decode()


def test_raw_bytes_too_large_bodies_and_keys_on_the_wire(folders):
    key = "correct-horse-battery"
    with process(folders.pets, "--max-body-mb", 0.1, CLIPADAPT_API_KEYS=key) as (running, address):
        assert " 400 " in raw(address, b"\x16\x03\x01 no HTTP \xff\r\n\r\n")
        assert " 400 " in raw(address, b"GET / HTTP/1.1\r\n\r\n")  # no Host
        assert " 4" in raw(address, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 300_000 + b"\r\n\r\n")
        assert " 400 " in raw(address, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n")
        assert " 404 " in raw(
            address, f"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n".encode()
        )
        assert " 413 " in raw(
            address,
            f"POST /v1/search HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nContent-Length: {10**12}\r\n\r\n".encode(),
        )
        with httpx.Client(base_url=address, timeout=30) as client:
            large = [("image", ("x", b"x" * 5_000_000))]
            assert client.post("/v1/classify", files=large).status_code == 401
            client.headers["Authorization"] = f"Bearer {key}"
            answer = client.post("/v1/classify", files=large)  # the answer arrives although the body was not read
            assert (answer.status_code, answer.json()["error"]["type"]) == (413, "too_large")
            assert client.post("/v1/classify", files=files(folders.images[0])).status_code == 200
            assert client.get("/").status_code == 200
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130


def test_bad_beginnings_are_one_sentence(tmp_path):
    answer = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert (answer.exit_code, answer.stderr) == (1, f"error: {tmp_path} is not a saved model: it has no config.json.\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "clipadapt.cli", "serve", "--backbone", tiny_clip(), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in done.stderr
