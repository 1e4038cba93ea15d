"""Access control of the review server: who gets a reply, and which requests are refused."""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Iterator

import pytest
from doubles.errors import refused
from doubles.repository import ROOT
from doubles.reviewed import Batch, run_batch
from doubles.reviewer import SECONDS, Reviewer, decision_body, served

from fseft_edge.report.pictures import PREDICTION_COLOUR, REFERENCE_COLOUR
from fseft_edge.review.routes import LARGEST_BODY
from fseft_edge.review.server import open_review
from fseft_edge.runtime.errors import EnvironmentProblemError

STATIC = ROOT / "fseft_edge" / "review" / "static"
EVERY_PATH = [
    "/",
    "/review.js",
    "/drawing.js",
    "/cases/{key}/correction",
    "/niivue.umd.js",
    "/cases",
    "/cases/{key}/scan.nii",
    "/cases/{key}/mask.nii.gz",
    "/nothing",
]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return run_batch(tmp_path_factory.mktemp("batch"))


@pytest.fixture(scope="module")
def reviewer(batch: Batch) -> Iterator[Reviewer]:
    with served(batch.outbox) as client:
        yield client


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "POST"])
def test_every_request_without_the_cookie_is_refused(batch: Batch, reviewer: Reviewer, path: str, method: str) -> None:
    stranger = Reviewer(reviewer.server)
    answer = stranger.ask(path.format(key=batch.keys[0]), method, Origin=f"http://{stranger.host}")
    assert answer.status == 403
    assert b"case-" not in answer.body


@pytest.mark.parametrize("token", ["", "wrong", "ä%ff%00", "x" * 4000])
def test_a_wrong_token_is_refused(reviewer: Reviewer, token: str) -> None:
    answer = Reviewer(reviewer.server).ask("/?token=" + token.replace("ä", "%C3%A4"))
    assert answer.status == 403
    assert answer.headers["Set-Cookie"] is None


def test_the_token_is_not_valid_as_cookie_and_the_cookie_not_as_token(reviewer: Reviewer) -> None:
    access = reviewer.server.access
    name = reviewer.cookie.partition("=")[0]
    assert Reviewer(reviewer.server, f"{name}={access.token}").ask("/cases").status == 403
    assert Reviewer(reviewer.server).ask(f"/?token={access.session}").status == 403
    assert Reviewer(reviewer.server, f"other=1; {reviewer.cookie}").ask("/cases").status == 200


def test_the_cookie_is_strict_and_hidden_from_scripts(reviewer: Reviewer) -> None:
    welcome = Reviewer(reviewer.server).ask(f"/?token={reviewer.server.access.token}")
    name, *attributes = welcome.headers["Set-Cookie"].split("; ")
    assert name.startswith(f"fseft-edge-review-{reviewer.server.access.port}=")
    assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)


def test_secrets_differ_from_server_to_server(batch: Batch) -> None:
    with open_review(batch.outbox) as one, open_review(batch.outbox) as other:
        secrets = {one.access.token, one.access.session, other.access.token, other.access.session}
    assert len(secrets) == 4
    assert min(len(secret) for secret in secrets) >= 43  # 256 bits in base64
    assert not any(secret in repr(one.access) for secret in secrets)


@pytest.mark.parametrize(
    "host", [None, "evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.:{port}"]
)
def test_a_foreign_host_name_is_refused(reviewer: Reviewer, host: str | None) -> None:
    """A page of ``evil.example`` sends this after its host name was changed to 127.0.0.1 (DNS rebinding)."""
    named = host and host.format(port=reviewer.server.access.port)
    assert reviewer.ask("/cases", Host=named).status == 403
    assert reviewer.ask(f"/?token={reviewer.server.access.token}", Host=named).status == 403


def test_localhost_is_accepted_as_host(reviewer: Reviewer) -> None:
    assert reviewer.ask("/cases", Host=f"localhost:{reviewer.server.access.port}").status == 200


