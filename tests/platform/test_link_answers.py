"""Answers that are damaged, foreign or hostile: each fails its own client, and nobody else."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import grpc
import numpy as np
import psutil
import pytest

from link_calls import SETTINGS, Round, W, answer, eventually, first_task, join, message, submit
from trellis import flower
from trellis.wire.generated import link_pb2 as pb


def cut(header, data):
    return header, data[:-10]


def longer(header, data):
    return header, data + b"x"


def altered(header, data):
    return header, data[:-1] + b"\1"


def lies(header, data):
    header.answer.size -= 1
    return header, data


def huge(header, data):
    header.answer.size = header.answer.decoded_size = 10**10
    return header, data


def by_one(header, data):
    header.answer.size = header.answer.decoded_size = SETTINGS.max_payload_bytes + 1
    return header, data


def repeated(header, data):
    return header, data[:50_000] + data


def swapped(header, data):
    return header, data[50_000:100_000] + data[:50_000] + data[100_000:]


def of_another_run(header, data):
    return header, answer(7.0)


def missing(header, data):
    return header, data[:50_000] + data[100_000:]


def strange(header, data):
    header.answer.encoding = 77
    return header, data


@pytest.mark.battery("B5")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (longer, "more than"),
        (altered, "digest"),
        (repeated, "more than"),
        (swapped, "digest"),
        (of_another_run, "digest"),
        (lies, "two different sizes"),
        (huge, "10000000000 bytes; at most 5000000"),
        (by_one, "5000001 bytes"),
        (strange, "encoding 77"),
    ],
)
def test_a_wrong_payload_fails_its_client_and_nobody_else(grid, calls, change, said):
    bad, good = join(calls, "bad", 0).session, join(calls, "good", 1).session
    going = Round(grid, message(0), message(1))
    (one, _), (two, _) = first_task(calls, bad), first_task(calls, good)
    verdict = submit(calls, bad, one.id, answer(), change)
    assert verdict.verdict == pb.VERDICT_REFUSED
    assert said in verdict.reason
    assert submit(calls, good, two.id, answer()).verdict == pb.VERDICT_ACCEPTED
    replies = {flower.client_of(r.metadata.src_node_id): r for r in going.end()}
    assert said in replies[0].error.reason
    assert replies[1].has_content()
    eventually(lambda: grid.link.room.used == 0)  # room is given back, that of the bad answer too


@pytest.mark.battery("B5")
@pytest.mark.parametrize("change", [cut, missing])
def test_what_was_cut_short_may_be_sent_again(grid, calls, change):
    """The end or a chunk in the middle is missing: the node is told to send it again."""
    session = join(calls).session
    going = Round(grid, message())
    task, _ = first_task(calls, session)
    with pytest.raises(grpc.RpcError, match="bytes came") as caught:
        submit(calls, session, task.id, answer(), change)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert submit(calls, session, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    assert going.end()[0].has_content()


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(save, *arrays, **options):
    file = io.BytesIO()
    save(file, *arrays, **options)
    return file.getvalue()


def archive(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        entry = zipfile.ZipInfo(name)
        entry.compress_type = zipfile.ZIP_DEFLATED
        made.writestr(entry, content)
    return file.getvalue()


FOREIGN = {
    "pickle": lambda path: pickle.dumps(Opens(path)),
    "npy of objects": lambda path: saved(np.save, np.array([Opens(path)], object), allow_pickle=True),
    "npz of objects": lambda path: saved(np.savez, np.array([Opens(path)], object)),
    "npy": lambda path: saved(np.save, W),
    "zip bomb": lambda path: archive("w.npy", bytes(100_000_000)),
    "zip slip": lambda path: archive(f"../../../../../../..{path}", b"x"),
    "safetensors of another format": lambda path: struct.pack("<Q", 2) + b"{}",
}


@pytest.mark.battery("B4")
@pytest.mark.parametrize("kind", FOREIGN)
def test_bytes_that_are_no_records_fail_their_client(grid, calls, kind, tmp_path):
    """Pickles, archives and bombs are not opened: their client fails, its neighbour does not, memory stays flat."""
    bad, good = join(calls, "bad", 0).session, join(calls, "good", 1).session
    going = Round(grid, message(0), message(1))
    (one, _), (two, _) = first_task(calls, bad), first_task(calls, good)
    blob = FOREIGN[kind](tmp_path / "opened")
    before = psutil.Process().memory_info().rss
    assert submit(calls, bad, one.id, blob).verdict == pb.VERDICT_ACCEPTED
    assert submit(calls, good, two.id, answer()).verdict == pb.VERDICT_ACCEPTED
    replies = {flower.client_of(r.metadata.src_node_id): r for r in going.end()}
    assert "cannot be read" in replies[0].error.reason
    assert replies[1].has_content()
    assert not (tmp_path / "opened").exists()
    assert psutil.Process().memory_info().rss - before < 50_000_000


def test_a_refused_answer_stays_refused(grid, calls):
    """If the node did not hear so it asks again; told that it is a duplicate, it would make a lost state count."""
    session = join(calls).session
    going = Round(grid, message())
    task, _ = first_task(calls, session)
    for _ in range(2):
        assert submit(calls, session, task.id, answer(), altered).verdict == pb.VERDICT_REFUSED
    assert "digest" in going.end()[0].error.reason
