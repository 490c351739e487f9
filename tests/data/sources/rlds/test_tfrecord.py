"""Bytes in, the same bytes out; and whatever is damaged is one DataError."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidworld.data.sources import tfrecord
from vidworld.data.sources.tfrecord import crc32c, parse_example, read_record, record_spans
from vidworld.errors import DataError

floats = st.lists(st.floats(width=32, allow_nan=False), max_size=40).map(lambda v: np.array(v, np.float32))
integers = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40).map(lambda v: np.array(v, np.int64))
pieces = st.lists(st.binary(max_size=40), max_size=8)
examples = st.dictionaries(st.text(max_size=12), st.one_of(floats, integers, pieces), max_size=6)


def equal(found: tfrecord.Value, true: object) -> bool:
    """Whether a parsed value is the one written; an empty list has no type in the message."""
    if len(found) == 0:
        return len(true) == 0  # type: ignore[arg-type]
    if isinstance(true, list):
        return isinstance(found, list) and [bytes(piece) for piece in found] == true
    return isinstance(found, np.ndarray) and np.array_equal(found, true) and found.dtype == true.dtype  # type: ignore[attr-defined]


def read_all(path: Path) -> list[bytes]:
    return [bytes(read_record(path, span)) for span in record_spans(path)]


@given(examples, st.booleans())
def test_round_trip(encode, values, packed):
    found = parse_example(encode.example(values, packed))
    assert found.keys() == values.keys()
    assert all(equal(found[name], values[name]) for name in values)


def test_trailing_zeros_and_negative_numbers_survive(encode):
    values = {"b": [b"\x00", b"jpeg\x00\x00", b""], "i": np.array([-1, -(2**63), 0, 2**63 - 1])}
    found = parse_example(encode.example(values))
    assert [bytes(piece) for piece in found["b"]] == values["b"]
    assert (found["i"] == values["i"]).all()


def test_unknown_fields_are_skipped_and_a_oneof_ends_with_its_last(encode):
    entry = encode.field(1, b"x") + encode.field(
        2,
        encode.field(1, encode.field(1, b"first"))
        + encode.field(9, b"new")
        + encode.field(3, encode.field(1, b"\x05")),
    )
    (numbers,) = parse_example(encode.field(7, b"?") + encode.field(1, encode.field(1, entry))).values()
    assert np.array_equal(numbers, [5])


@pytest.mark.parametrize(
    "data",
    [b"\x0a", b"\x0a\x05ab", b"\x0b", b"\xff" * 12, b"\x0a\x02\x0a\x7f", b"\x00\x00", b"\x08\x01"],
    ids=["no length", "short", "group", "endless varint", "short inside", "field 0", "number"],
)
def test_what_is_no_example(data):
    with pytest.raises(DataError, match="damaged Example"):
        parse_example(data)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data):
    with contextlib.suppress(DataError):
        parse_example(data)


@settings(max_examples=300)
@given(examples, st.data())
def test_any_flip_of_an_example_parses_or_is_refused(encode, values, data):
    content = bytearray(encode.example(values))
    for _ in range(data.draw(st.integers(1, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(DataError):
        parse_example(bytes(content[: data.draw(st.integers(0, len(content)))]))


@settings(max_examples=150)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.data())
def test_every_flip_and_cut_of_a_file_is_found(encode, tmp_path_factory, payloads, data):
    """Unlike a tar: no damaged byte and no cut, except between two records, goes unnoticed."""
    path = tmp_path_factory.mktemp("t") / "x.tfrecord"
    records = [encode.record(payload) for payload in payloads]
    content = bytearray(b"".join(records))
    ends = np.cumsum([len(record) for record in records])
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        end = data.draw(st.integers(1, len(content) - 1))
        if end in ends:
            return
        content = content[:end]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"truncated|checksum|length"):
        read_all(path)


def test_records_are_found_without_their_payloads(encode, tmp_path):
    path = tmp_path / "x.tfrecord"
    payloads = [b"", b"a", b"\x00" * 5000]
    path.write_bytes(b"".join(map(encode.record, payloads)))
    assert read_all(path) == payloads
    (tmp_path / "empty").write_bytes(b"")
    assert record_spans(tmp_path / "empty") == []
    with pytest.raises(DataError, match="cannot read the records"):
        record_spans(tmp_path / "none")


@pytest.mark.parametrize("length", [2**31 + 1, 2**63, 2**64 - 1, 100])
def test_a_length_that_cannot_be_allocates_nothing(encode, tmp_path, length):
    """With a checksum that holds: hostile, not damaged."""
    path = tmp_path / "x.tfrecord"
    header = struct.pack("<Q", length)
    path.write_bytes(header + struct.pack("<I", tfrecord.masked_crc32c(header)) + b"abc")
    with pytest.raises(DataError, match=r"(length of|truncated) record 0"):
        record_spans(path)


def test_checksum_agrees_with_the_definition(encode):
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    generator = np.random.default_rng(0)
    lane, block = tfrecord._LANE_BYTES, tfrecord._BLOCK_BYTES
    for length in (1, 2 * lane - 1, 2 * lane, 2 * lane + 1, 1000):
        data = generator.bytes(length)
        assert crc32c(data) == encode.crc32c(data)
    # One long definition, and prefixes around the seams by the identity crc(a + b) of a known a + b.
    for length in (block - 1, block, block + 1, block + 3, block + 5):
        data = generator.bytes(length)
        assert crc32c(memoryview(data)) == encode.crc32c(data)
