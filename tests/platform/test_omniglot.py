"""Omniglot from its published folders, the rotated digits, and missions over their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trellis import registry
from trellis.data.base import DataSet
from trellis.errors import DataError, ScenarioError
from trellis.missions import Missions, Schedule
from trellis.scenario import validated


def load(name: str, folder: Path, **params: Any) -> DataSet:
    cls = registry.load("datasets", name)
    data = cls(validated(cls.Config, params), folder).load(0)  # type: ignore[attr-defined]
    assert isinstance(data, DataSet)
    return data


def fails(code: str, folder: Path, **params: Any) -> str:
    with pytest.raises(DataError) as caught:
        load("omniglot", folder, root="omniglot", **params)
    assert caught.value.code == code, caught.value
    return str(caught.value)


SETS = {
    "images_background": {"Greek": ["character01", "character02"], "Latin": ["character01"]},
    "images_evaluation": {"Angelic": ["character01"]},
}


def omniglot(folder: Path, drawers: int = 6) -> Path:
    """Write a tiny Omniglot, black strokes on white, one bit a pixel. A drawer's number is drawn as a length."""
    root = folder / "omniglot"
    number = 0
    for name, alphabets in SETS.items():
        for alphabet, characters in alphabets.items():
            for character in characters:
                number += 1
                place = root / name / alphabet / character
                place.mkdir(parents=True)
                for drawer in range(1, drawers + 1):
                    pixels = np.full((105, 105), 255, np.uint8)
                    pixels[:10, : 10 * drawer] = 0
                    Image.fromarray(pixels).convert("1").save(place / f"{number:04d}_{drawer:02d}.png")
    return root


def drawn(images: torch.Tensor) -> list[int]:
    """Return the drawers' numbers from the lengths of the strokes."""
    return [round(float(image[0, 0].sum()) / image.shape[-1] * 10.5) for image in images]


def test_classes_are_characters_background_first(tmp_path):
    omniglot(tmp_path)
    data = load("omniglot", tmp_path, root="omniglot", test_images=2)
    assert data.kind == "image"
    assert data.classes == ("Greek/character01", "Greek/character02", "Latin/character01", "Angelic/character01")
    assert data.example_shape == (1, 28, 28)
    assert (len(data.train), len(data.test)) == (4 * 4, 4 * 2)
    assert data.labels().tolist() == sorted([0, 1, 2, 3] * 4)


def test_strokes_are_one_and_the_last_drawers_are_held_out(tmp_path):
    omniglot(tmp_path)
    data = load("omniglot", tmp_path, root="omniglot", test_images=2, size=105)
    x = data.train.fields["x"]
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert float(x[0, 0, 0, 0]) == 1.0
    assert float(x[0, 0, -1, -1]) == 0.0
    assert drawn(x) == [1, 2, 3, 4] * 4
    assert drawn(data.test.fields["x"]) == [5, 6] * 4
    assert data.natural_id == ["01", "02", "03", "04"] * 4


def test_one_of_the_two_sets_and_fewer_characters(tmp_path):
    omniglot(tmp_path)
    assert load("omniglot", tmp_path, root="omniglot", sets="evaluation").classes == ("Angelic/character01",)
    assert load("omniglot", tmp_path, root="omniglot", sets="background", max_characters=2).num_classes == 2


def test_rotations_are_classes_of_their_own(tmp_path):
    omniglot(tmp_path)
    data = load("omniglot", tmp_path, root="omniglot", rotations=True, sets="background", size=105)
    assert data.num_classes == 12
    assert data.classes[3] == "Greek/character01@90"
    labels, x = data.train.fields["y"], data.train.fields["x"]
    assert torch.equal(torch.rot90(x[labels == 1], 1, (2, 3)), x[labels == 4])
    assert len(data.natural_id or ()) == len(data.train)


def test_wrong_folders(tmp_path):
    assert "nothing is at" in fails("data-missing", tmp_path)
    root = omniglot(tmp_path, drawers=3)
    assert "test_images 3" in fails("data-empty", tmp_path, test_images=3)
    stray = root / "images_background" / "Greek" / "character01" / "stroke.txt"
    stray.write_text("")
    assert "stroke.txt" in fails("data-stray", tmp_path, test_images=1)
    stray.unlink()
    (root / "images_background" / "Greek" / "character01" / "0001_01.png").write_bytes(b"\x89PNG, it says")
    assert "not readable as an image" in fails("data-image", tmp_path, test_images=1)
    (root / "images_evaluation").rename(root / "elsewhere")
    assert "images_evaluation" in fails("data-missing", tmp_path, test_images=1, sets="evaluation")


