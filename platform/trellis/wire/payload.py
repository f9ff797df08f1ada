"""Payloads: encoded bytes with their digest, in chunks; and answers that outgrow memory, in files."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from trellis.errors import DataError
from trellis.wire.generated import link_pb2 as pb

CHUNK = 1_000_000
"""Bytes of a chunk. gRPC's receive limit is 4 MB unless both ends raise it; more than this is no faster."""

INLINE = 16_384
"""Payloads up to this many bytes go into the task itself: a round trip saved."""

SPOOL = 4_000_000
"""Answers above this many bytes wait in a file, whose pages the system can take back, and not in memory."""


def encode(raw: bytes, encoding: pb.Encoding = pb.ENCODING_NONE, level: int = 3) -> tuple[pb.Payload, bytes]:
    """Return what describes some bytes on the wire, and the encoded bytes; short ones stand in the description too."""
    data = raw
    if encoding == pb.ENCODING_ZSTD:
        data = zstandard.ZstdCompressor(level=level).compress(raw)
    payload = pb.Payload(
        digest=hashlib.sha256(data).hexdigest(), size=len(data), decoded_size=len(raw), encoding=encoding
    )
    if len(data) <= INLINE:
        payload.inline = data
    return payload, data


def chunks(data: bytes | memoryview, offset: int = 0, size: int = CHUNK) -> Iterator[bytes]:
    """Yield the bytes from an offset on."""
    view = memoryview(data)
    for start in range(offset, len(view), size):
        yield bytes(view[start : start + size])


class Receiver:
    """Takes the chunks of one payload and gives back its decoded bytes, or says what is wrong with them.

    Nothing is set aside for what a payload claims to be: memory and file grow with the bytes that have come.

    Args:
        payload: as described by the sender.
        limit: the most bytes allowed, encoded or decoded.
        spool_above: decoded bytes above this many are kept in a file that has no name.
        folder: where that file is; None for the system's temporary folder, which is memory on some machines.

    Attributes:
        received: encoded bytes that came.
        decoded: bytes that they decode to.

    Raises:
        DataError: the description itself is not acceptable.
        OSError: the file cannot be made; ``add`` and ``finish`` raise it where there is no room for it.
    """

    def __init__(self, payload: pb.Payload, limit: int, spool_above: int = SPOOL, folder: Path | None = None) -> None:
        if max(payload.size, payload.decoded_size) > limit:
            said = max(payload.size, payload.decoded_size)
            raise DataError("payload-too-large", f"a payload of {said} bytes; at most {limit} are taken")
        if payload.encoding not in (pb.ENCODING_NONE, pb.ENCODING_ZSTD):
            raise DataError("payload-encoding", f"a payload in the unknown encoding {payload.encoding}")
        if payload.encoding == pb.ENCODING_NONE and payload.size != payload.decoded_size:
            raise DataError("payload-size", "a payload that is not encoded has two different sizes")
        self.payload = payload
        self.received = 0
        self._sha = hashlib.sha256()
        self.decoded = 0
        self._inflate = zstandard.ZstdDecompressor().decompressobj() if payload.encoding == pb.ENCODING_ZSTD else None
        self._file: BinaryIO | None = None
        if payload.decoded_size > spool_above:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (``close`` and ``finish`` close it)
        self._parts: list[bytes] = []

    def add(self, data: bytes) -> None:
        """Take one chunk.

        Raises:
            DataError: more bytes than announced, or bytes that cannot be decoded.
        """
        self.received += len(data)
        if self.received > self.payload.size:
            raise DataError("payload-size", f"more than the {self.payload.size} bytes announced")
        self._sha.update(data)
        if self._inflate is None:
            self._keep(data)
            return
        # Fed in slices, so that a few bytes that stand for very many are caught before they are all there.
        for start in range(0, len(data), 4096):
            try:
                self._keep(self._inflate.decompress(data[start : start + 4096]))
            except zstandard.ZstdError as error:
                raise DataError("payload-damaged", f"a payload that zstd cannot decode: {error}") from None

    def _keep(self, data: bytes) -> None:
        self.decoded += len(data)
        if self.decoded > self.payload.decoded_size:
            raise DataError("payload-size", f"it decodes to more than the {self.payload.decoded_size} bytes announced")
        if self._file is not None:
            self._file.write(data)
        else:
            self._parts.append(data)

    def finish(self) -> Any:
        """Return all decoded bytes as a read-only buffer.

        Raises:
            DataError: bytes are missing, or are not those announced.
        """
        payload = self.payload
        if self.received != payload.size or self.decoded != payload.decoded_size:
            raise DataError(
                "payload-size",
                f"{self.received} of {payload.size} bytes came, {self.decoded} of {payload.decoded_size} decoded",
            )
        if self._sha.hexdigest() != payload.digest:
            raise DataError("payload-damaged", "the bytes do not have the digest announced")
        if self._file is None:
            return b"".join(self._parts)
        self._file.flush()
        try:
            return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        finally:
            self.close()

    def close(self) -> None:
        """Give back what was taken. What ``finish`` returned stays readable."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._parts = []
