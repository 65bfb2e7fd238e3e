"""Who may see the page, and whose forms count.

A page on 127.0.0.1 can be reached by every program of the machine, and by every web site through the browser. So each
request must name this machine as its host, and each form must come from a page that this process has made.
"""

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Collection
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response

MOST_BYTES = 128 * 1024  # of a form, with what somebody has signed
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer a browser would leave the origin out of forms
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'nonce-{nonce}'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SEALED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'none'"
"""For pages that lie in a run's folder: they may look as they do, and nothing else."""


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_of(host: str) -> tuple[str, ...]:
    """Give the names by which a browser may call this machine when the page is at `host`."""
    own = () if is_loopback(host) else (socket.gethostname(), socket.getfqdn())
    return (*LOOPBACK, host, *own)


class Guard:
    """Stands before the site: nothing reaches it that has another host, is too large, or comes from another page.

    Args:
        site: the ASGI application behind it.
        port: of the page; cookies have it in their names, since browsers give cookies to every port of a host.
        names: that this machine may be called by. An address in digits is one of them where there is a token.
        token: that a browser must have shown once; empty where only this machine can reach the page.
    """

    def __init__(self, site: Any, *, port: int, names: Collection[str] = LOOPBACK, token: str = "") -> None:
        self._site, self._names, self._token = site, {name.lower() for name in names}, token
        self._secret = secrets.token_bytes(32)
        self._token_cookie, self._seat_cookie = f"fedunlearn-token-{port}", f"fedunlearn-seat-{port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, or let the site answer."""
        if scope["type"] != "http":
            return await self._site(scope, receive, send)
        request = Request(scope)
        seat = request.cookies.get(self._seat_cookie) or secrets.token_urlsafe(32)
        scope["nonce"], scope["form_token"] = secrets.token_urlsafe(16), self._form_token(seat)
        headers = HEADERS | {"content-security-policy": POLICY.format(nonce=scope["nonce"])}
        cookies = [] if self._seat_cookie in request.cookies else [_cookie(self._seat_cookie, seat)]

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in headers.items() if name.encode() not in own]
                added += [(b"set-cookie", cookie.encode()) for cookie in cookies]
                message = message | {"headers": [*message["headers"], *added]}
            await send(message)

        answer = self._refusal(request) or self._entrance(request)
        await (answer or self._site)(scope, receive, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request that may not come from where it comes from, or is too large."""
        if not self._is_ours(request.headers.getlist("host")):
            return PlainTextResponse("This page is not at that address.", 421)
        if request.method not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("Only GET, HEAD and POST are answered.", 405, {"allow": "GET, HEAD, POST"})
        if _is_taken_in(request):
            return PlainTextResponse("Other pages may link to this one, and take nothing of it in.", 403)
        if request.method != "POST":
            return None
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return PlainTextResponse(f"A form has a length, of at most {MOST_BYTES:,} bytes.", 413)
        origin = urlsplit(request.headers.get("origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc != request.headers["host"]:
            return PlainTextResponse("This form does not come from this page: open the page and fill it in there.", 403)
        return None

    def _entrance(self, request: Request) -> Response | None:
        """The answer to whoever has no token yet, or shows it for the first time."""
        if not self._token or self._is_token(request.cookies.get(self._token_cookie, "")):
            return None
        if request.method == "GET" and self._is_token(request.query_params.get("token", "")):
            answer = RedirectResponse("/", 303)
            answer.headers.append("set-cookie", _cookie(self._token_cookie, self._token))
            return answer
        return PlainTextResponse("Open the address with the token that `fedunlearn serve` has printed.", 401)

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self._token.encode())

    def _is_ours(self, hosts: list[str]) -> bool:
        """Whether a request names one host, and that is this machine; a web site that points here has its own name."""
        try:
            name = urlsplit(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
        except ValueError:
            return False
        return name in self._names or (bool(self._token) and name is not None and _is_address(name))

    def _form_token(self, seat: str) -> str:
        return hmac.new(self._secret, seat.encode(), sha256).hexdigest()


def is_from_here(request: Request, form_token: str) -> bool:
    """Say whether a form has the token of a page that was made for the same browser."""
    return secrets.compare_digest(form_token.encode(), request.scope["form_token"].encode())


def _is_taken_in(request: Request) -> bool:
    """Whether another site's page wants to have something of this one in it; old browsers do not say so."""
    from_elsewhere = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    return from_elsewhere and request.headers.get("sec-fetch-dest") != "document"


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _cookie(name: str, value: str) -> str:
    return f"{name}={value}; Path=/; HttpOnly; SameSite=Strict"