def test_two_host_headers_are_refused(reviewer: Reviewer) -> None:
    request = f"GET /cases HTTP/1.1\r\nHost: {reviewer.host}\r\nHost: evil.example\r\nCookie: {reviewer.cookie}\r\n\r\n"
    assert b" 403 " in raw(reviewer, request.encode())


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://{host}", "http://{host}.evil.example"]
)
def test_a_decision_from_a_foreign_page_is_refused(batch: Batch, reviewer: Reviewer, origin: str | None) -> None:
    sent = origin and origin.format(host=reviewer.host)
    answer = reviewer.decide(batch.keys[0], decision_body("00" * 32), Origin=sent)
    assert answer.status == 403
    with batch.store() as store:
        assert store.case(batch.keys[0]).review is None


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_request_from_a_page_of_another_server_is_refused(reviewer: Reviewer, site: str) -> None:
    assert reviewer.ask("/cases", Sec_Fetch_Site=site).status == 403


def test_the_server_listens_only_on_the_loopback_interface(reviewer: Reviewer) -> None:
    assert reviewer.server.socket.getsockname()[0] == "127.0.0.1"


def test_every_reply_has_the_security_headers(batch: Batch, reviewer: Reviewer) -> None:
    for path in (*EVERY_PATH, "/?token=wrong"):
        headers = reviewer.ask(path.format(key=batch.keys[0])).headers
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert not any("unsafe" in sources or "http" in sources or "*" in sources for sources in policy.values())
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Access-Control-Allow-Origin"] is None
        assert "Python" not in headers["Server"]


def test_the_page_loads_nothing_from_other_servers(reviewer: Reviewer) -> None:
    page = reviewer.ask("/").body.decode()
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert named
    for name in named:
        if name != "data:,":
            assert reviewer.ask(name).status == 200
    own = "".join((STATIC / name).read_text() for name in ("index.html", "review.css", "review.js", "viewer.js"))
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", own)


def test_the_vendored_viewer_has_the_checksum_in_the_readme() -> None:
    digest = hashlib.sha256((STATIC / "niivue.umd.js").read_bytes()).hexdigest()
    assert digest in (STATIC / "README.md").read_text()


def test_the_first_colours_are_those_of_the_preview_pictures() -> None:
    script = (STATIC / "viewer.js").read_text()
    first = re.search(r"COLOURS = \[\s*\[(.*?)\], \[(.*?)\]", script)
    assert [tuple(map(int, group.split(","))) for group in first.groups()] == [PREDICTION_COLOUR, REFERENCE_COLOUR]


