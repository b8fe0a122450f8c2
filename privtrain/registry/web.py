"""``privtrain ledger serve``: a read-only page over the registry, rendered here, without scripts or outside requests.

On loopback everybody on this machine can read it, as long as it runs; on another address a random token is asked for,
which plain HTTP does not hide from the network: prefer an SSH tunnel. It knows pseudonyms only and never reads the key.
"""

from __future__ import annotations

import ipaddress
import pathlib
import re
import secrets
import socket
from collections.abc import Sequence

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from privtrain.errors import PrivtrainError
from privtrain.process.console import say
from privtrain.registry import printing, refusal, views
from privtrain.registry.chart import budget_chart
from privtrain.registry.database import Database

_TEMPLATES = pathlib.Path(__file__).parent / "templates"
_COOKIE = "privtrain_token"
_MAX_RUNS = 200
_LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "[::1]"]


def create_app(database: Database, *, token: str | None = None, hosts: Sequence[str] = ()) -> Starlette:
    """Return the page as an application.

    Args:
        database: opened read-only.
        token: what a visitor has to know; ``None`` for nothing.
        hosts: values of the request's Host header to answer to, beside the usual ones of loopback; ``"*"`` for any.
            Others are refused, since a page of another site could make a browser ask here under a name of its own.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(up=printing.upwards, down=printing.downwards, day=printing.day)
    environment.globals.update(  # pyright: ignore[reportCallIssue] - jinja2 types its globals too narrowly
        mechanism=printing.mechanism_text, period=refusal.describe_period, chart=budget_chart
    )

    def render(name: str, **values: object) -> Response:
        """Return a page whose only style sheet is allowed by a nonce; nothing else may load or run."""
        nonce = secrets.token_urlsafe(16)
        page = environment.get_template(name).render(nonce=nonce, **values)
        return HTMLResponse(page, headers=_headers(nonce))

    async def overview(request: Request) -> Response:  # noqa: ARG001
        budgets = await run_in_threadpool(views.budgets, database, history=True)
        runs = await run_in_threadpool(views.runs, database, _MAX_RUNS)
        return render("overview.html", budgets=budgets, runs=runs, max_runs=_MAX_RUNS)

    async def user(request: Request) -> Response:
        asked = request.query_params.get("pseudonym", "").strip().lower()
        is_valid = re.fullmatch(r"[0-9a-f]{32}", asked) is not None
        view = await run_in_threadpool(views.user, database, asked) if is_valid else None
        return render("user.html", asked=asked, view=view)

    async def failed(request: Request, error: Exception) -> Response:  # noqa: ARG001
        return PlainTextResponse(str(error), status_code=503)

    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[*_LOOPBACK_HOSTS, *hosts])]
    if token is not None:
        middleware.append(Middleware(_TokenMiddleware, token=token))
    return Starlette(
        routes=[Route("/", overview, methods=["GET"]), Route("/user", user, methods=["GET"])],
        middleware=middleware,
        exception_handlers={PrivtrainError: failed},
    )


def run_server(database: Database, *, host: str, port: int, always_token: bool = False) -> None:
    """Serve until interrupted; print the address, with the token if one is asked for.

    Args:
        database: opened read-only.
        host: address to listen on; visitors must know a random token unless it is loopback.
        port: 0 for any free one.
        always_token: ask for a token on loopback too.

    Raises:
        PrivtrainError: if the address cannot be listened on.
    """
    is_local = is_loopback(host)
    token = None if is_local and not always_token else secrets.token_urlsafe(32)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise PrivtrainError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    shown = f"[{host}]" if ":" in host else host
    _, bound_port, *_ = listener.getsockname()
    query = "" if token is None else f"?token={token}"
    say(f"http://{shown}:{bound_port}/{query}  (read-only; Ctrl-C ends it)")
    app = create_app(database, token=token, hosts=[shown if is_local else "*"])
    # No access log: its lines would hold the token and the pseudonyms that were looked up.
    uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning", server_header=False)).run([listener])


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _TokenMiddleware:
    """Refuses requests without the token.

    A browser brings it in the first address (``?token=...``), and is sent on with a cookie that holds it. Programs send
    it in an ``Authorization: Bearer`` header.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._knows(request.cookies.get(_COOKIE, "")) or self._knows(bearer):
            await self._app(scope, receive, send)
        elif self._knows(request.query_params.get("token", "")):
            response = RedirectResponse(request.url.path, status_code=303)
            response.set_cookie(_COOKIE, self._token, httponly=True, samesite="strict")
            await response(scope, receive, send)
        else:
            text = "open the address with ?token=... that the command printed"
            await PlainTextResponse(text, status_code=401, headers=_headers("none"))(scope, receive, send)

    def _knows(self, given: str) -> bool:
        """Compare in constant time, so that the time of an answer tells nothing of the token."""
        return secrets.compare_digest(given.encode(), self._token.encode())


def _headers(nonce: str) -> dict[str, str]:
    """Return headers by which a browser runs no script, loads only the style with this nonce, and stores nothing."""
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src 'nonce-{nonce}'; img-src data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
