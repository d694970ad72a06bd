"""Who may come in: the token, the Host and Origin of requests, how many tabs there are, and how fast they may ask."""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Mapping

#: Most tabs at once, most bytes of a command, and commands that a tab may send in a second and at once.
TABS, MESSAGE_BYTES, PER_SECOND, BURST = 8, 4096, 120.0, 240.0

#: On every answer. The page takes nothing from elsewhere, runs only its own file, and is shown in no other page.
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Door:
    """What the server of one program lets in.

    host, port: where it listens. Requests must name it by one of its names in their Host: a name of somebody else's
    that was pointed at this address (DNS rebinding) is refused; and so is a page of another origin.
    """

    def __init__(self, host: str, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        names = {host, *_names_of(host)}
        #: Values of Host that mean this server.
        self.hosts = {_netloc(name, port) for name in names} | ({*names} if port == 80 else set())
        self.tabs = 0

    def refusal(self, host: str | None, origin: str | None, token: str | None, connects: bool) -> str | None:
        """Why a request is refused; None: it is welcome. connects: whether it opens a connection, which only a page of
        this server does; browsers say where a page is from."""
        if (host or "").lower() not in self.hosts:
            return "this server is not known by that name; open the address that dreamer play printed"
        origins = {f"http://{name}" for name in self.hosts}
        if (origin is None and connects) or (origin is not None and origin.lower() not in origins):
            return "pages from elsewhere may not connect"
        if not hmac.compare_digest((token or "").encode(), self.token.encode()):
            return "the token is missing or wrong; open the whole address that dreamer play printed"
        return None


class Pace:
    """Commands of one tab: `PER_SECOND`, and up to `BURST` at once."""

    def __init__(self) -> None:
        self._left, self._then = BURST, time.monotonic()

    def allows(self) -> bool:
        """Whether one more may come now."""
        now = time.monotonic()
        self._left, self._then = min(BURST, self._left + (now - self._then) * PER_SECOND), now
        self._left -= 1
        return self._left >= 0


def _netloc(name: str, port: int) -> str:
    return f"[{name}]:{port}".lower() if ":" in name else f"{name}:{port}".lower()


def _names_of(host: str) -> set[str]:
    """Other names by which people reach what listens on an address."""
    if host in ("127.0.0.1", "::1", "localhost"):
        return {"localhost", "127.0.0.1", "::1"}
    if host not in ("0.0.0.0", "::"):
        return set()
    import psutil

    found = {"localhost", socket.gethostname(), socket.getfqdn()}
    for addresses in psutil.net_if_addrs().values():
        kinds = (socket.AF_INET, socket.AF_INET6)
        found |= {one.address.partition("%")[0] for one in addresses if one.family in kinds}
    return found
