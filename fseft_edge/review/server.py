"""The web server of the review. It serves only this machine, and only clients that know the printed address."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from fseft_edge.outbox.accepted_masks import corrected_masks
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.review.access import HOST, Access
from fseft_edge.review.cases import ReviewCases, ReviewCount, review_count
from fseft_edge.review.reviewer import reviewer_name
from fseft_edge.review.routes import Reply, Routes, text_reply, welcome_reply
from fseft_edge.runtime.errors import EnvironmentProblemError, UsageError

_LOG = logging.getLogger(__name__)

_CONTENT_SECURITY_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # the script of NiiVue contains its font as a picture
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
_ACCESS_DENIED: Final = "Access denied. Open the complete address that `fseft-edge review` printed."
_IDLE_SECONDS: Final = 60.0
_LONGEST_LENGTH: Final = 10  # digits of a Content-Length


class ReviewServer(ThreadingHTTPServer):
    """The server of one outbox, created by :func:`open_review`."""

    daemon_threads = True
    allow_reuse_address = True  # a review can be started again at once on the port of a page with unsaved strokes

    def __init__(self, port: int, cases: ReviewCases) -> None:
        self._replying = threading.Lock()  # http.server closes the server if the port cannot be used
        self._closed = False
        super().__init__((HOST, port), _Handler)
        self.access = Access(self.server_address[1])
        self.routes = Routes(cases)
        self.entered: Callable[[], None] = lambda: None
        """Called when a browser has given the token."""
        self._cases = cases

    @property
    def address(self) -> str:
        """Address to open in the browser. Everyone who has it can see the masks and decide."""
        return self.access.address

    @property
    def reviewer(self) -> str:
        """Name of the person who decides."""
        return self._cases.reviewer

    def progress(self) -> ReviewCount:
        """Return the number of reviewed masks and of all masks."""
        return review_count(self._cases.listed())

    @contextlib.contextmanager
    def reply_before_close(self) -> Iterator[None]:
        """Keep the state of the batch open while a reply is made from it.

        Raises:
            ConnectionAbortedError: the server was closed before.
        """
        with self._replying:
            if self._closed:
                raise ConnectionAbortedError("The review server is closed.")
            yield

    def server_close(self) -> None:
        """Wait for a reply that is being made, and refuse later requests: the state of the batch is closed next."""
        with self._replying:
            self._closed = True
        super().server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a browser that closed the connection; show any other error, because it is a bug."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # typeshed names private types


@contextlib.contextmanager
def open_review(
    outbox: str | Path,
    *,
    state: str | Path | None = None,
    corrected: str | Path | None = None,
    reviewer: str | None = None,
    port: int = 0,
    show_ids: bool = False,
) -> Iterator[ReviewServer]:
    """Open the review server of a batch. Call its method ``serve_forever`` to serve the page.

    Args:
        outbox: outbox of the batch.
        state: state file of the batch; None means the state file in the outbox.
        corrected: folder of corrected masks ``<key>.nii.gz``, which are displayed instead of the masks in the outbox;
            None means that there is no such folder.
        reviewer: name of the person who decides, at most 100 characters; None means the name of this account.
        port: port of this machine on which to listen; 0 means any free port.
        show_ids: also show the file names of the scans, which may contain patients' names.

    Raises:
        UsageError: there is no batch or no folder of corrected masks, or the name of the reviewer is empty, too long or
            unknown.
        InputError: a corrected mask does not belong to any case.
        BatchStateError: the state file is damaged.
        EnvironmentProblemError: the port is in use.
    """
    outbox = Path(outbox)
    state, corrected = (None if path is None else Path(path) for path in (state, corrected))
    if not outbox.is_dir():
        raise UsageError(
            f"The outbox {outbox} does not exist or is not a folder.", remedy="Name the OUTBOX of a `batch run`."
        )
    if corrected is not None and not corrected.is_dir():
        raise UsageError(
            f"The folder of corrected masks, {corrected}, does not exist or is not a folder.",
            remedy="Give an existing folder with --corrected.",
        )
    name = reviewer_name(reviewer)
    with BatchStore(state_path(outbox, state)) as store:
        corrected_masks(corrected, [case.key for case in store.cases()], outbox)
        cases = ReviewCases(outbox, store, reviewer=name, corrected=corrected, show_ids=show_ids)
        try:
            server = ReviewServer(port, cases)
        except OSError as error:
            raise EnvironmentProblemError(
                f"Port {port} of this machine cannot be used: {error.strerror or error}.",
                remedy="Give another port with --port, or remove --port to use any free port.",
            ) from error
        with server:
            yield server


class _Handler(BaseHTTPRequestHandler):
    """Handler of one request: it refuses the request, or sends the reply of the routes."""

    server: ReviewServer
    server_version = "fseft-edge"
    sys_version = ""
    timeout = _IDLE_SECONDS

    def _answer(self) -> None:
        self._send(self._refusal() or self._reply())

    # http.server calls these methods. It refuses other request methods with `send_error`.
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _answer  # noqa: N815 - names required by http.server

    def _refusal(self) -> Reply | None:
        """Return the reply to a request without access; None if the request has access."""
        access = self.server.access
        if len(self.headers.get_all("Host", [])) != 1 or not access.is_our_host(self.headers["Host"]):
            return text_reply(HTTPStatus.FORBIDDEN, _ACCESS_DENIED)
        path, _, query = self.path.partition("?")
        if self.command == "GET" and path == "/" and query.startswith("token="):
            if not access.is_token(unquote(query.removeprefix("token="))):
                return text_reply(HTTPStatus.FORBIDDEN, _ACCESS_DENIED)
            self.server.entered()
            return welcome_reply(access.cookie)
        # For a browser, pages of other servers on this machine are "same-site", so their requests contain the cookie.
        foreign_page = self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none")
        foreign_post = self.command == "POST" and not access.is_our_origin(self.headers.get("Origin"))
        if foreign_page or foreign_post or not access.has_session(self.headers.get("Cookie")):
            return text_reply(HTTPStatus.FORBIDDEN, _ACCESS_DENIED)
        return None

    def _reply(self) -> Reply:
        path = self.path.partition("?")[0]
        if self.command == "GET":
            with self.server.reply_before_close():
                return self.server.routes.get(path)
        if self.command != "POST":
            return text_reply(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and POST are supported.", ("Allow", "GET, POST"))
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return text_reply(HTTPStatus.LENGTH_REQUIRED, "The request has no valid Content-Length.")
        with self.server.reply_before_close():
            expected = self.server.routes.body_of(path)
        if len(length) > _LONGEST_LENGTH or int(length) > expected.largest:
            return text_reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too long.")
        if self.headers.get_content_type() != expected.content_type:
            return text_reply(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"The body must be {expected.content_type}.")
        body = self.rfile.read(int(length))
        with self.server.reply_before_close():
            return self.server.routes.post(path, body, self.headers.get("If-Match"))

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

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002 - signature required by http.server
        """Refuse a request that http.server cannot read, without repeating any part of it."""
        self.close_connection = True
        self._send(text_reply(HTTPStatus(code), _ACCESS_DENIED))

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - signature required by http.server
        """Write no log: the request line may contain the token."""
