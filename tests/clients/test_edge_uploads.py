"""What waits for the cloud, what is selected for it, what is kept on disk, and the loop that sends it."""

from __future__ import annotations

import math
import os
import signal
import stat
import subprocess
import sys
import time
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_edge import PREPROCESSING, Tiny, images, tiny_model

from trellis.errors import RunError, TrellisError
from trellis.models import adaptation
from trellis_clients.edge import selection, state
from trellis_clients.edge.agent import Agent
from trellis_clients.edge.runtime import STATE, Runtime, Selection, Settings
from trellis_clients.edge.uploads import UploadBuffer
from trellis_clients.trainers.cloud_edge import _selection

IMAGE = 16  # bytes


def pictures(*values):
    return np.stack([np.full((1, 4, 4), value, np.uint8) for value in values])


def add(buffer, *values):
    return buffer.add(pictures(*values), np.array([value / 10 for value in values]), "1.0")


def waiting(buffer):
    found = buffer.take(10**6)
    buffer.back([each.number for each in found])
    assert all(each.entropy == pytest.approx(each.image.flat[0] / 10) and each.model == "1.0" for each in found)
    return [int(each.image.flat[0]) for each in found]


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "uploads"


# -- the buffer -------------------------------------------------------------------------------------------


def test_what_waits_on_disk_is_closed_to_others_on_the_machine(tmp_path):
    add(UploadBuffer(3, 10**6, folder=tmp_path / "uploads"), 1)
    Runtime(tiny_model(), folder=tmp_path / "state")
    for name in ("uploads", "state"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


@pytest.mark.parametrize(("items", "size"), [(3, 10**6), (10**6, 3 * IMAGE + 5)])
def test_where_a_sample_does_not_fit_the_oldest_goes(folder, items, size):
    buffer = UploadBuffer(items, size, folder=folder)
    assert add(buffer, 1, 2) == 0
    assert add(buffer, 3, 4, 5) == 2
    assert waiting(buffer) == [3, 4, 5]
    assert (buffer.added, buffer.dropped, len(buffer), buffer.nbytes) == (5, 2, 3, 3 * IMAGE)


def test_or_the_newest_where_that_is_asked(folder):
    buffer = UploadBuffer(3, 10**6, "newest", folder)
    assert add(buffer, 1, 2) == 0
    assert add(buffer, 3, 4, 5) == 2
    assert waiting(buffer) == [1, 2, 3]


def test_a_sample_larger_than_the_buffer_costs_no_other(folder):
    buffer = UploadBuffer(9, 2 * IMAGE, folder=folder)
    add(buffer, 1)
    assert buffer.add(np.zeros((1, 3, 4, 4), np.uint8), np.zeros(1), "1.0") == 1
    assert waiting(buffer) == [1]


def test_what_is_lent_is_not_lent_twice_and_waits_again_if_it_did_not_arrive(folder):
    buffer = UploadBuffer(9, 10**6, folder=folder)
    add(buffer, 1, 2, 3, 4)
    first, second = buffer.take(2), buffer.take(2)
    assert [int(each.image.flat[0]) for each in first + second] == [1, 2, 3, 4]
    assert buffer.take(2) == []
    buffer.sent([each.number for each in second])
    buffer.back([each.number for each in first])
    assert waiting(buffer) == [1, 2]
    assert (buffer.done, len(buffer)) == (2, 2)


def test_bounds_that_hold_nothing_are_refused():
    for items, size in ((0, 10), (10, 0), (-1, 10)):
        with pytest.raises(TrellisError, match="holds nothing"):
            UploadBuffer(items, size)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 4)),
        st.tuples(st.just("sent"), st.integers(1, 3)),
        st.tuples(st.just("back"), st.integers(1, 3)),
    ),
    max_size=25,
)


@given(steps, st.integers(1, 5), st.integers(1, 5), st.sampled_from(["oldest", "newest"]))
def test_the_buffer_is_a_bounded_queue(actions, items, pictures_of_room, drop):
    """Against a deque, whatever happens in whatever order."""
    buffer, oracle, number = UploadBuffer(items, pictures_of_room * IMAGE, drop), deque(), 0
    most = min(items, pictures_of_room)
    for action, count in actions:
        if action == "add":
            values = [(number + k) % 250 for k in range(count)]
            add(buffer, *values) if values else None
            number += count
            for value in values:
                if len(oracle) == most and drop == "oldest":
                    oracle.popleft()
                if len(oracle) < most:
                    oracle.append(value)
        else:
            taken = buffer.take(count)
            getattr(buffer, action)([each.number for each in taken])
            if action == "sent":
                for _ in taken:
                    oracle.popleft()
        assert len(buffer) <= items and buffer.nbytes == len(buffer) * IMAGE
    assert waiting(buffer) == list(oracle)
    assert buffer.added == number == buffer.dropped + buffer.done + len(buffer)


