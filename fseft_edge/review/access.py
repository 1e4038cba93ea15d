"""Access control of the review server: only the person who has the printed address, in a page of this server."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field

HOST = "127.0.0.1"
_SECRET_BYTES = 32


def _secret() -> str:
    return secrets.token_urlsafe(_SECRET_BYTES)


@dataclass(frozen=True)
class Access:
    """The secrets of one server. Every server creates new ones when it starts.

    Attributes:
        port: port on which the server listens.
        token: random part of the printed address. A request with the token gets the cookie, so that the token does not
            stay in the address bar. The token is valid until the server ends, and not only once: the person may open
            the printed address again, for example in another browser, and a program that looks at the address before
            the person does cannot lock the person out.
        session: value of the cookie. It differs from the token, so that neither reveals the other.
    """

    port: int
    token: str = field(default_factory=_secret, repr=False)
    session: str = field(default_factory=_secret, repr=False)

    @property
    def address(self) -> str:
        """Address to open in the browser; it contains the token."""
        return f"http://{HOST}:{self.port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """Value of the ``Set-Cookie`` header. Browsers share cookies between ports, so its name contains the port."""
        return f"{self._cookie_name}={self.session}; Path=/; HttpOnly; SameSite=Strict"

    def is_our_host(self, host: str | None) -> bool:
        """Whether a ``Host`` header names this server, and not a foreign host name (DNS rebinding)."""
        return host in (f"{HOST}:{self.port}", f"localhost:{self.port}")

    def is_our_origin(self, origin: str | None) -> bool:
        """Whether an ``Origin`` header states that the request comes from a page of this server."""
        return origin is not None and origin.startswith("http://") and self.is_our_host(origin.removeprefix("http://"))

    def is_token(self, token: str) -> bool:
        """Whether a text is the token. The comparison takes constant time."""
        return _same(token, self.token)

    def has_session(self, cookies: str | None) -> bool:
        """Whether a ``Cookie`` header contains the session."""
        pairs = (pair.strip().partition("=") for pair in (cookies or "").split(";"))
        return any(name == self._cookie_name and _same(value, self.session) for name, _, value in pairs)

    @property
    def _cookie_name(self) -> str:
        return f"fseft-edge-review-{self.port}"


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), secret.encode())
