"""SAF's memory, its trajectory loss and MESA's average against closed forms and steps by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from trellis_clients.contract import bench, site_of
from trellis_clients.trainer import Trainer, Turn
from trellis_clients.trainers.sharpness._trajectory import Memory, examples_an_epoch, trajectory_loss

FILE = Path(__file__).parent / "contract.yaml"


def turn_of(site, number: int = 1, seed: int = 5) -> Turn:
    arrays = {name: values.clone() for name, values in site.trainer.shared(site.model).items()}
    return Turn(number, 9, 0, 3, torch.Generator().manual_seed(seed), received={"arrays": arrays})


def with_trainer(name: str, *settings: str) -> list[str]:
    return [f"trainer={name}", *(f"trainer.{setting}" for setting in settings)]


# -- the trajectory loss and its memory --------------------------------------------------------------------


def test_the_trajectory_loss_is_torchs_kl_divergence():
    outputs, past = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).double()
    for tau in (1.0, 5.0):
        wanted = F.kl_div((outputs / tau).log_softmax(1), (past / tau).softmax(1), reduction="batchmean")
        torch.testing.assert_close(trajectory_loss(outputs, past, tau), wanted)
        every = torch.ones(6, dtype=torch.bool)
        torch.testing.assert_close(trajectory_loss(outputs, past, tau, every), wanted)


def test_its_gradient_is_the_difference_of_the_softened_predictions():
    outputs, past = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2)).double()
    known = torch.tensor([True, True, False, True, False, True])
    outputs.requires_grad_()
    past.requires_grad_()
    trajectory_loss(outputs, past, 3.0, known).backward()
    wanted = ((outputs / 3).softmax(1) - (past / 3).softmax(1)) / (3.0 * 4) * known[:, None]
    torch.testing.assert_close(outputs.grad, wanted.detach())
    assert past.grad is None


def test_it_is_zero_for_outputs_that_differ_by_a_constant_and_where_nothing_is_known():
    outputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    loss = trajectory_loss(outputs, outputs.detach() + torch.tensor([[1.0], [-2.0], [0.0]]), 2.0)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-15)
    loss = trajectory_loss(outputs, torch.zeros(3, 4).double(), 2.0, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not outputs.grad.any()


@pytest.mark.parametrize("lookback", [1, 2, 3])
def test_the_memory_returns_what_was_stored_so_many_epochs_ago(lookback):
    """Under shuffling, with examples left out of epochs, saved and taken up again before each epoch."""
    generator = torch.Generator().manual_seed(lookback)
    memory, written = Memory(lookback, 11, torch.device("cpu")), {}
    for epoch in range(1, 9):
        kept = memory.state()
        memory = Memory(lookback, 11, torch.device("cpu"))
        memory.load(kept)
        memory.begin(epoch)
        order = torch.randperm(11, generator=generator)[:8]
        for index in (order[:5], order[5:]):
            outputs = torch.randn(len(index), 3, generator=generator)
            past, known = memory.exchange(index, outputs)
            for row, example in enumerate(index.tolist()):
                wanted = written.get((epoch - lookback, example))
                assert bool(known[row]) == (wanted is not None), (epoch, example)
                if wanted is not None:
                    assert torch.equal(past[row], wanted)
                written[epoch, example] = outputs[row]


def test_what_is_older_than_max_age_is_not_used():
    memory, index = Memory(2, 4, torch.device("cpu")), torch.arange(4)
    found = []
    for number in (1, 2, 3, 9, 10, 11):  # rounds 4 to 8 were sat out
        memory.begin(number, max_age=2)
        found.append(bool(memory.exchange(index, torch.zeros(4, 3))[1].all()))
    assert found == [False, False, True, False, False, True]


@pytest.mark.parametrize(("size", "drop"), [(32, False), (32, True), (7, True), (10_000, True), (1, False)])
def test_an_epoch_is_what_the_batches_go_through(size, drop):
    site = site_of(FILE, [f"trainer.batch_size={size}", f"trainer.drop_last={str(drop).lower()}"])
    split = site.federation.client(0).train
    seen = sum(len(batch) for batch in site.trainer.batches(split, turn_of(site)))
    assert examples_an_epoch(split, site.trainer.config) == seen


def test_three_turns_of_saf_by_hand():
    """E~ = 2, E_start = 3, two epochs a turn: every step with the outputs that were two of the client's epochs ago."""
    settings = with_trainer("saf", "weight=2.0", "temperature=3.0", "lookback=2", "start_epoch=3", "local_epochs=2")
    site = site_of(FILE, [*settings, "trainer.batch_size=50"])
    trainer, model, data = site.trainer, site.model, site.federation.client(0)
    hand, state, written, epoch = copy.deepcopy(model), {}, {}, 0
    for number in (1, 2, 5):
        turn = turn_of(site, number, seed=number)
        seen = 0
        for batch in Trainer.batches(trainer, data.train, turn_of(site, number, seed=number)):
            epoch += seen % len(data.train) == 0
            seen += len(batch)
            outputs = hand(batch.x)
            loss = F.cross_entropy(outputs, batch.y)
            if epoch > 3:
                past = torch.stack([written[epoch - 2, i] for i in batch.index.tolist()])
                p, log_q = (past / 3).softmax(1), (outputs / 3).log_softmax(1)
                loss = loss + 2 * (p * (p.log() - log_q)).sum(1).mean()
            written |= {(epoch, i): row for i, row in zip(batch.index.tolist(), outputs.detach(), strict=True)}
            gradients = torch.autograd.grad(loss, list(hand.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(hand.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
        trainer.fit(model, data, state, turn)
        for name, values in hand.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], values, rtol=1e-4, atol=1e-5)
    assert state["memory"]["epoch"] == epoch == 6


def test_a_replay_of_bare_steps_leaves_the_clients_memory_alone():
    site = site_of(FILE, with_trainer("saf", "start_epoch=0", "lookback=1"))
    state: dict = {}
    site.trainer.fit(site.model, site.federation.client(0), state, turn_of(site))
    before = copy.deepcopy(state)
    site.bare(turn_of(site, 2), state)
    assert before["memory"]["epoch"] == state["memory"]["epoch"]
    assert torch.equal(before["memory"]["outputs"], state["memory"]["outputs"])


# -- MESA --------------------------------------------------------------------------------------------------


def test_the_average_forgets_geometrically():
    """v_k = w + beta^k (v_0 - w) while w stands still."""
    trainer, model, batch, turn = bench(FILE, with_trainer("mesa-saf", "decay=0.8"))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = {name: w + torch.randn_like(w) for name, w in weights.items()}
    trainer.average = {name: values.clone() for name, values in start.items()}
    for step in range(1, 4):
        trainer.loss(model, batch, turn)
        for name, w in weights.items():
            torch.testing.assert_close(trainer.average[name], w + 0.8**step * (start[name] - w), rtol=1e-4, atol=1e-5)
    assert not any(values.requires_grad for values in trainer.average.values())


def test_mesas_loss_is_with_the_average_of_the_weights():
    trainer, model, batch, turn = bench(FILE, with_trainer("mesa-saf", "decay=0.8", "weight=2.0", "start_epoch=0"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1
    trainer.average = {name: p.detach().clone() for name, p in other.named_parameters()}
    trainer.epoch = 1
    with torch.no_grad():
        for p, w in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(0.8 * p + 0.2 * w)
    outputs, past = model(batch.x), other(batch.x)
    wanted = F.cross_entropy(outputs, batch.y) + 2 * trajectory_loss(outputs, past, 5.0)
    torch.testing.assert_close(trainer.loss(model, batch, turn), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", ["restart", "keep"])
def test_between_turns_the_average_restarts_or_stays(average):
    site = site_of(FILE, with_trainer("mesa-saf", "decay=0.9", "start_epoch=0", f"average={average}"))
    state: dict = {}
    trainer, model = site.trainer, site.model
    trainer.fit(model, site.federation.client(0), state, turn_of(site))
    assert state["epochs"] == 1
    assert ("average" in state) == (average == "keep")
    last = {name: values.clone() for name, values in trainer.average.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    batches = trainer.batches

    def one_step(split, turn):
        yield next(batches(split, turn))

    trainer.batches = one_step
    trainer.fit(model, site.federation.client(0), state, turn_of(site, 2))
    for name, values in trainer.average.items():
        wanted = torch.full_like(values, 0.5) if average == "restart" else 0.9 * last[name] + 0.1 * 0.5
        torch.testing.assert_close(values, wanted)