# -- on disk ----------------------------------------------------------------------------------------------


def test_a_folder_outlives_its_process_and_numbers_are_never_used_again(tmp_path):
    buffer = UploadBuffer(9, 10**6, folder=tmp_path)
    add(buffer, 1, 2, 3)
    lent = buffer.take(2)
    again = UploadBuffer(9, 10**6, folder=tmp_path)
    assert waiting(again) == [1, 2, 3]
    again.sent([each.number for each in again.take(9)])
    assert [path.name for path in tmp_path.iterdir()] == ["next"]
    third = UploadBuffer(9, 10**6, folder=tmp_path)
    add(third, 4)
    (new,) = third.take(9)
    assert new.number > max(each.number for each in lent) + 1


def test_smaller_bounds_after_a_restart_keep_the_newest(tmp_path):
    add(UploadBuffer(9, 10**6, folder=tmp_path), 1, 2, 3, 4)
    assert waiting(UploadBuffer(2, 10**6, folder=tmp_path)) == [3, 4]
    assert len(list(tmp_path.glob("*.npz"))) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_a_damaged_file_costs_that_sample_only(tmp_path, damage):
    add(UploadBuffer(9, 10**6, folder=tmp_path), 1, 2, 3)
    path = tmp_path / "000000000001.npz"
    data = path.read_bytes()
    at = data.index(b"\x02" * IMAGE)
    path.write_bytes(
        {"empty": b"", "cut": data[:-30], "text": b"hello", "flipped": data[:at] + b"\x07" + data[at + 1 :]}[damage]
    )
    (tmp_path / "000000000007.tmp").write_bytes(b"half a file")
    (tmp_path / "notes.npz").write_bytes(b"not ours")
    buffer = UploadBuffer(9, 10**6, folder=tmp_path)
    assert waiting(buffer) == [1, 3]
    assert buffer.dropped == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_state_is_what_it_was(tmp_path):
    arrays = {"a/b": np.arange(6.0).reshape(2, 3), "none": np.zeros((0, 4), np.int64), "scalar": np.float32(2)}
    state.write(tmp_path / "s", {"x": [1, None, "é"]}, arrays)
    values, found = state.read(tmp_path / "s")
    assert values == {"x": [1, None, "é"]}
    assert {name: (v.dtype, v.tolist()) for name, v in found.items()} == {
        name: (v.dtype, v.tolist()) for name, v in arrays.items()
    }


def test_a_state_holds_no_objects(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        state.write(tmp_path / "s", {}, {"o": np.array([{}], object)})
    np.savez(tmp_path / "p.npz", o=np.array([{}], object))
    with pytest.raises(RunError, match="no state of a device"):
        state.read(tmp_path / "p.npz")


@pytest.mark.parametrize("cut", [0, 1, 20, 100, -1])
def test_a_damaged_state_is_one_line(tmp_path, cut):
    state.write(tmp_path / "s", {"x": 1}, {"a": np.arange(50)})
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:cut])
    with pytest.raises(RunError, match="no state of a device") as caught:
        state.read(tmp_path / "s")
    assert "\n" not in str(caught.value)