@pytest.mark.parametrize(
    "path",
    [
        "/../state.sqlite",
        "/.fseft-edge/state.sqlite",
        "/cases/../../inbox/a.nii.gz",
        "/cases/{key}/../{key}/mask.nii.gz",
        "/cases/%2e%2e/mask.nii.gz",
        "/cases/..%2f..%2finbox/scan.nii",
        "/cases/{key}%2f..%2f{key}/mask.nii.gz",
        "/cases/{key}/%2e%2e/%2e%2e/secret.nii.gz",
        "/cases/%252e%252e/mask.nii.gz",
        "/cases/..\\..\\secret/mask.nii.gz",
        "/cases//etc/passwd",
        "/cases/{key}/mask.nii.gz%00.png",
        "/cases/{key}/secret.nii.gz",
        "/cases/secret/mask.nii.gz",
        "/cases/case-000000000000/scan.nii",
        "/cases/" + "a" * 5000 + "/mask.nii.gz",
        "/static/index.html",
        "/README.md",
        "//etc/passwd",
        "/etc/passwd",
    ],
)
def test_no_path_leads_to_other_files(batch: Batch, reviewer: Reviewer, path: str) -> None:
    (batch.outbox / "secret").mkdir(exist_ok=True)
    for name in ("secret.nii.gz", "secret/secret.nii.gz", "secret/mask.nii.gz"):
        (batch.outbox / name).write_bytes(b"secret")
    answer = reviewer.ask(path.format(key=batch.keys[0]))
    assert answer.status == 404
    assert b"secret\n" not in answer.body
    assert answer.body != b"secret"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"accepted"', b"null", b"\xff\xfe", b'{"decision": "accepted"}', b'{"note": ""}',
        b'{"decision": "accepted", "note": ""}', b'{"decision": "maybe", "note": "", "mask_sha256": "SHA256"}',
        b'{"decision": ["accepted"], "note": "", "mask_sha256": "SHA256"}',
        b'{"decision": "accepted", "note": 3, "mask_sha256": "SHA256"}',
        b'{"decision": "accepted", "note": "\\ud800", "mask_sha256": "SHA256"}',
        b'{"decision": "accepted", "note": "", "mask_sha256": "SHA256", "key": "x"}',
        b'{"decision": "accepted", "note": "", "mask_sha256": "SHA25"}',
        b'{"decision": "accepted", "note": "", "mask_sha256": null}', b"[" * 10000,
    ],
)  # fmt: skip
def test_an_invalid_decision_is_refused(batch: Batch, reviewer: Reviewer, body: bytes) -> None:
    sha256 = reviewer.mask_sha256(batch.keys[0]).encode()
    assert reviewer.decide(batch.keys[0], body.replace(b"SHA256", sha256)).status == 400
    with batch.store() as store:
        assert store.case(batch.keys[0]).review is None


@pytest.mark.parametrize(
    ("length", "status"), [(str(LARGEST_BODY + 1), 413), ("9" * 400, 413), ("-1", 411), ("x", 411), (None, 411)]
)
def test_a_request_without_length_or_too_long_is_not_read(
    batch: Batch, reviewer: Reviewer, length: str | None, status: int
) -> None:
    assert reviewer.decide(batch.keys[0], b"", **{"Content-Length": length}).status == status


def test_a_decision_has_to_be_json(batch: Batch, reviewer: Reviewer) -> None:
    """A browser lets foreign pages send forms without a preflight request, but not JSON."""
    answer = reviewer.decide(batch.keys[0], decision_body("00" * 32), Content_Type="text/plain")
    assert answer.status == 415


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"])
def test_other_methods_are_not_allowed(batch: Batch, reviewer: Reviewer, method: str) -> None:
    answer = reviewer.ask(f"/cases/{batch.keys[0]}/mask.nii.gz", method)
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, POST"


def raw(reviewer: Reviewer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", reviewer.server.access.port), timeout=SECONDS) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"BREW / HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\n\r\n",
     b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n"],
)  # fmt: skip
def test_a_malformed_request_is_refused_and_the_server_continues(reviewer: Reviewer, request_bytes: bytes) -> None:
    answer = raw(reviewer, request_bytes)
    assert b"case-" not in answer
    assert b"xxx" not in answer
    assert re.match(rb"HTTP/1\.[01] [45]\d\d ", answer) or b"fseft-edge review" in answer
    assert reviewer.ask("/cases").status == 200


def test_a_closed_connection_writes_no_error(
    batch: Batch, reviewer: Reviewer, capfd: pytest.CaptureFixture[str]
) -> None:
    request = f"GET /niivue.umd.js HTTP/1.1\r\nHost: {reviewer.host}\r\nCookie: {reviewer.cookie}\r\n\r\n"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", reviewer.server.access.port), timeout=SECONDS) as connection:
            connection.sendall(request.encode())
            connection.recv(100)
    assert reviewer.ask("/cases").status == 200
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_refused(batch: Batch, reviewer: Reviewer) -> None:
    with (
        refused(EnvironmentProblemError, reviewer.server.access.port),
        open_review(batch.outbox, port=reviewer.server.access.port),
    ):
        pass
