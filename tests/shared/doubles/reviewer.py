"""An HTTP client of the review server."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fseft_edge.review.server import ReviewServer, open_review

SECONDS = 20


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def decision_body(mask_sha256: str, decision: str = "accepted", note: str = "") -> str:
    """Return the body of a decision."""
    return json.dumps({"decision": decision, "note": note, "mask_sha256": mask_sha256})


@dataclass(frozen=True)
class Reviewer:
    """A client of a review server."""

    server: ReviewServer
    cookie: str | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.access.port}"

    def ask(self, path: str, method: str = "GET", body: bytes | str | None = None, **headers: str | None) -> Answer:
        sent = {"Host": self.host, "Cookie": self.cookie, **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection = http.client.HTTPConnection(self.host, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            content = body.encode() if isinstance(body, str) else body
            if content is not None and "Content-Length" not in sent:
                sent["Content-Length"] = str(len(content))
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(content)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def mask_sha256(self, key: str) -> str:
        """Return the sha256 that the server sends with the mask of a case."""
        return str(self.ask(f"/cases/{key}/mask.nii.gz").headers["ETag"]).strip('"')

    def decide(self, key: str, body: bytes | str, **headers: str | None) -> Answer:
        usual = {"Origin": f"http://{self.host}", "Content_Type": "application/json"}
        return self.ask(f"/cases/{key}/decision", "POST", body, **{**usual, **headers})


@contextlib.contextmanager
def served(outbox: Path, **settings: Any) -> Iterator[Reviewer]:
    with open_review(outbox, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            token = server.address.partition("?token=")[2]
            welcome = Reviewer(server).ask(f"/?token={token}")
            assert (welcome.status, b'content="0; url=/"' in welcome.body) == (200, True)
            yield Reviewer(server, welcome.headers["Set-Cookie"].partition(";")[0])
        finally:
            server.shutdown()
            thread.join(SECONDS)