WRITER = """
import sys, numpy as np
from pathlib import Path
from trellis_clients.edge import state
k = 0
while True:
    k += 1
    state.write(Path(sys.argv[1]), {"k": k}, {"a": np.full(50_000, k)})
    if k == 1:
        print("started", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_state(tmp_path):
    path = tmp_path / "state.npz"
    last = 0
    for pause in (0.0, 0.03, 0.07):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"started\n"
        time.sleep(pause)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        values, arrays = state.read(path)
        assert values["k"] >= 1 and (arrays["a"] == values["k"]).all()
        last = max(last, values["k"])
    assert last > 1


# -- selection --------------------------------------------------------------------------------------------


def test_the_edge_without_torch_selects_as_the_torch_trainer(tmp_path):
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (cls(10, 0.6, 0.05, 0.98) for cls in (selection.Thresholds, _selection.Thresholds))
    bucket, budget = selection.Budget(4e4), _selection.Budget(4e4)
    picked = 0
    for step in range(30):
        logits = torch.randn(16, 10, generator=generator) * (1 + step / 5)
        entropies = adaptation.entropy(logits)
        found = selection.entropy(logits.numpy())
        np.testing.assert_allclose(found, entropies, rtol=1e-4, atol=1e-6)
        mask = ours.keep(entropies.numpy())
        assert mask.tolist() == theirs.keep(entropies).tolist()
        chosen = bucket.afford(mask.nonzero()[0], entropies.numpy(), 64, 0.01)
        assert chosen.tolist() == budget.afford(torch.from_numpy(mask).nonzero()[:, 0], entropies, 64, 0.01).tolist()
        picked += len(chosen)
    assert 0 < picked < 30 * 16
    assert ours.e_max == pytest.approx(theirs.e_max, rel=1e-12)
    assert bucket.saved == pytest.approx(budget.saved)


CHOICE = Selection(0.9, 0.1)


def served(tmp_path=None, selection=CHOICE, items=100, **settings):
    settings = Settings(selection=selection, **settings)
    return Runtime(tiny_model(), settings, UploadBuffer(items, 10**6), tmp_path)


def test_what_is_uploaded_is_what_the_thresholds_keep_as_pixels():
    runtime, thresholds, expected = served(), selection.Thresholds(3, 0.9, 0.1, 1.0), []
    for step in range(4):
        x = images(20, step) / 4
        answer = runtime.predict(x)
        kept = thresholds.keep(selection.entropy(answer.logits))
        expected.append(PREPROCESSING.to_pixels(x[kept]))
    sent = np.stack([each.image for each in runtime.uploads.take(1000)])
    np.testing.assert_array_equal(sent, np.concatenate(expected))
    assert 0 < len(sent) < 80
    assert sent.dtype == np.uint8
    counts = runtime.metrics.registry.get_sample_value
    assert counts("trellis_edge_uploads_total", {"outcome": "selected"}) == len(sent)
    assert counts("trellis_edge_upload_buffer_items") == len(sent)
    assert counts("trellis_edge_entropy_nats_count") == counts("trellis_edge_examples_total") == 80


def test_a_full_buffer_is_counted_and_costs_no_answer():
    runtime = served(selection=Selection(math.inf, -1.0), items=5)
    for _ in range(3):
        assert len(runtime.predict(images(4)).logits) == 4
    assert len(runtime.uploads) == 5
    assert runtime.metrics.registry.get_sample_value("trellis_edge_uploads_total", {"outcome": "dropped"}) == 7


def test_a_disk_that_is_full_costs_no_answer(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    runtime = served(selection=Selection(math.inf, -1.0))
    monkeypatch.setattr(runtime.uploads, "add", full)
    assert len(runtime.predict(images(4)).logits) == 4


# -- the state of a runtime -------------------------------------------------------------------------------


def test_a_restarted_device_goes_on_to_the_same_bits(tmp_path):
    """Adapter, thresholds and affine parameters: all of it comes back."""
    new = {"norm.bias": np.full(16, 0.25, np.float32)}
    whole = served(adapter="t3a")
    first = served(tmp_path, adapter="t3a")
    for runtime in (whole, first):
        runtime.predict(images(8, 1))
        runtime.swap_affine(new)
        runtime.predict(images(8, 2))
    assert first.save() and not first.save()
    second = served(tmp_path, adapter="t3a")
    assert second.live.affine_version == 1
    for step in (3, 4):
        a, b = whole.predict(images(8, step)), second.predict(images(8, step))
        np.testing.assert_array_equal(a.logits, b.logits)
    assert second.thresholds == whole.thresholds


@pytest.mark.parametrize("what", ["another model", "another adapter", "damaged", "older"])
def test_a_state_that_does_not_fit_is_set_aside(tmp_path, what):
    first = served(tmp_path, adapter="t3a")
    first.predict(images(8))
    first.swap_affine({"norm.bias": np.ones(16, np.float32)})
    first.save()
    if what == "damaged":
        (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:200])
    if what == "older":
        state.write(tmp_path / STATE, {"model": "seed-0"}, {})
    settings = Settings("none" if what == "another adapter" else "t3a")
    model = tiny_model(5 if what == "another model" else 0)
    runtime = Runtime(model, settings, folder=tmp_path)
    assert runtime.live.affine_version == 0
    np.testing.assert_array_equal(model.predictor.affine()["norm.bias"], np.zeros(16))
    assert not (tmp_path / STATE).exists() and (tmp_path / "state.aside").exists()
    fresh = Runtime(tiny_model(5 if what == "another model" else 0), settings)
    np.testing.assert_array_equal(runtime.predict(images(4)).logits, fresh.predict(images(4)).logits)


def test_affine_parameters_that_do_not_fit_change_nothing():
    runtime = served()
    before = runtime.predict(images(4)).logits
    for bad in (
        {"norm.weight": np.full(16, np.nan, np.float32)},
        {"norm.weight": np.ones(15, np.float32)},
        {"norm.weight": np.full(16, 2, np.float32), "other": np.ones(16, np.float32)},
        {"norm.bias": np.full(16, 3e38, np.float32)},  # finite itself, but not what the model makes of it
    ):
        with np.errstate(over="ignore", invalid="ignore"), pytest.raises(TrellisError):
            runtime.swap_affine(bad)
    np.testing.assert_array_equal(runtime.predict(images(4)).logits, before)
    assert runtime.live.affine_version == 0
    assert (
        runtime.metrics.registry.get_sample_value("trellis_edge_swaps_total", {"what": "affine", "outcome": "refused"})
        == 4
    )


def test_an_answer_that_is_not_finite_is_an_error_and_leaves_no_trace():
    class Broken(Tiny):
        broken = False

        def __call__(self, x, **inputs):
            found = super().__call__(x, **inputs)
            if self.broken:
                found.logits[:] = np.nan
            return found

    runtime = Runtime(tiny_model(predictor=Broken()))
    before = runtime.predict(images(4)).logits
    runtime.live.model.predictor.broken = True
    with pytest.raises(TrellisError, match="not finite"):
        runtime.predict(images(4))
    runtime.live.model.predictor.broken = False
    np.testing.assert_array_equal(runtime.predict(images(4)).logits, before)


# -- the loop with the cloud ------------------------------------------------------------------------------


class Cloud:
    """Takes samples; every third time it is away, and the reply after delivery may be lost."""

    def __init__(self) -> None:
        self.calls, self.got, self.affine, self.lose = 0, [], None, False

    def __call__(self, uploads):
        self.calls += 1
        if self.calls % 3 == 0:
            raise ConnectionError("away")
        self.got.extend(each.number for each in uploads)
        if self.lose:
            self.lose = False
            raise TimeoutError("no reply")
        return self.affine


def test_samples_go_up_at_least_once_and_affine_parameters_come_down():
    runtime, cloud = served(selection=Selection(math.inf, -1.0)), Cloud()
    agent = Agent(runtime, cloud, most=3)
    runtime.predict(images(10))
    assert agent.exchange()
    cloud.lose = True
    assert not agent.exchange()  # delivered, but the edge cannot know
    assert not agent.exchange()
    assert agent.failures == 2
    cloud.affine = {"norm.bias": np.ones(16, np.float32)}
    while len(runtime.uploads):
        agent.exchange()
    assert sorted(set(cloud.got)) == list(range(10))
    assert len(cloud.got) == 13
    assert runtime.live.affine_version > 0
    np.testing.assert_array_equal(runtime.live.model.predictor.affine()["norm.bias"], np.ones(16))
    cloud.affine = {"norm.bias": np.ones(7, np.float32)}
    before = runtime.live.affine_version
    while not agent.exchange():
        pass
    assert runtime.live.affine_version == before


def test_the_pause_grows_while_the_cloud_is_away_up_to_a_bound():
    agent = Agent(served(), Cloud(), every=10, longest=100)
    assert agent.pause() == 10
    for failures, most in ((1, 20), (2, 40), (3, 80), (4, 100), (1000, 100)):
        agent.failures = failures
        pauses = [agent.pause() for _ in range(50)]
        assert most / 2 <= min(pauses) < max(pauses) <= most


def test_a_faulty_link_does_not_end_the_loop():
    calls = []

    def link(uploads):
        calls.append(len(uploads))
        raise RuntimeError("a bug")

    runtime = served(selection=Selection(math.inf, -1.0))
    runtime.predict(images(2))
    agent = Agent(runtime, link, every=0.01, longest=0.02)
    agent.start()
    until = time.monotonic() + 20
    while len(calls) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    agent.stop()
    assert len(calls) >= 3 and set(calls) == {2}
    assert len(runtime.uploads) == 2
