"""CutMix against its equations, the statistics of its boxes, and torchvision's own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from federations import sha
from test_bits import resumed
from trellis.errors import ScenarioError
from trellis.models import torchvision_shim
from trellis_clients import contract
from trellis_clients.trainers.augmentation import cutmix
from trellis_clients.trainers.augmentation.cutmix import Box, box_of, mixed_labels, pasted, visible

SCENARIO = Path(__file__).parents[2] / "scenarios" / "trainers" / "cutmix.yaml"


def draws(count: int, generator: torch.Generator, sides=(16, 12)):
    for _ in range(count):
        centre = tuple(int(torch.randint(side, (), generator=generator)) for side in sides)
        yield cutmix.beta(1.0, generator), centre


def test_areas_add_up_and_pixels_come_from_the_right_image():
    generator = torch.Generator().manual_seed(0)
    x, order = torch.randn(5, 2, 16, 12), torch.tensor([3, 0, 4, 1, 2])
    kept = x.clone()
    for share, centre in draws(50, generator):
        box = box_of((16, 12), share, centre)
        assert visible((16, 12), box) * 16 * 12 + box.area == pytest.approx(16 * 12)
        mixed = pasted(x, order, box)
        inside = torch.zeros(16, 12, dtype=torch.bool)
        inside[box.top : box.bottom, box.left : box.right] = True
        assert torch.equal(mixed[:, :, inside], x[order][:, :, inside])
        assert torch.equal(mixed[:, :, ~inside], x[:, :, ~inside])
    assert torch.equal(x, kept)  # the data set's own tensor is never written to


def test_the_ends_of_lambda():
    assert box_of((8, 8), 1.0, (3, 3)).area == 0
    assert box_of((8, 8), 0.0, (4, 4)) == Box(0, 8, 0, 8)
    assert box_of((8, 8), 0.0, (0, 0)) == Box(0, 4, 0, 4)  # cut off at the border


def test_the_soft_target_is_the_papers_sum_of_two_cross_entropies():
    logits, y, order = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0]), torch.randperm(6)
    target = mixed_labels(y, order, 0.3, 5)
    assert torch.allclose(target.sum(1), torch.ones(6))
    two = 0.3 * F.cross_entropy(logits, y) + 0.7 * F.cross_entropy(logits, y[order])
    torch.testing.assert_close(F.cross_entropy(logits, target), two)
    same = mixed_labels(y, torch.arange(6), 0.3, 5)
    torch.testing.assert_close(F.cross_entropy(logits, same), F.cross_entropy(logits, y))


@pytest.mark.parametrize(("side", "expected"), [(8, 0.767), (16, 0.723), (32, 0.701), (224, 0.682)])
def test_the_border_biases_lambda_upwards(side, expected):
    """Mean over all centres, on a fine grid of lambda: clipping leaves far more than half of an image to see."""
    kept = []
    for share in (torch.arange(2000) + 0.5).div(2000).tolist():
        half = int(side * math.sqrt(1 - share)) // 2
        # Rows and columns are cut off independently, so the mean area is the square of the mean side.
        lengths = [box_of((side, side), share, (at, at)) for at in range(side)]
        mean = sum(box.bottom - box.top for box in lengths) / side
        assert mean <= 2 * half
        kept.append(1 - mean**2 / side**2)
    assert sum(kept) / len(kept) == pytest.approx(expected, abs=0.002)


def test_alpha_one_is_uniform_and_large_alpha_is_a_half():
    generator = torch.Generator().manual_seed(1)
    uniform = torch.tensor([cutmix.beta(1.0, generator) for _ in range(4000)])
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.005)
    narrow = torch.tensor([cutmix.beta(50.0, generator) for _ in range(1000)])
    assert float(narrow.var()) == pytest.approx(1 / (4 * 101), rel=0.15)


def test_torchvision_makes_the_same_boxes_and_images():
    assert torchvision_shim.make_importable()
    from torchvision.transforms import v2

    theirs = v2.CutMix(num_classes=7)
    x, y = torch.rand(6, 3, 16, 12), torch.tensor([0, 1, 2, 3, 4, 5])
    for seed in range(40):
        torch.manual_seed(seed)
        images, labels = theirs(x, y)
        torch.manual_seed(seed)
        share = float(theirs._dist.sample(()))
        column, row = int(torch.randint(12, (1,))), int(torch.randint(16, (1,)))
        box, order = box_of((16, 12), share, (row, column)), torch.arange(6).roll(1)
        assert torch.equal(pasted(x, order, box), images)
        torch.testing.assert_close(mixed_labels(y, order, visible((16, 12), box), 7), labels)


def test_timm_draws_the_same_boxes_up_to_an_odd_pixel_and_the_same_lambda_on_average():
    """timm's box of an odd side has a pixel more at its end, where the paper's code drops it."""
    assert torchvision_shim.make_importable()
    from timm.data.mixup import Mixup

    side = 224
    theirs = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=2)
    state = np.random.get_state()  # timm draws from NumPy's global generator
    kept = []
    try:
        for seed in range(2000):
            np.random.seed(seed)
            kept.append(float(theirs(torch.zeros(2, 1, side, side), torch.tensor([0, 1]))[1][0, 0]))
            np.random.seed(seed)
            np.random.rand()  # whether to mix at all
            drawn = np.random.beta(1.0, 1.0)
            centre = tuple(int(np.random.randint(0, side)) for _ in range(2))
            box, odd = box_of((side, side), drawn, centre), int(side * math.sqrt(1 - drawn)) % 2
            box = Box(box.top, min(box.bottom + odd, side), box.left, min(box.right + odd, side))
            assert kept[-1] == pytest.approx(visible((side, side), box), abs=1e-6)
    finally:
        np.random.set_state(state)
    generator = torch.Generator().manual_seed(3)
    ours = [visible((side, side), box_of((side, side), *draw)) for draw in draws(2000, generator, (side, side))]
    assert np.mean(kept) == pytest.approx(np.mean(ours), abs=0.02)  # the difference's standard error is 0.009
    assert np.mean(ours) == pytest.approx(0.682, abs=0.015)


def test_the_loss_is_of_a_mixed_batch_under_the_turns_own_draws():
    trainer, model, batch, turn = contract.bench(SCENARIO, ["variants={}", "trainer.probability=1.0"])
    state = turn.generator.get_state()
    loss = trainer.loss(model, batch, turn)
    turn.generator.set_state(state)
    torch.rand((), generator=turn.generator)
    drawn = cutmix.beta(1.0, turn.generator)
    centre = tuple(int(torch.randint(16, (), generator=turn.generator)) for _ in range(2))
    order, box = torch.randperm(8, generator=turn.generator), box_of((16, 16), drawn, centre)
    logits, lam = model(pasted(batch.x, order, box)), visible((16, 16), box)
    expected = lam * F.cross_entropy(logits, batch.y) + (1 - lam) * F.cross_entropy(logits, batch.y[order])
    assert box.area > 0
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(loss, F.cross_entropy(model(batch.x), batch.y))


def test_probability_zero_is_plain_training_and_one_image_is_left_alone():
    trainer, model, batch, turn = contract.bench(SCENARIO, ["variants={}", "trainer.probability=0.0"])
    torch.testing.assert_close(trainer.loss(model, batch, turn), F.cross_entropy(model(batch.x), batch.y))
    trainer, model, batch, turn = contract.bench(SCENARIO, ["variants={}", "trainer.probability=1.0"])
    one = type(batch)({name: values[:1] for name, values in batch.fields.items()}, batch.index[:1])
    torch.testing.assert_close(trainer.loss(model, one, turn), F.cross_entropy(model(one.x), one.y))


def test_the_drawn_lambda_can_be_kept():
    """The label then has the share that was drawn, however much of the box the border has cut off."""
    overrides = ["variants={}", "trainer.probability=1.0", "trainer.lambda_from_box=false"]
    trainer, model, batch, turn = contract.bench(SCENARIO, overrides)
    cut_off = 0
    for seed in range(8):
        turn.generator.manual_seed(seed)
        loss = trainer.loss(model, batch, turn)
        turn.generator.manual_seed(seed)
        torch.rand((), generator=turn.generator)
        drawn = cutmix.beta(1.0, turn.generator)
        centre = tuple(int(torch.randint(16, (), generator=turn.generator)) for _ in range(2))
        box, order = box_of((16, 16), drawn, centre), torch.randperm(8, generator=turn.generator)
        logits = model(pasted(batch.x, order, box))
        own, other = F.cross_entropy(logits, batch.y), F.cross_entropy(logits, batch.y[order])
        torch.testing.assert_close(loss, drawn * own + (1 - drawn) * other)
        cut_off += abs(visible((16, 16), box) - drawn) > 0.1
    assert cut_off >= 2  # of these draws some tell the two shares apart


def test_an_alpha_too_small_to_draw_from_is_refused():
    """Far below a hundredth both Gamma variables are zero in double precision, and there is no lambda."""
    with pytest.raises(ScenarioError, match=r"alpha.*0\.01"):
        contract.bench(SCENARIO, ["variants={}", "trainer.alpha=0.001"])


def test_a_run_resumes_to_the_same_bits(tmp_path):
    text = SCENARIO.read_text().partition("variants:")[0].replace("local_epochs: 5", "local_epochs: 1")
    text = text.replace("count: 15", "count: 4") + "runtime: {grid: local}\n"
    assert resumed(tmp_path, text) == sha(tmp_path, text=text)
