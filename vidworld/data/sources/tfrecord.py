"""TFRecord files and the `tf.train.Example` messages in them, without TensorFlow, byte for byte.

A TFRecord file is a run of records: length (uint64), masked CRC of the length, payload, masked CRC of the
payload, all little-endian; the CRC is CRC-32C. Sources: tensorflow/core/lib/io/record_writer.h and
tensorflow/core/example/{example,feature}.proto. An Example maps names to lists of bytes, floats or integers.

Files may be cut or damaged: a length is believed only when its CRC holds and the file is long enough, so
nothing is read or allocated that is not there, and all damage is one DataError that says where.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vidworld.errors import DataError

MAX_RECORD_BYTES = 2**31
"""A protobuf message cannot be larger."""

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8
_POLYNOMIAL = 0x82F63B78
_LANE_BYTES = 64
_LEVELS = 10
_BLOCK_BYTES = _LANE_BYTES << _LEVELS

Value = list[memoryview] | np.ndarray
"""What a feature holds: pieces of bytes, or float32 [N], or int64 [N]."""


@dataclass(frozen=True)
class Span:
    """Where the payload of a record lies in its file."""

    offset: int
    length: int


def record_spans(path: Path) -> list[Span]:
    """Find all records of a file by their lengths alone; payloads are skipped.

    Raises DataError naming the record at which the file is cut or its length does not hold.
    """
    spans: list[Span] = []
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            offset = 0
            while offset < size:
                file.seek(offset)
                length = _length(file.read(_HEADER.size), size - offset, f"record {len(spans)}", path)
                spans.append(Span(offset + _HEADER.size, length))
                offset += _HEADER.size + length + _CHECKSUM.size
    except OSError as error:
        raise DataError("cannot read the records", where=path, got=error.strerror) from None
    return spans


def read_record(path: Path, span: Span) -> memoryview:
    """The payload of one record, verified against its CRC."""
    try:
        with path.open("rb") as file:
            file.seek(span.offset)
            content = file.read(span.length + _CHECKSUM.size)
    except OSError as error:
        raise DataError("cannot read the records", where=path, got=error.strerror) from None
    where = f"record at byte {span.offset}"
    if len(content) != span.length + _CHECKSUM.size:
        raise DataError(f"truncated {where}", where=path, got=f"{len(content)} bytes")
    payload = memoryview(content)[: span.length]
    if masked_crc32c(payload) != _CHECKSUM.unpack_from(content, span.length)[0]:
        raise DataError(f"checksum of the {where}", where=path, got="another one", fix="the file is damaged")
    return payload


def masked_crc32c(data: bytes | memoryview) -> int:
    """CRC-32C as TFRecord stores it: rotated and offset, so that a CRC of CRCs is no trap."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli), e.g. 0xE3069283 of b"123456789".

    A CRC is linear over GF(2): blocks are split into lanes of 64 bytes that NumPy advances together, and
    neighbours are joined by shifting the left one over the right one's length (Adler's crc32_combine).
    """
    if len(data) < 2 * _LANE_BYTES:
        crc = 0xFFFFFFFF
        table = _byte_table().tolist()
        for byte in bytes(data):
            crc = table[(crc ^ byte) & 255] ^ crc >> 8
        return crc ^ 0xFFFFFFFF
    # Zeros in front change nothing while the register is zero; the initial ones go into the first bytes.
    padding = -len(data) % _BLOCK_BYTES
    joined, over_block = 0, _shifts()[_LEVELS]
    for start in range(-padding, len(data), _BLOCK_BYTES):
        block = np.frombuffer(data[max(start, 0) : start + _BLOCK_BYTES], np.uint8)
        if start < 4:
            block = np.concatenate([np.zeros(_BLOCK_BYTES - len(block), np.uint8), block])
            block[max(-start, 0) : 4 - start] ^= 255
        joined = int(_apply(over_block, np.array([joined], np.uint32))[0]) ^ _raw_crc_of_block(block)
    return joined ^ 0xFFFFFFFF


def _raw_crc_of_block(block: np.ndarray) -> int:
    """CRC register after one block of bytes, from zero."""
    words = np.ascontiguousarray(block.view("<u4").reshape(-1, _LANE_BYTES // 4).T)
    low_table, high_table = _word_tables()
    crcs = np.zeros(words.shape[1], np.uint32)
    for word in words:
        crcs ^= word
        crcs = low_table[crcs & 0xFFFF] ^ high_table[crcs >> 16]
    for shift in _shifts()[:_LEVELS]:
        crcs = _apply(shift, crcs[0::2]) ^ crcs[1::2]
    return int(crcs[0])


@lru_cache(maxsize=1)
def _byte_table() -> np.ndarray:
    """Register [256] after one byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, np.uint32(_POLYNOMIAL) ^ table >> 1, table >> 1).astype(np.uint32)
    return table


@lru_cache(maxsize=1)
def _word_tables() -> tuple[np.ndarray, np.ndarray]:
    """Register [65536] after four zero bytes, for each low and each high half of the register before."""
    halves = np.arange(65536, dtype=np.uint32)
    tables = []
    for crcs in (halves, halves << 16):
        for _ in range(4):
            crcs = _byte_table()[crcs & 255] ^ crcs >> 8
        tables.append(crcs)
    return tables[0], tables[1]


