"""The prototype store against exact arithmetic: any order, any grouping, nothing twice, nothing malformed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis.errors import RunError
from trellis_server import prototypes
from trellis_server.prototypes import Evidence, PrototypeStore

CLASSES, WIDTH = 7, 5
Report = tuple[int, Evidence]


def evidence(labels: Any, counts: Any, means: Any = None, version: int = 1, width: int = WIDTH) -> Evidence:
    labels = np.asarray(labels, np.int64)
    means = np.zeros((len(labels), width), np.float32) if means is None else np.asarray(means)
    return Evidence(labels, np.asarray(counts, np.int64), means, version)


def some_reports(seed: int, count: int, scale: float = 1.0) -> list[Report]:
    """Reports of three clients that overlap in their classes, every one under a version of its own."""
    generator = np.random.default_rng(seed)
    reports = []
    for version in range(count):
        size = int(generator.integers(1, CLASSES + 1))
        labels = generator.permutation(CLASSES)[:size]
        means = (scale * generator.normal(size=(size, WIDTH)) * 10.0 ** generator.integers(-9, 3)).astype(np.float32)
        reports.append((version % 3, evidence(labels, generator.integers(1, 1000, size), means, version)))
    return reports


def merged(reports: list[Report]) -> PrototypeStore:
    store = PrototypeStore(CLASSES, WIDTH)
    for client, report in reports:
        store.add(client, report)
    return store


def same(left: PrototypeStore, right: PrototypeStore) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return all(np.array_equal(a[key], b[key]) for key in a) and left.means().tobytes() == right.means().tobytes()


# -- the mean -----------------------------------------------------------------------------------------


def test_a_class_of_one_report_is_that_report():
    means = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    store = merged([(0, evidence([4, 1], [3, 9], means))])
    np.testing.assert_array_equal(store.means()[[4, 1]].astype(np.float32), means)
    assert store.counts.tolist() == [0, 9, 0, 0, 3, 0, 0]
    assert store.learnt.tolist() == [1, 4]
    assert not store.means()[[0, 2, 3, 5, 6]].any()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e5])
def test_the_mean_is_that_of_rational_numbers(scale):
    reports = [r for r in some_reports(1, 40, scale) if not r[1].problem(CLASSES, WIDTH)]
    assert len(reports) > 20
    store = merged(reports)
    sums = [[Fraction(0)] * WIDTH for _ in range(CLASSES)]
    counts = [0] * CLASSES
    for _, each in reports:
        for label, count, mean in zip(each.labels, each.counts, each.means, strict=True):
            counts[label] += int(count)
            for d in range(WIDTH):
                sums[label][d] += int(count) * Fraction(float(mean[d]))
    assert store.counts.tolist() == counts
    for label in range(CLASSES):
        for d in range(WIDTH):
            exact = sums[label][d] / counts[label]
            error = abs(Fraction(float(store.means()[label, d])) - exact)
            assert error <= abs(exact) * Fraction(2) ** -51 + Fraction(2) ** -50


def test_the_running_mean_of_the_paper_is_the_same():
    reports = some_reports(2, 60)
    p, n = np.zeros((CLASSES, WIDTH)), np.zeros(CLASSES)
    for _, each in reports:
        for label, count, mean in zip(each.labels, each.counts, each.means, strict=True):
            n[label] += count
            p[label] += count / n[label] * (mean - p[label])
    np.testing.assert_allclose(merged(reports).means(), p, rtol=1e-10, atol=1e-12)


def test_two_clients_are_one_that_saw_the_images_of_both():
    x = np.random.default_rng(3).normal(size=(90, WIDTH))
    halves = merged(
        [
            (0, evidence([2], [30], x[:30].mean(0, keepdims=True))),
            (1, evidence([2], [60], x[30:].mean(0, keepdims=True))),
        ]
    )
    np.testing.assert_allclose(halves.means()[2], x.mean(0), rtol=0, atol=1e-14)
    assert halves.counts[2] == 90


def test_classes_that_nobody_visits_keep_their_bits():
    store = merged(some_reports(4, 10))
    before = store.means()
    store.add(5, evidence([3], [7], np.ones((1, WIDTH), np.float32), version=99))
    after = store.means()
    assert after[3].tobytes() != before[3].tobytes()
    others = [label for label in range(CLASSES) if label != 3]
    assert after[others].tobytes() == before[others].tobytes()


# -- order and grouping -------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_order_gives_the_same_bits(seed, random):
    reports = some_reports(seed, 12)
    shuffled = list(reports)
    random.shuffle(shuffled)
    assert same(merged(reports), merged(shuffled))


def test_a_plain_sum_of_floats_would_not(monkeypatch):
    """The same reports, added up as float64: the order shows, or the test above would prove nothing."""
    reports = some_reports(5, 200)

    def total(ordered: list[Report]) -> bytes:
        sums = np.zeros((CLASSES, WIDTH))
        for _, each in ordered:
            sums[each.labels] += each.counts[:, None] * each.means.astype(np.float64)
        return sums.tobytes()

    assert total(reports) != total(reports[::-1])
    assert same(merged(reports), merged(reports[::-1]))


def test_when_fractions_are_carried_does_not_matter(monkeypatch):
    reports = some_reports(6, 50)
    expected = merged(reports)
    monkeypatch.setattr(prototypes, "CARRY_AFTER", 3)
    assert same(merged(reports), expected)


def test_fractions_do_not_overflow_before_they_are_carried():
    store = PrototypeStore(1, 1)
    number = 3 * prototypes.CARRY_AFTER
    for version in range(number):
        store.add(0, evidence([0], [1], np.full((1, 1), 0.49999, np.float32), version))
    assert store.means()[0, 0] == pytest.approx(np.float32(0.49999), abs=1e-15)
    assert store.counts[0] == number


# -- nothing twice ------------------------------------------------------------------------------------


def test_a_report_counts_once_however_often_it_comes():
    reports = some_reports(7, 9)
    again = merged([*reports, *reports, *reports[::-1]])
    assert same(again, merged(reports))


def test_a_report_in_pieces_that_overlap_counts_once():
    means = np.random.default_rng(8).normal(size=(4, WIDTH)).astype(np.float32)
    whole = evidence([0, 1, 2, 3], [1, 2, 3, 4], means)
    pieces = [evidence([0, 1, 2], [1, 2, 3], means[:3]), evidence([3, 1, 2], [4, 2, 3], means[[3, 1, 2]])]
    store = PrototypeStore(CLASSES, WIDTH)
    assert store.add(0, pieces[0]).tolist() == [0, 1, 2]
    assert store.add(0, pieces[1]).tolist() == [3]
    assert same(store, merged([(0, whole)]))


def test_another_client_and_another_version_do_count():
    report = evidence([2], [5], np.ones((1, WIDTH), np.float32))
    later = evidence([2], [5], np.ones((1, WIDTH), np.float32), version=2)
    assert merged([(0, report), (1, report), (0, later)]).counts[2] == 15


def test_nothing_seen_changes_nothing():
    reports = some_reports(9, 5)
    nothing = evidence([], [], np.zeros((0, WIDTH), np.float32), version=77)
    assert same(merged([*reports, (0, nothing)]), merged(reports))


# -- malformed reports --------------------------------------------------------------------------------

GOOD = {"labels": [1, 2], "counts": [3, 4], "means": np.zeros((2, WIDTH), np.float32), "version": 1}
BAD = {
    "negative count": ({"counts": [3, -4]}, "count of label 2 is -4"),
    "no example": ({"counts": [0, 4]}, "count of label 1 is 0"),
    "too many": ({"counts": [3, 2**40]}, "allowed is 1 to 1000"),
    "unknown label": ({"labels": [1, CLASSES]}, f"label {CLASSES} is none of the {CLASSES} classes"),
    "negative label": ({"labels": [-1, 2]}, "label -1"),
    "label twice": ({"labels": [2, 2]}, "stands twice"),
    "too narrow": ({"means": np.zeros((2, WIDTH - 1), np.float32)}, f"width {WIDTH - 1}, not {WIDTH}"),
    "one mean too few": ({"means": np.zeros((1, WIDTH), np.float32)}, "do not go together"),
    "one count too few": ({"counts": [3]}, "do not go together"),
    "nan": ({"means": np.full((2, WIDTH), np.nan, np.float32)}, "label 1 has values that are not finite"),
    "infinite": ({"means": np.array([[0] * WIDTH, [np.inf] * WIDTH], np.float32)}, "label 2 has values"),
    "huge": ({"means": np.full((2, WIDTH), 1e30, np.float32)}, "beyond 1e+06"),
    "version": ({"version": -1}, "version -1"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_a_malformed_report_is_refused_and_leaves_no_trace(change, words):
    each = evidence(**{**GOOD, **change})
    problem = each.problem(CLASSES, WIDTH, max_count=1000)
    assert problem is not None
    assert problem.startswith("evidence: ")
    assert words in problem
    assert evidence(**GOOD).problem(CLASSES, WIDTH, max_count=1000) is None
    store, untouched = merged(some_reports(10, 3)), merged(some_reports(10, 3))
    with pytest.raises(ValueError, match="evidence: "):
        store.add(0, each)
    assert same(store, untouched)


# -- state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 8])
def test_a_store_that_was_saved_goes_on_to_the_same_bits(count):
    reports = some_reports(11, 16)
    store = PrototypeStore.from_state(merged(reports[:count]).state_dict())
    for client, report in reports:  # the first half for the second time
        store.add(client, report)
    assert same(store, merged(reports))


def test_a_state_whose_parts_do_not_go_together_is_an_error():
    state = merged(some_reports(12, 3)).state_dict()
    with pytest.raises(RunError, match="do not go together"):
        PrototypeStore.from_state({**state, "labels": state["labels"][:-1]})


def test_width_zero_counts_and_no_more():
    store = PrototypeStore(CLASSES, 0)
    store.add(0, evidence([1], [4], width=0))
    assert store.counts[1] == 4
    assert store.means().shape == (CLASSES, 0)
