"""Who may talk to the review's server: whoever has the address that it printed, in a page of its own."""

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
    """The secrets of one server, new whenever it starts.

    Attributes:
        port: where it listens.
        token: part of the printed address; exchanged for the cookie once, and so kept out of the browser's history.
        session: the cookie's value. It differs from the token, so that neither gives the other away.
    """

    port: int
    token: str = field(default_factory=_secret, repr=False)
    session: str = field(default_factory=_secret, repr=False)

    @property
    def address(self) -> str:
        """What to open in the browser."""
        return f"http://{HOST}:{self.port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """The ``Set-Cookie`` header. Browsers share cookies between ports, so its name tells servers apart."""
        return f"{self._cookie_name}={self.session}; Path=/; HttpOnly; SameSite=Strict"

    def is_our_host(self, host: str | None) -> bool:
        """Whether a ``Host`` header names this server, and not a foreign name that points here (DNS rebinding)."""
        return host in (f"{HOST}:{self.port}", f"localhost:{self.port}")

    def is_our_origin(self, origin: str | None) -> bool:
        """Whether an ``Origin`` header names a page of this server."""
        return origin is not None and origin.startswith("http://") and self.is_our_host(origin.removeprefix("http://"))

    def opens(self, token: str) -> bool:
        """Whether this is the token; takes as long for one that is nearly right."""
        return _same(token, self.token)

    def is_known(self, cookies: str | None) -> bool:
        """Whether a ``Cookie`` header holds the session."""
        pairs = (pair.strip().partition("=") for pair in (cookies or "").split(";"))
        return any(name == self._cookie_name and _same(value, self.session) for name, _, value in pairs)

    @property
    def _cookie_name(self) -> str:
        return f"fseft-edge-review-{self.port}"


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), secret.encode())
