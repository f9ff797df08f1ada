"""Random states depend on their place alone, and leave no trace."""

from __future__ import annotations

import random

import numpy as np
import torch

from trellis import seeding


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_scope_gives_the_same_numbers_every_time_and_restores_what_was():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    undisturbed = [draw() for _ in range(2)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = draw()
    with seeding.scoped(1, "round", 2):
        inside = draw()
    assert [first, draw()] == undisturbed
    with seeding.scoped(1, "round", 2):
        assert draw() == inside
    with seeding.scoped(1, "round", 3):
        assert draw() != inside


def test_a_scope_is_left_on_errors_too():
    before = random.getstate()
    try:
        with seeding.scoped("x"):
            raise RuntimeError
    except RuntimeError:
        pass
    assert random.getstate() == before


def test_parts_do_not_run_into_one_another():
    assert len({seeding.derive("a", "b"), seeding.derive("ab"), seeding.derive(1, 2), seeding.derive("1", 2)}) == 4


def test_generators_agree_with_their_seed():
    assert seeding.numpy_generator(1, "a").integers(1 << 30) == seeding.numpy_generator(1, "a").integers(1 << 30)
    same = torch.equal(
        torch.randperm(9, generator=seeding.torch_generator(1)), torch.randperm(9, generator=seeding.torch_generator(1))
    )
    assert same


def test_a_scope_restores_the_second_of_a_pair_of_gaussian_numbers():
    np.random.seed(5)
    undisturbed = np.random.standard_normal(4).tolist()
    np.random.seed(5)
    first = np.random.standard_normal()
    with seeding.scoped(1), seeding.scoped(2):
        np.random.standard_normal()
    assert [first, *np.random.standard_normal(3)] == undisturbed


def test_scopes_that_end_out_of_order_lend_nothing_that_is_to_come_back():
    """Two threads in scopes at once may leave the inner one's generator behind; later scopes are none the worse."""
    one, two = seeding.scoped(1), seeding.scoped(2)
    before = np.random.get_bit_generator()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    two.__exit__(None, None, None)
    try:
        np.random.seed(5)
        undisturbed = np.random.random(4).tolist()
        np.random.seed(5)
        first = np.random.random()
        with seeding.scoped(1), seeding.scoped(2):
            np.random.random()
        assert [first, *np.random.random(3)] == undisturbed
    finally:
        np.random.set_bit_generator(before)


def test_a_scope_inside_another_leaves_the_outer_one_as_it_was():
    with seeding.scoped(1):
        undisturbed = [draw() for _ in range(2)]
    with seeding.scoped(1):
        first = draw()
        with seeding.scoped(2):
            draw()
        assert [first, draw()] == undisturbed


def test_a_scope_puts_numpys_state_back_to_the_last_word():
    for draws in (0, 1, 2, 3, 311, 312, 700):
        np.random.seed(5)
        np.random.standard_normal(draws)
        before = np.random.get_state(legacy=False)
        with seeding.scoped(1):
            np.random.standard_normal()
        after = np.random.get_state(legacy=False)
        assert before.keys() == after.keys()
        assert (before["has_gauss"], before["gauss"]) == (after["has_gauss"], after["gauss"])
        assert before["state"]["pos"] == after["state"]["pos"]
        np.testing.assert_array_equal(before["state"]["key"], after["state"]["key"])
