"""Corruptions are in range, seeded and graded; streams are functions of seed, client and position."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from trellis.data.base import Split
from trellis.data.corruptions import CLEAN, CORRUPTIONS, corrupt
from trellis.data.streams import Stream, StreamConfig
from trellis.errors import DataError


def pictures(count: int = 6, channels: int = 1, size: int = 16) -> torch.Tensor:
    """Return smooth blobs in [0, 1]: something for every corruption to act on."""
    grid = torch.linspace(-1, 1, size)
    centres = torch.rand(count, channels, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    square = (grid[None, None, :, None] - centres[..., :1, None]) ** 2 + (grid - centres[..., 1:, None]) ** 2
    return torch.exp(-8 * square)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_corruption_keeps_shape_and_range_and_depends_on_the_seed_alone(name, channels):
    x = pictures(channels=channels)
    before = x.clone()
    once, again = corrupt(x, name, 5, seeded()), corrupt(x, name, 5, seeded())
    assert torch.equal(x, before)
    assert torch.equal(once, again)
    assert once.shape == x.shape and once.dtype == torch.float32
    assert once.min() >= 0 and once.max() <= 1
    assert not torch.allclose(once, x, atol=1e-3)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_more_severity_is_further_from_the_picture(name):
    x = pictures(32)
    distances = [float((corrupt(x, name, severity, seeded()) - x).pow(2).mean()) for severity in (1, 3, 5)]
    assert distances[0] < distances[1] < distances[2]


def test_clean_is_untouched_and_fractions_lie_between():
    x = pictures()
    assert corrupt(x, CLEAN, 5, seeded()) is x
    low, mid, high = (corrupt(x, "contrast", s, seeded()).std() for s in (3.0, 2.5, 2.0))
    assert low < mid < high


def test_contrast_and_brightness_are_the_papers_numbers():
    x = pictures() * 0.4 + 0.1
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(x, "contrast", 5, seeded()), (x - mean) * 0.05 + mean)
    torch.testing.assert_close(corrupt(x, "brightness", 3, seeded()), x + 0.3)


def test_an_unknown_corruption_names_the_nearest():
    with pytest.raises(DataError, match="Did you mean 'gaussian_noise'") as caught:
        corrupt(pictures(), "gausian_noise", 3, seeded())
    assert caught.value.code == "corruption-unknown"
    with pytest.raises(ValidationError, match="motion_blur"):
        StreamConfig(corruptions=("motion-blur",))


def stream(client: int = 0, seed: int = 0, count: int = 50, **config) -> Stream:
    split = Split.whole(x=(pictures(count) - 0.2) / 0.5, y=torch.arange(count))
    return Stream(StreamConfig(batch_size=8, **config), split, (0.2,), (0.5,), seed, client)


def phases(count: int, **config) -> list[tuple[str, float]]:
    return [stream(**config).phase(position) for position in range(count)]


NAMES = ("contrast", "fog", "brightness")


def test_abrupt_gives_each_its_segment_and_the_last_stays():
    seen = phases(9, corruptions=NAMES, segment=2)
    assert [name for name, _ in seen] == ["contrast"] * 2 + ["fog"] * 2 + ["brightness"] * 5
    assert {severity for _, severity in seen} == {5.0}


def test_recurring_comes_back():
    seen = phases(12, corruptions=NAMES, segment=2, schedule="recurring")
    assert seen[:6] == seen[6:]


def test_gradual_rises_and_falls_within_each_segment():
    seen = phases(10, corruptions=NAMES, segment=5, schedule="gradual")
    assert [severity for _, severity in seen] == [1.0, 3.0, 5.0, 3.0, 1.0] * 2
    assert [name for name, _ in seen] == ["contrast"] * 5 + ["fog"] * 5


def test_rotated_clients_meet_different_corruptions_at_a_time():
    assert [stream(client, corruptions=NAMES).phase(0)[0] for client in range(4)] == [*NAMES, "contrast"]
    assert stream(1, corruptions=NAMES, rotate=False).phase(0)[0] == "contrast"


def test_a_batch_depends_on_seed_client_and_position_alone():
    x, y = stream().batch(3)
    again = stream()
    again.batch(0)
    same_x, same_y = again.batch(3)
    assert torch.equal(x, same_x) and torch.equal(y, same_y)
    for other in (stream(seed=1), stream(client=1, rotate=False)):
        assert not torch.equal(other.batch(3)[1], y)
    assert not torch.equal(stream().batch(4)[1], y)


def test_a_pass_shows_every_example_once_and_the_next_in_another_order():
    labels = torch.cat([stream(corruptions=(CLEAN,)).batch(position)[1] for position in range(25)])
    first, second = labels[:50].tolist(), labels[50:100].tolist()
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert set(Counter(labels.tolist()).values()) == {4}


def labelled(
    count: int = 200, classes: int = 5, batch_size: int = 8, seed: int = 0, client: int = 0, **config
) -> Stream:
    """Return a stream whose examples carry their own number in the picture and ``number % classes`` as label."""
    numbers = torch.arange(count)
    x = (numbers / count).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    split = Split.whole(x=x, y=numbers % classes)
    config = {"corruptions": (CLEAN,), "segment": 10, **config}
    return Stream(StreamConfig(batch_size=batch_size, **config), split, (0.0,), (1.0,), seed, client)


def shown(stream: Stream, batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and numbers of the examples of the first batches."""
    seen = [stream.batch(position) for position in range(batches)]
    numbers = (torch.cat([x[:, 0, 0, 0] for x, _ in seen]) * len(stream.split)).round().long()
    return torch.cat([y for _, y in seen]), numbers