# -- rotated digits -----------------------------------------------------------------------------------


def test_rotated_digits_are_forty_classes_and_share_no_image_with_the_test(tmp_path):
    data = load("rotated-digits", tmp_path, size=8, standardize=False)
    assert data.num_classes == 40
    assert data.classes[:5] == ("0@0", "0@90", "0@180", "0@270", "1@0")
    assert len(data.train) + len(data.test) == 4 * 1797
    upright = {image.numpy().tobytes() for image in data.test.fields["x"][data.test.fields["y"] % 4 == 0]}
    for quarters in range(4):
        turned = data.train.fields["x"][data.train.fields["y"] % 4 == quarters]
        back = torch.rot90(turned, -quarters, (2, 3))
        # A handful of different people's digits are equal pixel by pixel in the source; no more than that.
        assert sum(image.contiguous().numpy().tobytes() in upright for image in back) <= 3


def test_rotated_digits_are_the_digits_turned(tmp_path):
    data = load("rotated-digits", tmp_path, size=8, standardize=False)
    digits = load("digits", tmp_path, standardize=False)
    x, y = data.train.fields["x"], data.train.fields["y"]
    assert torch.equal(x[y % 4 == 0], digits.train.fields["x"])
    assert torch.equal(x[y % 4 == 3], torch.rot90(digits.train.fields["x"], 3, (2, 3)))
    assert torch.equal(y[y % 4 == 3] // 4, digits.train.fields["y"])


def test_an_angle_that_stands_twice_is_an_error():
    cls = registry.load("datasets", "rotated-digits")
    with pytest.raises(ValueError, match="twice"):
        validated(cls.Config, {"rotations": [0, 0]})  # type: ignore[attr-defined]


# -- missions -----------------------------------------------------------------------------------------


def test_a_schedule_depends_on_seed_mission_and_client_alone():
    first, again = (Schedule(Missions(), 40, 3) for _ in range(2))
    drawn = {(m, c): first.classes(m, c) for m in range(1, 9) for c in range(4)}
    assert drawn == {key: again.classes(*key) for key in reversed(drawn)}
    assert drawn != {key: Schedule(Missions(), 40, 4).classes(*key) for key in drawn}
    assert len(set(drawn.values())) > 16
    assert all(len(labels) == 2 and set(labels) <= set(first.field) for labels in drawn.values())
    assert first.base == tuple(range(20))
    assert first.own(0, 1) == frozenset()
    assert first.own(3, 1) == {label for m in (1, 2, 3) for label in drawn[m, 1]}


def test_no_image_is_seen_twice_and_in_the_end_all_are():
    labels = np.random.default_rng(0).integers(0, 6, 200)
    schedule = Schedule(Missions(base_classes=2, images_per_class=4), 6, 0)
    seen: list[int] = []
    for mission in range(1, 60):
        images = schedule.images(labels, mission, 0)
        assert set(labels[images]) <= set(schedule.classes(mission, 0))
        assert all((labels[images] == label).sum() <= 4 for label in range(6))
        seen += images.tolist()
    assert len(seen) == len(set(seen))
    assert sorted(seen) == np.flatnonzero(labels >= 2).tolist()


def test_a_schedule_may_be_written_down():
    config = validated(Missions, {"base_classes": [0, 3], "visits": [[[1], [2]], [[2, 4], [1]]]})
    schedule = Schedule(config, 5, 0)
    assert schedule.base == (0, 3)
    assert schedule.field == (1, 2, 4)
    assert [schedule.classes(m, c) for m in (1, 2, 3) for c in (0, 1)] == [(1,), (2,), (2, 4), (1,), (1,), (2,)]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"base_classes": 6}, "missions-base"),
        ({"base_classes": [9]}, "missions-base"),
        ({"base_classes": 4, "classes_per_mission": 2}, "missions-field"),
        ({"visits": [[[7]]]}, "missions-visits"),
    ],
)
def test_missions_that_cannot_be(config, code):
    with pytest.raises(ScenarioError) as caught:
        Schedule(validated(Missions, config), 5, 0)
    assert caught.value.code == code
