"""Replies of the review server: the page, the cases of the batch, corrections of masks, and decisions on them.

The path of a request is never used as a path in the file system: static files come from a fixed table, and a case is
looked up by its key in the state of the batch.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from typing import Any, BinaryIO, Final

import numpy as np

from fseft_edge.outbox.corrections import MaskChangedError
from fseft_edge.outbox.records import CaseRecord, Decision
from fseft_edge.review.cases import LONGEST_NOTE, ReviewCases, review_count
from fseft_edge.runtime.errors import FseftEdgeError, InputError, UsageError
from fseft_edge.runtime.scans.nifti import stream_hu
from fseft_edge.runtime.system.json_text import parse_json

LARGEST_BODY: Final = 16 << 10
"""Largest number of bytes in the body of a decision; a note of the longest length fits several times."""

_STATIC: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/review.css": ("review.css", "text/css; charset=utf-8"),
    "/review.js": ("review.js", "text/javascript; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
    "/drawing.js": ("drawing.js", "text/javascript; charset=utf-8"),
    "/niivue.umd.js": ("niivue.umd.js", "text/javascript; charset=utf-8"),
}
_CASE_FILE: Final = re.compile(r"/cases/(?P<key>[A-Za-z0-9_-]{1,64})/(?P<what>scan\.nii|mask\.nii\.gz|picture\.png)")
_DECISION: Final = re.compile(r"/cases/(?P<key>[A-Za-z0-9_-]{1,64})/decision")
_CORRECTION: Final = re.compile(r"/cases/(?P<key>[A-Za-z0-9_-]{1,64})/correction")
_BINARY: Final = "application/octet-stream"
_GZIP_STREAM: Final = 31
"""Argument of zlib for a gzip stream with checks of its length and CRC-32."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_WELCOME: Final = (
    b'<!doctype html><html lang="en"><title>fseft-edge review</title><link rel="icon" href="data:,">'
    b'<meta http-equiv="refresh" content="0; url=/">'
    b'<p><a href="/">Open the review</a></p></html>\n'
)
_PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Reply:
    """A reply: status, content type, length in bytes, content in pieces, and additional headers."""

    status: HTTPStatus
    content_type: str
    length: int
    pieces: Iterable[bytes]
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ExpectedBody:
    """The content type and the largest number of bytes of the body of a request."""

    content_type: str
    largest: int


def text_reply(status: HTTPStatus, message: str, *headers: tuple[str, str]) -> Reply:
    """Return a plain-text reply for a person in the browser."""
    body = f"{message}\n".encode("utf-8", "replace")
    return Reply(status, "text/plain; charset=utf-8", len(body), [body], headers)


def welcome_reply(cookie: str) -> Reply:
    """Return the reply to a request with the token: a page that sets the cookie and opens the review.

    A browser does not send a strict cookie along a redirect of another origin, such as a file; from a page it does.
    """
    return Reply(HTTPStatus.OK, "text/html; charset=utf-8", len(_WELCOME), [_WELCOME], (("Set-Cookie", cookie),))


