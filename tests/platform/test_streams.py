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


def test_pixels_and_inputs_are_inverse():
    x, _ = stream(corruptions=(CLEAN,)).batch(0)
    torch.testing.assert_close(stream().to_inputs(stream().to_pixels(x)), x)
    assert stream().to_pixels(x).min() >= 0


def test_no_examples_no_stream():
    with pytest.raises(DataError, match=r"partition\.test_fraction"):
        stream(count=0)
