"""The server of `dreamer play`: the page, and for each tab a WebSocket with a session of its own.

Commands come as JSON texts; frames go out as binary messages (`Session.frame`), everything else as JSON texts:
{"hello": ...} once, {"note": words}, {"error": words}. A session runs in a thread of its own, because environments are
not made for several; the next frame is made when the last one has been sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamer.play.door import HEADERS, MESSAGE_BYTES, TABS, Door, Pace
from dreamer.play.session import CommandError, Session
from dreamer.presets import ConfigError

if TYPE_CHECKING:
    from aiohttp import web

#: The files of the page, and what they are; nothing else is served.
PAGE = Path(__file__).resolve().parent / "page"
FILES = {"index.html": "text/html", "style.css": "text/css", "page.js": "text/javascript"}
#: Seconds after which a tab that does not take its frames is let go, and between signs of life.
_PATIENCE, _HEARTBEAT = 20.0, 20.0
#: Seconds of waiting beyond which the rhythm begins anew instead of being caught up with.
_LATE = 0.25


def need_aiohttp() -> Any:
    """The package aiohttp. ConfigError, naming the extra, if it is not installed."""
    try:
        return importlib.import_module("aiohttp")
    except ImportError:
        raise ConfigError("expected the package aiohttp, which is not there; pip install 'dreamer[play]'") from None


def make_app(door: Door, make_session: Callable[[], Session]) -> web.Application:
    """The application. make_session: called in the thread of each tab."""
    need_aiohttp()
    from aiohttp import web

    def check(request: web.Request, connects: bool, token: bool = True) -> None:
        given = request.query.get("token") if token else door.token
        said = door.refusal(request.headers.get("Host"), request.headers.get("Origin"), given, connects)
        if said is not None:
            raise web.HTTPForbidden(text=said)

    async def page(request: web.Request) -> web.Response:
        check(request, connects=False)
        return _file("index.html")

    async def part(request: web.Request) -> web.Response:
        # Of style and script there is nothing to hide, and the page would have to pass the token on.
        check(request, connects=False, token=False)
        name = request.match_info["name"]
        if name not in FILES or name == "index.html":
            raise web.HTTPNotFound
        return _file(name)

    async def play(request: web.Request) -> web.WebSocketResponse:
        check(request, connects=True)
        if door.tabs >= TABS:
            raise web.HTTPServiceUnavailable(text=f"{TABS} tabs are open already; close one")
        socket = web.WebSocketResponse(max_msg_size=MESSAGE_BYTES, heartbeat=_HEARTBEAT, compress=False)
        door.tabs += 1
        try:
            await socket.prepare(request)
            await Tab(socket, make_session).run()
        finally:
            door.tabs -= 1
        return socket

    @web.middleware
    async def dressed(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
        try:
            response = await handler(request)
        except web.HTTPException as error:
            error.headers.update(HEADERS)
            raise
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    app = web.Application(middlewares=[dressed], client_max_size=MESSAGE_BYTES)
    app.router.add_get("/", page)
    app.router.add_get("/play", play)
    app.router.add_get("/page/{name}", part)
    return app


def _file(name: str) -> Any:
    from aiohttp import web

    return web.Response(body=(PAGE / name).read_bytes(), content_type=FILES[name], charset="utf-8")


class Tab:
    """One WebSocket and its session: two tasks, one that obeys and one that plays."""

    def __init__(self, socket: web.WebSocketResponse, make_session: Callable[[], Session]) -> None:
        self._socket, self._make = socket, make_session
        self._thread = ThreadPoolExecutor(1, "play")
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Until the page leaves or breaks a rule."""
        session: Session | None = None
        try:
            session = await self._do(self._make)
            await self._send(json.dumps(await self._do(session.hello)))
            await self._send(await self._do(session.frame))
            playing = asyncio.create_task(self._play(session))
            try:
                await self._obey(session)
            finally:
                playing.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError, TimeoutError):
                    await playing
        except (ConnectionError, TimeoutError):
            pass  # it left
        finally:
            if session is not None:
                await self._do(session.close)
            self._thread.shutdown(wait=False)

    async def _obey(self, session: Session) -> None:
        from aiohttp import WSCloseCode, WSMsgType

        pace = Pace()
        async for message in self._socket:
            if message.type != WSMsgType.TEXT:
                await self._socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"commands are texts")
                return
            if not pace.allows():
                await self._socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"too many commands")
                return
            try:
                words = await self._do(session.command, message.data)
                if words is not None:
                    await self._send(json.dumps({"note": words}))
            except CommandError as error:
                await self._send(json.dumps({"error": str(error)}))
            self._changed.set()

    async def _play(self, session: Session) -> None:
        """A step and a frame at each tick while the game is on, a frame after each command while it is not."""
        due = time.monotonic()
        while True:
            if session.playing:
                due = max(due + 1 / session.speed, time.monotonic() - _LATE)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self._changed.clear()
                if session.playing:
                    await self._do(session.tick)
            else:
                await self._changed.wait()
                self._changed.clear()
                due = time.monotonic()
            await self._send(await self._do(session.frame))

    async def _do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _send(self, data: str | bytes) -> None:
        """Waits until the page takes it. TimeoutError if it does not."""
        sent = self._socket.send_str(data) if isinstance(data, str) else self._socket.send_bytes(data)
        await asyncio.wait_for(sent, _PATIENCE)
