"""One uvicorn process for the application, which stops without losing a request that it has accepted."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from clipadapt.errors import ClipadaptError

_GRACE = 1.0  # seconds in which connections that are kept alive may still send a request when the server stops
_LARGEST_HEAD = 65_536  # bytes of a request's line and headers that are read at all; the gate allows fewer


def run(app: FastAPI, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what was accepted; a second Ctrl-C stops at once.

    Args:
        app: what `create_app` gives.
        host: the address to listen on.
        port: 0 takes a free one.
        ready: called with the server's address when it takes requests.

    Raises:
        ClipadaptError: the address cannot be listened on.
        KeyboardInterrupt: it was stopped by Ctrl-C.
    """
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False, http="h11",
        h11_max_incomplete_event_size=_LARGEST_HEAD, lifespan="on", ws="none",
    )  # fmt: skip
    listener = _bind(host, port)
    # uvicorn sends itself the signal again when all is done; a SIGTERM that was obeyed is not a failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with listener:
        _Server(config, ready).run(sockets=[listener])


def _bind(host: str, port: int) -> socket.socket:
    # The protocol is named: only then does asyncio turn off the algorithm of Nagle, with which each answer waits 40 ms
    # for an acknowledgement between its head and its body.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ClipadaptError(f"The server cannot listen on {host}, port {port}: {error.strerror or error}.") from None
    return listener


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but a connection that is kept alive is not closed under a client that is about to use it.

        From now on every answer closes its connection. Those on which nothing is asked any more are closed in the end.
        """
        loop = asyncio.get_running_loop()
        for listener in (listener for server in self.servers for listener in server.sockets):
            loop.remove_reader(listener.fileno())
        await asyncio.sleep(0.01)  # what is accepted already gets its connection
        for server in self.servers:
            server.close()
        self.config.app.state.draining = True  # type: ignore[union-attr]
        end = loop.time() + _GRACE
        while self.server_state.connections and loop.time() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