class Routes:
    """The replies to requests that passed the access control.

    Args:
        cases: cases of the batch.
    """

    def __init__(self, cases: ReviewCases) -> None:
        self._cases = cases
        static = files("fseft_edge.review") / "static"
        self._static = {path: (kind, (static / name).read_bytes()) for path, (name, kind) in _STATIC.items()}

    def get(self, path: str) -> Reply:
        """Return the reply to a GET request."""
        if path in self._static:
            kind, body = self._static[path]
            return Reply(HTTPStatus.OK, kind, len(body), [body])
        if path == "/cases":
            return self._list()
        if matched := _CASE_FILE.fullmatch(path):
            return self._with_case(matched["key"], lambda case: self._file(case, matched["what"]))
        return _problem(HTTPStatus.NOT_FOUND, "This address does not exist.")

    def body_of(self, path: str) -> ExpectedBody:
        """Return what the body of a POST request to this path may be."""
        if matched := _CORRECTION.fullmatch(path):
            with contextlib.suppress(FseftEdgeError):  # of a case without a mask: `post` refuses it
                voxels = math.prod(self._cases.lattice(matched["key"]))
                return ExpectedBody("application/gzip", voxels + voxels // 1000 + 1024)
            return ExpectedBody("application/gzip", LARGEST_BODY)
        return ExpectedBody("application/json", LARGEST_BODY)

    def post(self, path: str, body: bytes, if_match: str | None) -> Reply:
        """Record a correction or a decision, and return the reply to the POST request.

        Args:
            path: path of the request.
            body: body of the request, within the limits of :meth:`body_of`.
            if_match: header ``If-Match``. It belongs to a correction: the ETag of the mask that was corrected.
        """
        if matched := _CORRECTION.fullmatch(path):
            based_on = (if_match or "").strip('"')
            if not _SHA256.fullmatch(based_on):
                return _problem(HTTPStatus.BAD_REQUEST, "The header If-Match must be the ETag of the corrected mask.")
            return self._with_case(matched["key"], lambda case: self._correct(case, body, based_on))
        matched = _DECISION.fullmatch(path)
        if not matched:
            return _problem(HTTPStatus.NOT_FOUND, "This address does not exist.")
        try:
            given = parse_json(body)
            decision, note, sha256 = Decision(given["decision"]), given["note"], given["mask_sha256"]
            if not isinstance(note, str) or not _SHA256.fullmatch(sha256) or len(given) != 3:
                raise ValueError("the note is not text")
            note.encode()  # an unpaired surrogate cannot be stored
        except (ValueError, KeyError, TypeError):
            return _problem(
                HTTPStatus.BAD_REQUEST,
                'The body must be {"decision": "accepted" or "rejected", "note": text, "mask_sha256": 64 digits}.',
            )
        return self._with_case(matched["key"], lambda case: self._decide(case, decision, note, sha256))

    def _with_case(self, key: str, answer: Callable[[CaseRecord], Reply]) -> Reply:
        try:
            case = self._cases.case(key)
        except UsageError:
            return _problem(HTTPStatus.NOT_FOUND, f"There is no case {key} in this batch.")
        try:
            return answer(case)
        except FseftEdgeError as error:
            kind = HTTPStatus.BAD_REQUEST if isinstance(error, UsageError) else HTTPStatus.INTERNAL_SERVER_ERROR
            status = HTTPStatus.CONFLICT if isinstance(error, InputError) else kind
            fields = {"mask_changed": True} if isinstance(error, MaskChangedError) else {}
            return _json(status, {"error": self._cases.without_name(str(error), case), **fields})

    def _list(self) -> Reply:
        cases = self._cases.listed()
        count = review_count(cases)
        return _json(
            HTTPStatus.OK,
            {
                "cases": [self._cases.description(case) for case in cases],
                "decided": count.decided,
                "masks": count.masks,
                "longest_note": LONGEST_NOTE,
                "reviewer": self._cases.reviewer,
            },
        )

    def _decide(self, case: CaseRecord, decision: Decision, note: str, mask_sha256: str) -> Reply:
        self._cases.decide(case, decision, note, mask_sha256)
        return _json(HTTPStatus.OK, self._cases.description(self._cases.case(case.key)))

    def _correct(self, case: CaseRecord, body: bytes, based_on: str) -> Reply:
        shape = self._cases.lattice(case.key)
        drawn = _unpacked(body, math.prod(shape))
        if drawn is None:
            return _problem(
                HTTPStatus.BAD_REQUEST, f"The body must be gzip of {' x '.join(map(str, shape))} bytes, x fastest."
            )
        voxels = np.frombuffer(drawn, np.uint8).reshape(shape, order="F")
        saved = self._cases.correct(case, voxels, based_on)
        fields = {"mask_sha256": saved.correction.mask_sha256, "problems": list(saved.problems)}
        return _json(HTTPStatus.OK, fields)

    def _file(self, case: CaseRecord, what: str) -> Reply:
        if what == "scan.nii":
            length, pieces = stream_hu(self._cases.scan(case))
            return Reply(HTTPStatus.OK, _BINARY, length, pieces)
        if what == "picture.png":
            return _file_reply(self._cases.picture(case), "image/png")
        mask, sha256 = self._cases.mask(case)
        return _file_reply(mask, _BINARY, ("ETag", f'"{sha256}"'))


def _unpacked(packed: bytes, length: int) -> bytes | None:
    """Return the content of a gzip stream; None if it is damaged, or does not have this length in bytes."""
    stream = zlib.decompressobj(_GZIP_STREAM)
    try:
        content = stream.decompress(packed, length + 1)
    except zlib.error:
        return None
    return content if stream.eof and len(content) == length and not stream.unused_data else None


def _file_reply(file: BinaryIO, content_type: str, *headers: tuple[str, str]) -> Reply:
    length = file.seek(0, 2)
    file.seek(0)
    return Reply(HTTPStatus.OK, content_type, length, _pieces(file, length), headers)


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    with contextlib.closing(file):
        while length > 0 and (piece := file.read(min(length, _PIECE_BYTES))):
            length -= len(piece)
            yield piece


def _json(status: HTTPStatus, content: dict[str, Any]) -> Reply:
    body = json.dumps(content, allow_nan=False).encode()
    return Reply(status, "application/json", len(body), [body])


def _problem(status: HTTPStatus, message: str) -> Reply:
    return _json(status, {"error": message})
