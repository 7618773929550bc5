"""How uvicorn serves the front and ends, and a connection whose client must come to the point."""

import asyncio
import logging
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from koff_lightning.serving.guard import READ


class Connection(AutoHTTPProtocol):
    """uvicorn's connection, closed when the head of a request does not come in time; guard.py does so for its body.

    uvicorn's own limit is on idle connections, and a byte now and then is not idle.
    """

    seconds = READ
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for a head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head, until it is there."""
        if self._late is None and not self._under_way():
            self._wait()
        super().data_received(data)
        if self._under_way():
            self._done()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing."""
        self._done()
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: any client could fill the log, and the advice to install WebSockets is none."""

    def _under_way(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._late = self.loop.call_later(self.seconds, self._leave)

    def _done(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _leave(self) -> None:
        self._late = None
        self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which a second signal of any kind ends at once.

    uvicorn does so for Ctrl-C alone, and writes a traceback for each request that it cuts off.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End when all is answered; at once if that was asked for before."""
        if self.should_exit:
            self.force_exit = True
            logging.getLogger("uvicorn.error").disabled = True
        super().handle_exit(sig, frame)


def config(app: ASGIApp, patience: float) -> uvicorn.Config:
    """How the front is served.

    Args:
        app: The front.
        patience: Seconds in which requests under way are answered once the server is to end.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(patience) + 1,
        server_header=False,
    )
