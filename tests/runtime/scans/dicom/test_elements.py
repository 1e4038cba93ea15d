"""Limits of memory and time for headers, and recognition of files without preamble."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from doubles.errors import refused
from doubles.odd_dicom import SERIES, raw
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from fseft_edge.runtime.errors import GeometryError, UnreadableFileError
from fseft_edge.runtime.scans.dicom import deflated, elements
from fseft_edge.runtime.scans.dicom.elements import element_name, looks_like_dicom, read_elements, read_encoding
from fseft_edge.runtime.scans.sources import read_scan

META = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00"
PREFIX = bytes(128) + b"DICM" + META
CT = b"\x08\x00\x60\x00CS\x02\x00CT"
ROWS = 0x00280010


def sequence(tag: bytes, length: int, content: bytes) -> bytes:
    return tag + b"SQ\0\0" + struct.pack("<I", length) + content


def peak_of(path: Path) -> int:
    """Return the peak of the memory in bytes while a scan is refused."""
    tracemalloc.start()
    try:
        with refused(UnreadableFileError, "1 of 1"):
            read_scan(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = {
    "a long name": b"\x10\x00\x10\x00UT\0\0" + struct.pack("<I", 0xFFFFFFF0) + b"Secretname",
    "a long sequence": sequence(b"\x00\x52\x30\x92", 0xFFFFFFF0, b"\xfe\xff\x00\xe0\xf0\xff\xff\xff"),
    "nested sequences": sequence(b"\x00\x52\x30\x92", 0xFFFFFFFF, b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 20_000,
    "nested private sequences": sequence(b"\x09\x00\x30\x92", 0xFFFFFFFF, b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 20_000,
    "no items": sequence(b"\x00\x52\x30\x92", 0xFFFFFFFF, b"\x08\x00\x60\x00" * 100),
    "an unknown length": b"\x28\x00\x10\x00UN\0\0\xff\xff\xff\xff" + bytes(100),
}


@pytest.mark.parametrize("case", HUGE)
def test_impossible_lengths_use_no_memory(tmp_path, case):
    (tmp_path / "a").write_bytes(PREFIX + CT + HUGE[case])
    assert peak_of(tmp_path / "a") < 4 << 20


def test_the_number_of_elements_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(elements, "_MOST_ELEMENTS", 1000)
    items = b"\xfe\xff\x00\xe0\x00\x00\x00\x00" * 1001
    (tmp_path / "a").write_bytes(PREFIX + CT + sequence(b"\x00\x52\x30\x92", len(items), items))
    with refused(UnreadableFileError, "PerFrameFunctionalGroupsSequence (5200,9230)", "too many elements"):
        read_scan(tmp_path / "a")


def test_a_deflated_bomb_is_refused_with_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(deflated, "MAX_INFLATED_BYTES", 8 << 20)
    packer = zlib.compressobj(wbits=-15)
    content = packer.compress(CT + b"\x09\x00\x10\x00OB\0\0" + struct.pack("<I", 100 << 20))
    for _ in range(20):
        content += packer.compress(bytes(1 << 20))
    meta = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM" + meta + content + packer.flush())
    assert peak_of(tmp_path / "a") < 4 << 20
    with refused(UnreadableFileError, "deflated data set is damaged or too large"):
        read_scan(tmp_path / "a")


def test_a_damaged_deflated_file_is_refused(tmp_path):
    packed = bytearray(zlib.compress(CT * 50, wbits=-15))
    packed[4] ^= 0xFF
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99" + bytes(packed))
    with refused(UnreadableFileError, "1 of 1"):
        read_scan(tmp_path / "a")


def test_a_step_backwards_in_a_deflated_stream_unpacks_again():
    content = np.random.default_rng(1).integers(0, 4, 300_000).astype(np.uint8).tobytes()
    stream = BytesIO(b"head" + zlib.compress(content)[2:-4])
    stream.seek(4)
    unpacked = deflated.inflated(stream)
    for place in (0, 200_000, 5, 299_990, 100_000):
        unpacked.seek(place)
        assert unpacked.read(50) == content[place : place + 50]
    assert unpacked.read() == content[100_050:]


def test_an_element_that_occurs_with_two_values_is_named(tmp_path):
    def twice(dataset: Dataset, place: int) -> None:
        raw(dataset, 0x00280031, "DS", b"first")

    folder = SERIES.write(tmp_path, twice)
    for path in folder.iterdir():
        content = path.read_bytes().replace(b"\x28\x00\x31\x00DS\x06\x00first ", b"\x28\x00\x30\x00DS\x06\x004\\4   ")
        path.write_bytes(content)
    with refused(GeometryError, "PixelSpacing (0028,0030) occurs several times with different values in 8 of 8"):
        read_scan(folder)


def test_a_sequence_of_unknown_representation_is_implicit():
    """PS3.5 section 6.2.2: an element UN of undefined length contains items in implicit encoding."""
    rows = b"\x28\x00\x10\x00\x02\x00\x00\x00\x07\x00"
    item = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(rows)) + rows
    content = b"\x28\x00\x10\x91UN\0\0\xff\xff\xff\xff" + item + b"\xfe\xff\xdd\xe0" + bytes(4)
    after = b"\x28\x00\x10\x00US\x02\x00\x05\x00"
    stream = BytesIO(PREFIX + content + after)
    measures = 0x00289110
    header = read_elements(stream, read_encoding(stream), frozenset({measures, ROWS}))
    assert header.damage == ""
    assert header.elements[measures].items[0][ROWS].data == b"\x07\x00"
    assert header.elements[ROWS].data == b"\x05\x00"


def test_names_of_elements():
    assert element_name("PixelSpacing") == element_name(0x00280030) == "PixelSpacing (0028,0030)"
    assert element_name(0x00091234) == "the element (0009,1234)"


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=400))
def test_other_files_do_not_look_like_dicom(content):
    assert not looks_like_dicom(b"\x89PNG\r\n" + content)
    assert not looks_like_dicom(b"%PDF-1.7\n" + content)
    assert not looks_like_dicom(b"\x08\x00\x05\x00CS" + content[:2])


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=400), start=st.sampled_from([PREFIX, PREFIX + CT, b"", META, CT, PREFIX[:132]]))
def test_any_bytes_are_a_header_or_a_damage(content, start):
    stream = BytesIO(start + content)
    try:
        encoding = read_encoding(stream)
    except EOFError:
        return
    header = read_elements(stream, encoding, frozenset({ROWS, 0x52009230}))
    assert header.damage or header.pixels or header.elements is not None