@lru_cache(maxsize=1)
def _shifts() -> list[np.ndarray]:
    """Shift i moves a register over 64 * 2^i zero bytes, as tables [4, 256] of its four bytes."""
    matrix = np.uint32(1) << np.arange(32, dtype=np.uint32)
    low_table, high_table = _word_tables()
    for _ in range(_LANE_BYTES // 4):
        matrix = low_table[matrix & 0xFFFF] ^ high_table[matrix >> 16]
    shifts = []
    for _ in range(_LEVELS + 1):
        bits = np.arange(256)[:, None] >> np.arange(8) & 1
        tables = [
            np.bitwise_xor.reduce(np.where(bits, matrix[8 * byte : 8 * byte + 8], np.uint32(0)), axis=1)
            for byte in range(4)
        ]
        shifts.append(np.stack(tables).astype(np.uint32))
        matrix = _apply(shifts[-1], matrix)
    return shifts


def _apply(shift: np.ndarray, crcs: np.ndarray) -> np.ndarray:
    first, second, third, fourth = shift
    return first[crcs & 255] ^ second[crcs >> 8 & 255] ^ third[crcs >> 16 & 255] ^ fourth[crcs >> 24]


def _length(header: bytes, left: int, name: str, path: Path) -> int:
    """Length of a payload, believed only when its CRC and the size of the file allow it."""
    if len(header) < _HEADER.size:
        raise DataError(f"truncated {name}", where=path, got=f"{len(header)} of {_HEADER.size} header bytes")
    length, checksum = _HEADER.unpack(header)
    if masked_crc32c(header[:8]) != checksum:
        raise DataError(f"length of {name}", where=path, got="a wrong checksum", fix="the file is damaged")
    if length > MAX_RECORD_BYTES:
        raise DataError(f"length of {name}", where=path, got=length, expected=f"at most {MAX_RECORD_BYTES}")
    if _HEADER.size + length + _CHECKSUM.size > left:
        raise DataError(f"truncated {name}", where=path, got=f"{left} bytes", expected=length + 16)
    return length


def parse_example(data: bytes | memoryview) -> dict[str, Value]:
    """Names and values of a serialised `tf.train.Example`; bytes stay views of `data`.

    Raises DataError for what is no such message.
    """
    features: dict[str, Value] = {}
    for field, content in _fields(memoryview(data)):
        if field != 1:
            continue
        for entry_field, entry in _fields(_message(content)):
            if entry_field != 1:
                continue
            key, value = "", memoryview(b"")
            for part_field, part in _fields(_message(entry)):
                if part_field == 1:
                    key = _text(_message(part))
                elif part_field == 2:
                    value = _message(part)
            features[key] = _feature(value)
    return features


def _feature(message: memoryview) -> Value:
    """The list in a Feature; of several the last one counts, as in any `oneof`."""
    values: Value = []
    for field, content in _fields(message):
        match field:
            case 1:
                values = [_message(piece) for number, piece in _fields(_message(content)) if number == 1]
            case 2:
                values = _numbers(_message(content), 4)
            case 3:
                values = _numbers(_message(content), 0)
            case _:
                continue
    return values


def _numbers(message: memoryview, width: int) -> np.ndarray:
    """Repeated numbers, packed or not: float32 [N] of `width` 4, or varints as int64 [N] of `width` 0."""
    parts: list[np.ndarray] = []
    dtype = np.dtype("<f4") if width else np.dtype(np.int64)
    for field, content in _fields(message):
        if field != 1:
            continue
        if isinstance(content, int):
            # A lone varint; floats alone come as four bytes.
            if width:
                raise DataError("damaged Example", got="an integer among floats")
            parts.append(np.array([content], np.uint64).view(np.int64))
        elif width:
            if len(content) % width:
                raise DataError("damaged Example", got=f"{len(content)} bytes of floats")
            parts.append(np.frombuffer(content, dtype))
        else:
            parts.append(_varints(content))
    return np.concatenate(parts).astype(dtype.newbyteorder("="), copy=False) if parts else np.zeros(0, dtype)


def _varints(data: memoryview) -> np.ndarray:
    """All varints of a packed list as int64 [N]; negative numbers take ten bytes."""
    raw = np.frombuffer(data, np.uint8)
    if not len(raw):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(raw < 128)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    if not len(ends) or ends[-1] != len(raw) - 1 or lengths.max() > 10:
        raise DataError("damaged Example", got="a varint without an end")
    place = np.arange(len(raw)) - np.repeat(starts, lengths)
    pieces = (raw & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(pieces, starts).view(np.int64)


def _fields(message: memoryview) -> "list[tuple[int, memoryview | int]]":
    """Field numbers and contents of a message: an int for a varint, else the bytes."""
    fields: list[tuple[int, memoryview | int]] = []
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if not number:
            raise DataError("damaged Example", got="field 0")
        match wire_type:
            case 0:
                value, position = _varint(message, position)
                fields.append((number, value))
                continue
            case 1 | 5:
                length = 8 if wire_type == 1 else 4
            case 2:
                length, position = _varint(message, position)
            case _:
                raise DataError("damaged Example", got=f"wire type {wire_type}")
        if length > end - position:
            raise DataError("damaged Example", got=f"field {number} of {length} bytes")
        fields.append((number, message[position : position + length]))
        position += length
    return fields


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A varint and the position behind it."""
    value = 0
    for index, byte in enumerate(message[position : position + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, position + index + 1
    raise DataError("damaged Example", got="a varint without an end")


def _message(content: memoryview | int) -> memoryview:
    if isinstance(content, int):
        raise DataError("damaged Example", got="a number", expected="a message")
    return content


def _text(data: memoryview) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError:
        raise DataError("damaged Example", got="a name that is not UTF-8") from None
