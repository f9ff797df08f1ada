"""Data sets read from small files in their real formats, and what is said when the files are wrong."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trellis import registry
from trellis.data.base import DataSet
from trellis.data.loading import _data, _load, load_federation
from trellis.data.sets._base import held_out
from trellis.errors import DataError, ScenarioError
from trellis.scenario import Scenario, from_mapping


def load(name: str, folder: Path, seed: int = 0, **params: Any) -> DataSet:
    cls = registry.load("datasets", name)
    data = cls(cls.Config.model_validate(params), folder).load(seed)  # type: ignore[attr-defined]
    assert isinstance(data, DataSet)
    return data


def fails(code: str, name: str, folder: Path, **params: Any) -> str:
    """Return the message of the error that loading must raise."""
    with pytest.raises(DataError) as caught:
        load(name, folder, **params)
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_listing_imports_neither_torch_nor_flower() -> None:
    program = (
        "import sys, trellis.data, trellis.models\n"
        "names = [p.name for p in trellis.data.datasets() + trellis.data.partitioners() + trellis.models.models()]\n"
        "assert 'digits' in names and 'iid' in names and 'auto' in names\n"
        "print([m for m in ('torch', 'flwr', 'flwr_datasets', 'datasets', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# digits, gaussians, none


def test_digits_are_standardized_and_held_out_for_good(tmp_path: Path) -> None:
    data = load("digits", tmp_path, seed=0)
    assert (data.kind, data.example_shape, data.num_classes) == ("image", (1, 8, 8), 10)
    assert len(data.train) + len(data.test) == 1797
    assert abs(len(data.test) / 1797 - 0.2) < 0.01
    x = data.train.fields["x"]
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-4
    assert abs(float(x.std()) - 1) < 1e-3
    other = load("digits", tmp_path, seed=1)
    assert torch.equal(data.test.fields["x"], other.test.fields["x"])
    raw = load("digits", tmp_path, standardize=False)
    assert (float(raw.train.fields["x"].min()), float(raw.train.fields["x"].max())) == (0.0, 1.0)
    restored = x * data.facts["std"][0] + data.facts["mean"][0]
    assert torch.allclose(restored, raw.train.fields["x"], atol=1e-6)


def test_digits_can_be_enlarged_and_coloured(tmp_path: Path) -> None:
    data = load("digits", tmp_path, size=32, channels=3, standardize=False)
    x = data.train.fields["x"]
    assert data.example_shape == (3, 32, 32)
    assert torch.equal(x[:, 0], x[:, 2])
    small = load("digits", tmp_path, standardize=False).train.fields["x"]
    pooled = torch.nn.functional.avg_pool2d(x[:, :1], 4)
    assert np.corrcoef(pooled.flatten(), small.flatten())[0, 1] > 0.95


def test_held_out_is_stratified() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 1])
    train, test = held_out(labels, 0.2)
    assert sorted([*train, *test]) == list(range(151))
    assert np.bincount(labels[test], minlength=3).tolist() == [20, 10, 0]


@pytest.mark.parametrize("shape", [[5], [1, 8, 8]])
def test_gaussians_follow_the_seed_and_are_separable(shape: list[int], tmp_path: Path) -> None:
    data = load("gaussians", tmp_path, shape=shape, classes=3, spread=0.01)
    assert data.example_shape == tuple(shape)
    x, y = data.train.fields["x"].flatten(1), data.train.fields["y"]
    centres = torch.stack([x[y == label].mean(0) for label in range(3)])
    assert torch.equal(torch.cdist(x, centres).argmin(1), y)
    again, other = (load("gaussians", tmp_path, seed, shape=shape, classes=3, spread=0.01) for seed in (0, 1))
    assert torch.equal(again.train.fields["x"].flatten(1), x)
    assert not torch.equal(other.train.fields["x"].flatten(1), x)


def test_none_is_empty(tmp_path: Path) -> None:
    data = load("none", tmp_path)
    assert (data.kind, len(data.train), len(data.test), data.example_shape) == ("none", 0, 0, ())


# image folder


def write_images(root: Path, classes: dict[str, int], count: int = 3, mode: str = "RGB", side: int = 10) -> None:
    for name, value in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new(mode, (side, side + number), (value,) * len(mode)).save(root / name / f"{number}.png")


def test_image_folder_with_a_test_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "pics" / "train", {"cat": 0, "dog": 255})
    write_images(tmp_path / "pics" / "test", {"dog": 255}, count=2)
    (tmp_path / "pics" / "train" / ".thumbnails").mkdir()
    data = load("image-folder", tmp_path, root="pics", size=8, standardize=False)
    assert data.classes == ("cat", "dog")
    assert data.example_shape == (3, 8, 8)
    assert data.train.fields["y"].tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.fields["x"][:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.fields["y"].tolist() == [1, 1]


def test_image_folder_without_a_test_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "pics", {"cat": 0, "dog": 255}, count=5)
    data = load("image-folder", tmp_path, root="pics", size=8, channels=1, test_fraction=0.4)
    assert data.example_shape == (1, 8, 8)
    assert (len(data.train), data.test.fields["y"].tolist()) == (6, [0, 0, 1, 1])


def test_image_folder_names_the_offending_file(tmp_path: Path) -> None:
    assert "nothing is at" in fails("data-missing", "image-folder", tmp_path, root="pics")
    write_images(tmp_path / "pics", {"cat": 0, "dog": 255})
    (tmp_path / "pics" / "cat" / "notes.txt").write_text("hello")
    assert "notes.txt" in fails("data-stray", "image-folder", tmp_path, root="pics")
    (tmp_path / "pics" / "cat" / "notes.txt").rename(tmp_path / "pics" / "readme")
    assert "readme" in fails("data-stray", "image-folder", tmp_path, root="pics")
    (tmp_path / "pics" / "readme").unlink()
    whole = (tmp_path / "pics" / "dog" / "0.png").read_bytes()
    (tmp_path / "pics" / "dog" / "broken.png").write_bytes(whole[: len(whole) // 2])
    assert "broken.png" in fails("data-image", "image-folder", tmp_path, root="pics")
    (tmp_path / "pics" / "dog" / "broken.png").write_text("no image")
    assert "broken.png" in fails("data-image", "image-folder", tmp_path, root="pics")


def test_image_folder_refuses_classes_only_the_test_set_has(tmp_path: Path) -> None:
    write_images(tmp_path / "pics" / "train", {"cat": 0})
    write_images(tmp_path / "pics" / "test", {"dog": 255})
    assert "dog" in fails("data-labels", "image-folder", tmp_path, root="pics")


# NumPy archives


def medmnist(path: Path, channels: int | None = None, **changes: Any) -> None:
    """Write the layout of MedMNIST's files: uint8 images, labels of shape (n, 1), three parts."""
    rng, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 12), ("val", 4), ("test", 6)):
        shape = (count, 28, 28) if channels is None else (count, 28, 28, channels)
        arrays[f"{part}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count, dtype=np.uint8) % 3)[:, None]
    np.savez_compressed(path, **{**arrays, **changes})


@pytest.mark.parametrize("channels", [None, 3])
def test_npz_reads_medmnist(channels: int | None, tmp_path: Path) -> None:
    medmnist(tmp_path / "bloodmnist.npz", channels)
    data = load("npz", tmp_path, path="bloodmnist.npz", standardize=False)
    assert data.example_shape == (channels or 1, 28, 28)
    assert (len(data.train), len(data.test), len(data.splits["val"])) == (12, 6, 4)
    assert data.classes == ("0", "1", "2")
    with np.load(tmp_path / "bloodmnist.npz", allow_pickle=False) as archive:
        first = archive["train_images"][0] / 255
    expected = first[None] if channels is None else first.transpose(2, 0, 1)
    assert np.allclose(data.train.fields["x"][0].numpy(), expected)


def test_npz_reads_own_keys_and_ids(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(10, 7, 2))
    labels = np.array(["b", "a"] * 5)
    np.savez(tmp_path / "own.npz", a=x, b=labels, c=x[:4], d=labels[:4], who=np.arange(10) % 3)
    keys: dict[str, Any] = {"x_train": "a", "y_train": "b", "x_test": "c", "y_test": "d"}
    data = load("npz", tmp_path, path="own.npz", kind="series", id_key="who", **keys)
    assert (data.kind, data.example_shape, data.classes) == ("series", (7, 2), ("a", "b"))
    assert data.train.fields["y"].tolist() == [1, 0] * 5
    assert data.natural_id == tuple(str(number % 3) for number in range(10))
    # What is no image has no channels: all values are shifted and scaled alike.
    (mean,), (std,) = data.facts["mean"], data.facts["std"]
    assert np.allclose(data.train.fields["x"].numpy() * std + mean, x, atol=1e-5)


def test_npz_keeps_tokens_as_integers(tmp_path: Path) -> None:
    x, y = np.arange(12).reshape(4, 3).astype(np.uint16), np.arange(4) % 2
    np.savez(tmp_path / "t.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert load("npz", tmp_path, path="t.npz", kind="tokens").train.fields["x"].dtype == torch.int64


def test_npz_never_unpickles(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    trap = np.empty(12, dtype=object)
    trap[:] = [Trap()] * 12
    medmnist(tmp_path / "evil.npz", train_images=trap)
    assert "train_images" in fails("data-damaged", "npz", tmp_path, path="evil.npz")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Trap()))
    fails("data-damaged", "npz", tmp_path, path="pickle.npz")
    assert not (tmp_path / "sprung").exists()


def test_npz_mistakes_are_named(tmp_path: Path) -> None:
    medmnist(tmp_path / "m.npz")
    message = fails("data-key", "npz", tmp_path, path="m.npz", x_train="train_image")
    assert "data.x_train" in message
    assert "Did you mean 'train_images'?" in message
    assert "data.id_key" in fails("data-key", "npz", tmp_path, path="m.npz", id_key="who")
    medmnist(tmp_path / "short.npz", train_labels=np.zeros((3, 1), np.uint8))
    assert "12 examples but 3 labels" in fails("data-length", "npz", tmp_path, path="short.npz")
    medmnist(tmp_path / "multi.npz", train_labels=np.zeros((12, 14), np.uint8))
    assert "(12, 14)" in fails("data-labels", "npz", tmp_path, path="multi.npz")
    medmnist(tmp_path / "nan.npz", train_images=np.full((12, 28, 28), np.nan))
    fails("data-finite", "npz", tmp_path, path="nan.npz")
    whole = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    fails("data-damaged", "npz", tmp_path, path="cut.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "not a .npz" in fails("data-damaged", "npz", tmp_path, path="one.npy")


# CIFAR


def cifar10(folder: Path, count: int = 4) -> np.ndarray[Any, Any]:
    """Write CIFAR-10's binary version with few records, and return the first training image."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    first: np.ndarray[Any, Any] | None = None
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        first = images[0] if first is None else first
        labels = rng.permutation(10)[:count].astype(np.uint8)
        (folder / name).write_bytes(b"".join(bytes([y]) + x.tobytes() for x, y in zip(images, labels, strict=True)))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    assert first is not None
    return first


@pytest.mark.parametrize("root", [".", "cifar-10-batches-bin"])
def test_cifar10_binary_records(root: str, tmp_path: Path) -> None:
    first = cifar10(tmp_path / "cifar-10-batches-bin")
    data = load("cifar10", tmp_path, root=root, standardize=False)
    assert (len(data.train), len(data.test), data.example_shape) == (20, 4, (3, 32, 32))
    assert (data.classes[0], data.classes[9]) == ("airplane", "truck")
    assert np.allclose(data.train.fields["x"][0].numpy() * 255, first)
    scaled = load("cifar10", tmp_path, root=root)
    assert torch.allclose(scaled.train.fields["x"].mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert len(scaled.facts["mean"]) == len(scaled.facts["std"]) == 3


@pytest.mark.parametrize(("label", "byte", "count"), [("coarse", 0, 20), ("fine", 1, 100)])
def test_cifar100_binary_records(label: str, byte: int, count: int, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name in ("train.bin", "test.bin"):
        records = np.zeros((6, 3074), np.uint8)
        records[:, 0], records[:, 1], records[:, 2] = np.arange(6), np.arange(6) + 90, 255
        records.tofile(folder / name)
    for kind, number in (("coarse", 20), ("fine", 100)):
        (folder / f"{kind}_label_names.txt").write_text("\n".join(f"{kind}{i}" for i in range(number)))
    data = load("cifar100", tmp_path, root=".", label=label, standardize=False)
    assert data.classes == tuple(f"{label}{i}" for i in range(count))
    assert data.train.fields["y"].tolist() == [i + 90 * byte for i in range(6)]
    assert data.train.fields["x"][0, :, 0, :2].tolist() == [[1, 0], [0, 0], [0, 0]]


def test_cifar_mistakes_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    cifar10(folder)
    whole = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(whole[:-1])
    message = fails("data-damaged", "cifar10", tmp_path, root=".")
    assert "data_batch_2.bin" in message
    assert "3073" in message
    (folder / "data_batch_2.bin").write_bytes(b"\x0b" + whole[1:])
    assert "0 to 9" in fails("data-labels", "cifar10", tmp_path, root=".")
    (folder / "data_batch_2.bin").unlink()
    assert "data_batch_2.bin" in fails("data-missing", "cifar10", tmp_path, root=".")


@pytest.mark.parametrize(
    ("name", "pickled", "file", "binary"),
    [
        ("cifar10", "cifar-10-batches-py", "data_batch_1", "cifar-10-batches-bin"),
        ("cifar100", "cifar-100-python", "meta", "cifar-100-binary"),
    ],
)
def test_cifar_pickles_are_refused_by_name(name: str, pickled: str, file: str, binary: str, tmp_path: Path) -> None:
    (tmp_path / pickled).mkdir()
    (tmp_path / pickled / file).write_bytes(pickle.dumps({}))
    for root in (".", pickled):
        message = fails("data-pickle", name, tmp_path, root=root)
        assert binary in message
        assert "pickle" in message


# Hugging Face


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6, 6), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, values: list[int], labels: list[Any], names: list[str] | None = None) -> None:
    import datasets

    label = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": label, "writer": datasets.Value("int32")})
    rows = {"image": [{"bytes": png(v), "path": None} for v in values], "label": labels, "writer": values}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


@pytest.mark.usefixtures("offline")
def test_huggingface_reads_a_local_folder_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    write_parquet(tmp_path / "digits" / "train-00000-of-00001.parquet", [0, 255, 0], [0, 1, 0], ["dark", "light"])
    write_parquet(tmp_path / "digits" / "test-00000-of-00001.parquet", [255], [1], ["dark", "light"])
    options: dict[str, Any] = {"dataset": "digits", "cache_dir": "cache", "channels": 1, "standardize": False}
    data = load("huggingface", tmp_path, size=4, id_column="writer", **options)
    assert data.classes == ("dark", "light")
    assert data.example_shape == (1, 4, 4)
    assert data.train.fields["x"][:, 0, 0, 0].tolist() == [0, 1, 0]
    assert data.train.fields["y"].tolist() == [0, 1, 0]
    assert data.test.fields["y"].tolist() == [1]
    assert data.natural_id == ("0", "255", "0")
    assert load("huggingface", tmp_path, **options).example_shape == (1, 6, 6)
    message = fails("data-column", "huggingface", tmp_path, label_column="labels", **options)
    assert "Did you mean 'label'?" in message


@pytest.mark.usefixtures("offline")
def test_huggingface_holds_out_of_a_single_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "all.parquet", [0] * 5 + [255] * 5, ["no"] * 5 + ["yes"] * 5)
    options: dict[str, Any] = {"dataset": "all.parquet", "cache_dir": "cache", "id_column": "writer"}
    data = load("huggingface", tmp_path, test_split=None, test_fraction=0.2, **options)
    assert data.classes == ("no", "yes")
    assert data.test.fields["y"].tolist() == [0, 1]
    assert data.natural_id == ("0",) * 4 + ("255",) * 4
    message = fails("data-split", "huggingface", tmp_path, **options)
    assert "it has 'train'" in message


@pytest.mark.usefixtures("offline")
def test_huggingface_reads_numbers_of_json_lines(tmp_path: Path) -> None:
    lines = [f'{{"values": [{i}, {i + 0.5}], "label": {i % 2}}}' for i in range(6)]
    (tmp_path / "series.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"dataset": "series.jsonl", "cache_dir": "cache", "kind": "series", "test_split": None}
    data = load("huggingface", tmp_path, image_column="values", standardize=False, test_fraction=0.0, **options)
    assert data.train.fields["x"].tolist() == [[i, i + 0.5] for i in range(6)]
    assert (data.kind, len(data.test)) == ("series", 0)


@pytest.mark.usefixtures("offline")
def test_huggingface_says_what_cannot_be_had(tmp_path: Path) -> None:
    message = fails("data-unreachable", "huggingface", tmp_path, dataset="nobody/nothing", cache_dir="cache")
    assert "nobody/nothing" in message
    assert "nothing is at" in fails("data-missing", "huggingface", tmp_path, dataset="./gone", cache_dir="cache")
    (tmp_path / "data.txt").write_text("x")
    assert ".parquet" in fails("data-format", "huggingface", tmp_path, dataset="data.txt", cache_dir="cache")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    fails("data-unreachable", "huggingface", tmp_path, dataset="cut.parquet", cache_dir="cache")


# From a scenario to a federation

TRAINER = """
from pydantic import BaseModel
from trellis.registry import register

@register("trainers", "probe", takes=("image",))
class Probe:
    class Config(BaseModel):
        pass
"""

KINDLESS = """
import torch
from pydantic import BaseModel
from trellis.data.base import DataSet, Split
from trellis.registry import register

@register("datasets", "odd")
class Odd:
    class Config(BaseModel):
        kind: str
    def __init__(self, config, folder):
        self.config = config
    def load(self, seed):
        return DataSet(self.config.kind, Split.whole(x=torch.zeros(9, 1)), Split.whole(x=torch.zeros(0, 1)))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "probe.py").write_text(TRAINER)
    (tmp_path / "odd.py").write_text(KINDLESS)
    for cache in (_load, _data):
        cache.cache_clear()
    yield tmp_path
    for cache in (_load, _data):
        cache.cache_clear()


def scenario(folder: Path, **changes: Any) -> Scenario:
    base = {"name": "t", "data": "digits", "clients": 5, "trainer": "probe.py:Probe", "base": str(folder)}
    return from_mapping({**base, **changes})


def test_a_scenario_becomes_a_federation(folder: Path) -> None:
    federation = load_federation(scenario(folder, partition={"name": "dirichlet", "alpha": 1.0}), 0)
    counts = federation.label_counts()
    assert counts.shape == (5, 10)
    assert counts.sum() == len(federation.data.train)
    client = federation.client(3)
    batch = client.train.batch(torch.tensor([0]))
    row = int(federation.parts[3][0])
    assert torch.equal(batch.x[0], federation.data.train.fields["x"][row])


def test_federations_are_kept_by_what_decides_them(folder: Path) -> None:
    first = load_federation(scenario(folder), 0)
    assert load_federation(scenario(folder, rounds={"count": 99}), 0) is first
    for other, seed in (
        (scenario(folder), 1),
        (scenario(folder, clients=6), 0),
        (scenario(folder, data={"name": "digits", "size": 16}), 0),
        (scenario(folder, partition={"name": "iid", "test_fraction": 0.5}), 0),
    ):
        assert load_federation(other, seed) is not first
    assert _load.cache_info().currsize == _load.cache_info().maxsize


def test_ways_to_deal_share_one_copy_of_the_data(folder: Path) -> None:
    iid, skewed = (load_federation(scenario(folder, partition=name), 0) for name in ("iid", "dirichlet"))
    assert iid is not skewed
    assert iid.data is skewed.data


def test_kinds_are_checked(folder: Path) -> None:
    with pytest.raises(DataError, match="takes 'image' data") as caught:
        load_federation(scenario(folder, data={"name": "odd.py:Odd", "kind": "series"}), 0)
    assert caught.value.code == "data-kind"
    with pytest.raises(DataError, match="Did you mean 'image'"):
        load_federation(scenario(folder, data={"name": "odd.py:Odd", "kind": "imag"}), 0)
    with pytest.raises(DataError, match="takes 'image' data"):
        load_federation(scenario(folder, data="none"), 0)


def test_wrong_parameters_name_their_key(folder: Path) -> None:
    with pytest.raises(ScenarioError, match=r"data\.sise.*Did you mean 'size'"):
        load_federation(scenario(folder, data={"name": "digits", "sise": 16}), 0)
    with pytest.raises(ScenarioError, match=r"partition\.test_fraction"):
        load_federation(scenario(folder, partition={"name": "iid", "test_fraction": 0.95}), 0)
