"""The worked example of docs/wire.md is what the code makes, byte by byte. As a script this writes it anew."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from trellis.wire import methods
from trellis.wire.content import DTYPES, Record, pack, unpack
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import INLINE, Receiver, chunks, encode

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "wire.md"
BLOCK = re.compile(r"<!-- (bytes|text): ([a-z-]+) -->\n(?:\n```text\n.*?```\n)?", re.S)


def dump(data: bytes) -> str:
    """Bytes as ``hexdump -C`` shows them."""
    lines = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        left, right = row[:8].hex(" "), row[8:].hex(" ")
        seen = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:04x}  {left:<23}  {right:<23}  |{seen}|".rstrip())
    return "\n".join(lines)


def example() -> dict[str, bytes]:
    """The conversation's messages and payloads, by their names in the page."""
    arrays = pack({"record": Record("arrays", {"w": np.array([[1, 2], [3, 4]], "<f4"), "b": np.array([0.5], "<f4")})})
    config = pack({"record": Record("config", {"server-round": 1, "num-rounds": 1, "cell": "main-seed0"})})
    answer = pack(
        {
            "arrays": Record("arrays", {"w": np.array([[1.5, 2], [3, 4]], "<f4"), "b": np.array([0.25], "<f4")}),
            "metrics": Record("metrics", {"num-examples": 7, "loss": 0.75}),
        }
    )
    each = task(arrays, config)
    whole = pb.WorkResponse(task=each).SerializeToString()
    described, _ = encode(answer)
    described.inline = b""
    header = pb.SubmitHeader(session="5e55", task_id=each.id, answer=described)
    return {
        "join": pb.JoinRequest(protocol=1, node="pi-4", instance="c0ffee", client=0, kind=1).SerializeToString(),
        "joined": pb.JoinResponse(
            session="5e55", client=0, num_clients=1, run="demo", max_payload_bytes=2_000_000_000,
            chunk_bytes=1_000_000, beat_seconds=10.0, keep_answers=8,
        ).SerializeToString(),
        "work": pb.WorkRequest(session="5e55").SerializeToString(),
        "arrays": arrays,
        "config": config,
        "task-head": whole[: whole.index(each.records[0].SerializeToString())],
        "answer": answer,
        "submit-header": pb.SubmitRequest(header=header).SerializeToString(),
        "verdict": pb.SubmitResponse(verdict=pb.VERDICT_ACCEPTED).SerializeToString(),
    }  # fmt: skip


def task(arrays: bytes, config: bytes) -> pb.Task:
    setup = pb.Payload(digest="5e" * 32, size=900, decoded_size=2000, encoding=pb.ENCODING_ZSTD)
    each = pb.Task(
        id="a1" * 16, kind="train", cell="main-seed0", setup=setup, seconds_left=600.0, shortening=1, after=""
    )
    for name, data in (("arrays", arrays), ("config", config)):
        each.records.add(name=name, payload=encode(data)[0])
    return each


def shown() -> dict[str, str]:
    """What stands in the page under each marker."""
    made = example()
    each = task(made["arrays"], made["config"])
    for record in each.records:
        record.payload.inline = b"..."
    return {name: dump(data) for name, data in made.items()} | {"task": text_format.MessageToString(each).rstrip()}


def filled(text: str) -> str:
    """The page with its blocks made anew."""
    blocks = shown()
    return BLOCK.sub(lambda found: f"<!-- {found[1]}: {found[2]} -->\n\n```text\n{blocks[found[2]]}\n```\n", text)


def test_the_pages_bytes_are_the_codes():
    text = DOC.read_text()
    assert {found[2] for found in BLOCK.finditer(text)} == shown().keys()
    assert filled(text) == text


def test_the_pages_numbers_are_the_examples():
    text, made = DOC.read_text(), example()
    arrays, answer = made["arrays"], made["answer"]
    assert f"this payload, {len(arrays)} bytes: a header of {arrays[0]} (`{arrays[0]:02x}`)" in text
    assert arrays[8 : 8 + arrays[0]].endswith(b"}  ")
    assert text.count(f"size={len(answer)}, decoded_size={len(answer)}") == 1
    tag = pb.SubmitRequest(data=answer).SerializeToString()[: -len(answer)]
    assert f"the tag `12`, the length `{tag[1:].hex(' ')}` ({len(answer)})" in text
    assert f"`00 00 00 {len(made['join']):02x}`" in text
    assert f"up to {INLINE:,} encoded bytes" in text
    assert all(f" {code}" in text for code in DTYPES)
    assert all(f"| `{name}` |" in text for name in methods.CALLS)
    assert f"version {methods.PROTOCOL}." in text


def test_the_pages_bytes_can_be_read():
    """By the code's own readers, back to what the page says they mean."""
    made = example()
    record = unpack(made["arrays"])["record"]
    np.testing.assert_array_equal(record.values["w"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(record.values["b"], [0.5])
    header = pb.SubmitRequest.FromString(made["submit-header"]).header
    receiver = Receiver(header.answer, 10**6)
    for chunk in chunks(made["answer"], size=100):
        receiver.add(chunk)
    content = unpack(receiver.finish())
    assert content["metrics"].values == {"num-examples": 7, "loss": 0.75}
    assert header.answer.digest == hashlib.sha256(made["answer"]).hexdigest()


@pytest.mark.parametrize("damage", ["a digit", "a block", "a marker"])
def test_a_page_that_is_wrong_is_seen(damage):
    text = DOC.read_text()
    start = text.index("```text\n", text.index("bytes: join")) + 8
    wrong = {
        "a digit": text[: start + 7] + ("9" if text[start + 7] != "9" else "8") + text[start + 8 :],
        "a block": text[:start] + text[text.index("```", start) :],
        "a marker": text.replace("bytes: join -->", "bytes: joined -->"),
    }[damage]
    assert wrong != text and filled(wrong) != wrong


if __name__ == "__main__":
    DOC.write_text(filled(DOC.read_text()))
