"""Every partitioner deals every example at most once, the same for the same seed, and says what is wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis import registry
from trellis.data import partitioners
from trellis.data.base import DataSet, Federation, Split
from trellis.data.partition._base import Empties
from trellis.data.sets.none import NoData
from trellis.errors import DataError

# Parameters with which each partitioner deals everything out to a few clients of some hundred examples.
PARAMS: dict[str, dict[str, Any]] = {
    "dirichlet": {"alpha": 1.0},
    "exponential": {},
    "iid": {},
    "inner-dirichlet": {"alpha": 1.0},
    "linear": {},
    "natural-id": {},
    "pathological": {"classes_per_client": 2, "class_assignment_mode": "deterministic"},
    "shard": {"shards_per_client": 2},
    "size": {},
    "square": {},
}
CLASSES = 4


def make_data(count: int, seed: int = 0, ids: int = 5) -> DataSet:
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(rng.permutation(np.arange(count) % CLASSES))
    empty = Split.whole(x=torch.zeros(0, 1), y=y[:0])
    return DataSet(
        kind="image",
        train=Split.whole(x=torch.arange(count)[:, None].float(), y=y),
        test=empty,
        classes=tuple(map(str, range(CLASSES))),
        natural_id=[f"user{number}" for number in rng.permutation(np.arange(count) % ids)],
    )


def deal(name: str, data: DataSet, clients: int | None, seed: int = 0, **params: Any) -> Federation:
    cls = registry.load("partitioners", name)
    config = cls.Config.model_validate({**params})  # type: ignore[attr-defined]
    federation = cls(config).deal(data, clients, seed)
    assert isinstance(federation, Federation)
    return federation


def params_for(name: str, count: int, clients: int) -> dict[str, Any]:
    if name != "size":
        return PARAMS[name]
    return {"sizes": [1] * (clients - 1) + [count - clients + 1]}


def clients_for(name: str, clients: int) -> int | None:
    return None if name == "natural-id" else clients


def flat(federation: Federation) -> list[list[int]]:
    return [part.tolist() for part in [*federation.parts, *federation.test_parts]]


def test_the_bundled_partitioners_are_all_tested() -> None:
    assert {plugin.name for plugin in partitioners()} == set(PARAMS)


@pytest.mark.parametrize("name", PARAMS)
@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(150, 400),
    clients=st.integers(3, 5),
    seed=st.integers(0, 2**31 - 1),
    fraction=st.sampled_from([0.0, 0.2, 0.9]),
)
def test_dealing_is_disjoint_complete_and_deterministic(
    name: str, count: int, clients: int, seed: int, fraction: float
) -> None:
    data = make_data(count)
    params = {**params_for(name, count, clients), "test_fraction": fraction}
    federation = deal(name, data, clients_for(name, clients), seed, **params)
    rows = np.concatenate([*federation.parts, *federation.test_parts])
    assert sorted(rows.tolist()) == list(range(count))
    assert federation.num_clients == (5 if name == "natural-id" else clients)
    for part, test in zip(federation.parts, federation.test_parts, strict=True):
        whole = len(part) + len(test)
        assert len(part) >= 1
        assert len(test) == min(round(whole * fraction), whole - 1)
        assert part.dtype == test.dtype == np.int64
    assert flat(federation) == flat(deal(name, data, clients_for(name, clients), seed, **params))


@pytest.mark.parametrize("name", PARAMS)
def test_the_seed_matters(name: str) -> None:
    data, params = make_data(300), params_for(name, 300, 4)
    first, second = (deal(name, data, clients_for(name, 4), seed, **params) for seed in (1, 2))
    assert flat(first) != flat(second)
    if name == "natural-id":  # who owns what is a fact; only the test splits move
        for a, b in zip(first.parts, second.parts, strict=True):
            assert len(a) == len(b)


@pytest.mark.parametrize("name", PARAMS)
def test_row_numbers_equal_what_flower_deals_from_its_own_data_set(name: str) -> None:
    """``RowNumbers`` is a shortcut; the plain Hugging Face data set must give the same."""
    import datasets

    from trellis.data.partition._base import Deal
    from trellis.data.partition._flower import deal as fast

    data = make_data(200)
    columns = {"index": np.arange(200)[::-1].copy(), "label": data.labels(), "id": np.asarray(data.natural_id)}
    cls = registry.load("partitioners", name)
    plugin = cls(cls.Config.model_validate(params_for(name, 200, 5)))  # type: ignore[attr-defined]
    slow = plugin.flower(Deal(200, 5, 7))
    slow.dataset = datasets.Dataset.from_dict(columns)
    expected = [sorted(slow.load_partition(number)["index"]) for number in range(slow.num_partitions)]
    assert [part.tolist() for part in fast(plugin.flower(Deal(200, 5, 7)), columns)] == expected


def test_natural_id_gives_each_user_their_own() -> None:
    data = make_data(60, ids=3)
    federation = deal("natural-id", data, None)
    assert data.natural_id is not None
    for client in range(3):
        rows = [*federation.parts[client], *federation.test_parts[client]]
        assert {data.natural_id[row] for row in rows} == {f"user{client}"}


def test_pathological_keeps_to_its_number_of_classes() -> None:
    counts = deal("pathological", make_data(200), 4, classes_per_client=2).label_counts()
    assert (np.count_nonzero(counts, axis=1) == 2).all()


def test_shards_hold_few_classes() -> None:
    counts = deal("shard", make_data(200), 4, shards_per_client=1).label_counts()
    assert (np.count_nonzero(counts, axis=1) == 1).all()


def test_dirichlet_is_more_skewed_for_small_alpha() -> None:
    def skew(alpha: float) -> float:
        counts = deal("dirichlet", make_data(800), 4, alpha=alpha, min_examples=0).label_counts()
        return float(np.abs(counts - counts.mean(axis=0)).sum())

    assert skew(0.05) > 2 * skew(100.0)


@pytest.mark.parametrize(
    ("name", "shape"), [("linear", lambda k: k), ("square", lambda k: k**2), ("exponential", np.exp)]
)
def test_sizes_follow_the_law(name: str, shape: Any) -> None:
    sizes = deal(name, make_data(2000), 5, test_fraction=0.0)
    expected = shape(np.arange(1, 6)) / shape(np.arange(1, 6)).sum() * 2000
    assert np.abs(np.array([len(part) for part in sizes.parts]) - expected).max() <= 5


def test_explicit_sizes_leave_the_rest_out() -> None:
    federation = deal("size", make_data(100), 2, sizes=[10, 30], test_fraction=0.5)
    assert [len(part) for part in federation.parts] == [5, 15]
    assert len(np.unique(np.concatenate([*federation.parts, *federation.test_parts]))) == 40


def test_a_single_example_is_kept_for_training() -> None:
    federation = deal("iid", make_data(10), 10, test_fraction=0.9)
    assert [len(part) for part in federation.parts] == [1] * 10
    assert [len(part) for part in federation.test_parts] == [0] * 10


@pytest.mark.parametrize(
    ("name", "clients", "params", "code", "words"),
    [
        ("iid", None, {}, "clients-missing", "clients is missing"),
        ("iid", 500, {}, "partition-clients", "500 clients"),
        ("iid", 50, {"min_examples": 3}, "partition-clients", "150"),
        ("dirichlet", 60, {"alpha": 0.01}, "partition-empty", "change partition.alpha or clients"),
        ("linear", 10, {"min_examples": 3}, "partition-empty", "client 0 of 10 has 1 of 100 examples"),
        ("exponential", 20, {}, "partition-impossible", "change clients"),
        ("natural-id", 7, {}, "partition-clients", "clients is 7, but the data hold 5 ids"),
        ("size", 3, {"sizes": [1, 2]}, "partition-clients", "2 sizes for 3 clients"),
        ("size", 2, {"sizes": [60, 60]}, "partition-clients", "add up to 120"),
        ("pathological", 4, {"classes_per_client": 9}, "partition-impossible", "classes_per_client"),
        ("pathological", 1, {"classes_per_client": 2}, "partition-incomplete", "unused_classes"),
    ],
)
def test_mistakes_are_named(name: str, clients: int | None, params: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        deal(name, make_data(100), clients, **params)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unused_classes_can_be_dropped() -> None:
    federation = deal("pathological", make_data(100), 1, classes_per_client=2, unused_classes="drop")
    assert np.count_nonzero(federation.label_counts()) == 2


def test_label_skew_needs_labels_but_iid_does_not() -> None:
    bare = Split.whole(x=torch.zeros(20, 1))
    data = DataSet("series", bare, bare.subset(torch.arange(0)))
    assert sum(map(len, deal("iid", data, 4, test_fraction=0.0).parts)) == 20
    with pytest.raises(DataError, match="class labels") as caught:
        deal("dirichlet", data, 4)
    assert caught.value.code == "partition-labels"
    with pytest.raises(DataError, match="whom an example came from"):
        deal("natural-id", data, None)


@pytest.mark.parametrize("name", PARAMS)
def test_no_data_cost_nothing_per_client(name: str, tmp_path: Path) -> None:
    data = NoData(NoData.Config(), tmp_path).load(0)
    params = {"sizes": [1]} if name == "size" else PARAMS[name]
    federation = deal(name, data, 100_000, **params)
    assert federation.num_clients == 100_000
    assert isinstance(federation.parts, Empties)
    assert sys.getsizeof(federation.parts) < 1000
    last = federation.client(99_999)
    assert (len(last.train), len(last.test)) == (0, 0)
    with pytest.raises(IndexError):
        federation.client(100_000)
    with pytest.raises(DataError, match="clients is missing"):
        deal(name, data, None, **params)


def test_dealing_needs_no_network() -> None:
    """Importing and using Flower's partitioners opens no connection and looks no name up."""
    program = (
        "import sys\n"
        "def watch(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        raise SystemExit(f'{event} {args}')\n"
        "sys.addaudithook(watch)\n"
        "from pathlib import Path\n"
        "from trellis.data.sets.digits import Digits\n"
        "from trellis.data.partition.iid import Iid\n"
        "data = Digits(Digits.Config(), Path()).load(0)\n"
        "print(Iid(Iid.Config()).deal(data, 7, 0).num_clients)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "7", done.stderr


def test_empties_behave_as_a_list() -> None:
    parts = Empties(5)
    assert len(list(parts)) == len(parts) == 5
    assert len(parts[1:3]) == 2
    assert parts[-1].size == 0


def test_many_clients_are_dealt_faster_than_by_tables() -> None:
    """The point of ``RowNumbers``: against one table per client, both timed here on the same machine."""
    import datasets
    from flwr_datasets.partitioner import IidPartitioner

    from trellis.data.partition._flower import deal as fast

    columns = {"index": np.arange(4000)}

    def by_tables() -> None:
        partitioner = IidPartitioner(2000)
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        for number in range(2000):
            partitioner.load_partition(number)["index"][:]

    def seconds(work: Any) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    assert seconds(lambda: fast(IidPartitioner(2000), columns)) < seconds(by_tables) / 3
