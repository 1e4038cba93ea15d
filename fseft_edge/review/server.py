"""The review's server: this machine alone, and there only whoever has the address that it printed."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.review.access import HOST, Access
from fseft_edge.review.cases import ReviewCases, ReviewCount, review_count
from fseft_edge.review.routes import LARGEST_BODY, Reply, Routes, text_reply
from fseft_edge.runtime.errors import EnvironmentProblemError, UsageError

_LOG = logging.getLogger(__name__)

_CONTENT_SECURITY_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # NiiVue keeps the glyphs of its letters as a picture in its script
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS: Final = (
    ("Content-Security-Policy", _CONTENT_SECURITY_POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)
_NOT_YOURS: Final = "Open the address that `fseft-edge review` printed: it holds the key."
_IDLE_SECONDS: Final = 60.0


class ReviewServer(ThreadingHTTPServer):
    """Serves one outbox until it is shut down; made by :func:`open_review`."""

    daemon_threads = True
    allow_reuse_address = False  # no other program shall take over an address that somebody has open

    def __init__(self, port: int, cases: ReviewCases) -> None:
        super().__init__((HOST, port), _Handler)
        self.access = Access(self.server_address[1])
        self.routes = Routes(cases)
        self._cases = cases

    @property
    def address(self) -> str:
        """What to open in the browser; whoever has it may see and decide."""
        return self.access.address

    def progress(self) -> ReviewCount:
        """Return how many of the masks were decided on."""
        return review_count(self._cases.listed())

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that has gone away; anything else is a bug, shown as such."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # typeshed names private types


@contextlib.contextmanager
def open_review(
    outbox: Path, *, state: Path | None = None, port: int = 0, show_ids: bool = False
) -> Iterator[ReviewServer]:
    """Give a server of the review page of a batch; call its ``serve_forever`` to serve.

    Args:
        outbox: the batch's results.
        state: the batch's state where it does not lie in the outbox.
        port: where to listen on this machine; 0 takes a free one.
        show_ids: show the names of the scans' files too, which may be patients' names.

    Raises:
        UsageError: there is no batch.
        BatchStateError: its state is damaged.
        EnvironmentProblemError: the port is taken.
    """
    if not outbox.is_dir():
        raise UsageError(f"{outbox} is no folder.", remedy="Name the OUTBOX of a `batch run`.")
    with BatchStore(state_path(outbox, state)) as store:
        try:
            server = ReviewServer(port, ReviewCases(outbox, store, show_ids=show_ids))
        except OSError as error:
            raise EnvironmentProblemError(
                f"Port {port} of this machine cannot be used: {error.strerror or error}.",
                remedy="Name another by --port, or leave it out to take a free one.",
            ) from error
        with server:
            yield server


class _Handler(BaseHTTPRequestHandler):
    """One request: refused, or answered by the routes."""

    server: ReviewServer
    server_version = "fseft-edge"
    sys_version = ""
    timeout = _IDLE_SECONDS

    def _answer(self) -> None:
        self._send(self._refusal() or self._reply())

    # The names are http.server's. Methods without one are refused by it, see `send_error`.
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _answer  # noqa: N815 - http.server's names

    def _refusal(self) -> Reply | None:
        """The answer to whoever may not ask; None for the reviewer."""
        access = self.server.access
        if len(self.headers.get_all("Host", [])) != 1 or not access.is_our_host(self.headers["Host"]):
            return text_reply(HTTPStatus.FORBIDDEN, _NOT_YOURS)
        path, _, query = self.path.partition("?")
        if self.command == "GET" and path == "/" and query.startswith("token="):
            if not access.opens(unquote(query.removeprefix("token="))):
                return text_reply(HTTPStatus.FORBIDDEN, _NOT_YOURS)
            return text_reply(HTTPStatus.SEE_OTHER, "Welcome.", ("Location", "/"), ("Set-Cookie", access.cookie))
        # Pages of other servers on this machine count as the same site, so the cookie comes with what they ask for.
        foreign_page = self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none")
        foreign_post = self.command == "POST" and not access.is_our_origin(self.headers.get("Origin"))
        if foreign_page or foreign_post or not access.is_known(self.headers.get("Cookie")):
            return text_reply(HTTPStatus.FORBIDDEN, _NOT_YOURS)
        return None

    def _reply(self) -> Reply:
        path = self.path.partition("?")[0]
        if self.command == "GET":
            return self.server.routes.get(path)
        if self.command != "POST":
            return text_reply(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and POST.", ("Allow", "GET, POST"))
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return text_reply(HTTPStatus.LENGTH_REQUIRED, "Say how long the request is.")
        if len(length) > 9 or int(length) > LARGEST_BODY:
            return text_reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too long.")
        if self.headers.get_content_type() != "application/json":
            return text_reply(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Decisions come as JSON.")
        return self.server.routes.post(path, self.rfile.read(int(length)))

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in (
            *_HEADERS,
            *reply.headers,
            ("Content-Type", reply.content_type),
            ("Content-Length", str(reply.length)),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for piece in reply.pieces:
                self.wfile.write(piece)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002 - http.server's signature
        """Refuse what http.server could not read, in one sentence that repeats nothing of it."""
        self.close_connection = True
        self._send(text_reply(HTTPStatus(code), _NOT_YOURS))

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - http.server's signature
        """Keep quiet: the request line may hold the token."""