def changes(labels: torch.Tensor) -> int:
    return int((labels[1:] != labels[:-1]).sum())


def test_sorted_sections_show_one_class_after_another_each_in_its_own_order():
    labels, _ = shown(labelled(labels="sorted"), 20)
    first, second = labels[:80], labels[80:160]
    for section in (first, second):
        assert changes(section) == 4
    assert first.unique_consecutive().tolist() != second.unique_consecutive().tolist()
    assert changes(shown(labelled(), 20)[0]) > 100


@pytest.mark.parametrize("order", ["sorted", "dirichlet"])
@pytest.mark.parametrize("batch_size", [1, 7, 8])
def test_label_orders_still_show_every_example_once_per_pass(order, batch_size):
    stream = labelled(105, batch_size=batch_size, segment=15, labels=order)
    numbers = shown(stream, 105)[1]  # as many passes as a batch has examples, and seven sections
    times = Counter(numbers.tolist())
    assert len(times) == 105
    assert len(set(times.values())) == 1


def test_a_batch_of_a_label_order_depends_on_seed_client_and_position_alone():
    config = {"labels": "dirichlet", "rotate": False}
    x, y = labelled(**config).batch(13)
    again = labelled(**config)
    again.batch(2)
    assert torch.equal(again.batch(13)[0], x) and torch.equal(again.batch(13)[1], y)
    assert not torch.equal(labelled(seed=1, **config).batch(13)[0], x)
    assert not torch.equal(labelled(client=1, **config).batch(13)[0], x)


def test_dirichlet_lies_between_sorted_and_shuffled_and_alpha_says_where():
    runs = [
        changes(shown(labelled(2000, segment=50, **config), 50)[0])
        for config in (
            {"labels": "sorted"},
            {"labels": "dirichlet", "alpha": 0.02},
            {"labels": "dirichlet", "alpha": 0.5},
            {"labels": "dirichlet", "alpha": 100.0},
            {"labels": "shuffled"},
        )
    ]
    assert runs[0] < runs[1] < runs[2] < runs[3]
    assert runs[3] == pytest.approx(runs[4], rel=0.1)
    # Many small shares are like shuffled labels: a batch has nearly all classes. Few large ones are not.
    few = shown(labelled(2000, segment=50, labels="dirichlet", alpha=0.02), 50)[0].view(50, 8)
    many = shown(labelled(2000, segment=50), 50)[0].view(50, 8)
    classes = [sum(len(batch.unique()) for batch in each) / 50 for each in (few, many)]
    assert classes[0] < 0.6 * classes[1]


def test_sections_take_label_orders_in_turn():
    stream = labelled(2000, labels=("shuffled", "sorted"), corruptions=(CLEAN, "contrast"))
    labels, _ = shown(stream, 40)
    sections = labels.view(4, 80)
    assert [changes(section) < 10 for section in sections] == [False, True, False, True]
    assert StreamConfig.model_validate_json('{"labels": ["sorted", "dirichlet"]}').labels == ("sorted", "dirichlet")


def test_batches_of_one_walk_every_schedule():
    for schedule in ("abrupt", "gradual", "recurring"):
        stream = labelled(12, batch_size=1, schedule=schedule, segment=3, corruptions=NAMES, labels="sorted")
        seen = [stream.batch(position) for position in range(14)]
        assert all(x.shape == (1, 1, 8, 8) and y.shape == (1,) and torch.isfinite(x).all() for x, y in seen)


@pytest.mark.parametrize("config", [{"labels": "by class"}, {"labels": ()}, {"alpha": 0.0}, {"batch_size": 0}])
def test_a_label_order_that_is_none_is_refused(config):
    with pytest.raises(ValidationError):
        StreamConfig(**config)


def test_pixels_and_inputs_are_inverse():
    x, _ = stream(corruptions=(CLEAN,)).batch(0)
    torch.testing.assert_close(stream().to_inputs(stream().to_pixels(x)), x)
    assert stream().to_pixels(x).min() >= 0


def test_no_examples_no_stream():
    with pytest.raises(DataError, match=r"partition\.test_fraction"):
        stream(count=0)
