"""Mesa: what is exact, what is right in expectation, how much is kept, and whose the ranges are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from federations import run
from trellis import experiment, scenario
from trellis.models.zoo.vit import VisionTransformer
from trellis.runs import Run
from trellis_clients import contract
from trellis_clients.contract import site_of
from trellis_clients.trainer import Turn
from trellis_clients.trainers.efficiency import _activations as activations
from trellis_clients.trainers.efficiency import _codes as codes
from trellis_clients.trainers.efficiency import mesa
from trellis_clients.trainers.efficiency._activations import Compression
from trellis_clients.trainers.efficiency._codes import Layout, Range
from trellis_clients.trainers.efficiency._memory import Storages, bytes_alive

FILE = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "mesa.yaml"
CNN = "model={name: small-cnn, norm: batch, width: 4, hidden: 16}"
SMALL = ["variants={}", "trainer.local_epochs=1", "model={name: vit, patch: 4, dim: 16, depth: 1, heads: 2}"]


def turn(number: int = 1, seed: int = 3) -> Turn:
    return Turn(number, 4, 0, 3, torch.Generator().manual_seed(seed))


def compression(model: nn.Module, bits: int = 8, stochastic: bool = True, ranges=None) -> Compression:
    own = [*model.parameters(), *model.buffers()]
    return Compression(bits, 4, stochastic, 0.9, {} if ranges is None else ranges, own)


def covered(layer: nn.Module, bits: int = 8, stochastic: bool = True) -> tuple[nn.Module, Compression]:
    model = nn.Sequential(layer)
    live = compression(model, bits, stochastic)
    activations.cover(model, mesa.COVERED, lambda: live)
    return model, live


def gradients(model: nn.Module, x: torch.Tensor, weights: torch.Tensor | None = None) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    scale = torch.linspace(-1, 1, out.numel()).view_as(out) if weights is None else weights
    return list(torch.autograd.grad((out * scale).sum(), [x, *model.parameters()]))


@pytest.mark.parametrize("bits", [8, 2])
def test_the_forward_pass_is_exact(bits):
    site = site_of(FILE, [*SMALL, f"trainer.bits={bits}"])
    batch = site.federation.client(0).train.batch(torch.arange(16))
    plain = copy.deepcopy(site.model)  # its layers are covered too, by the same trainer
    exact = plain(batch.x)
    site.trainer.compression = compression(site.model, bits)
    assert torch.equal(site.model(batch.x), exact)
    assert site.trainer.compression.ranges
    assert torch.equal(site.trainer.loss(site.model, batch, turn()), F.cross_entropy(exact, batch.y))


def test_explicit_attention_is_the_zoos_with_the_same_weights():
    torch.manual_seed(0)
    fused = VisionTransformer((1, 8, 8), 10, 2, 16, 2, 4, 2)
    own = copy.deepcopy(fused)
    for block in own.blocks:
        block.attn = mesa.Attention(block.attn)
    assert own.state_dict().keys() == fused.state_dict().keys()
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(own(x), fused(x))


def test_gradients_that_need_no_activation_are_exact():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 8)
    layer = nn.Linear(8, 3)
    exact = gradients(copy.deepcopy(layer), x)
    model, live = covered(layer)
    dx, dw, db = gradients(model, x)
    assert torch.equal(dx, exact[0]) and torch.equal(db, exact[2])
    assert not torch.equal(dw, exact[1])
    assert list(live.ranges) == ["0"] and len(live.ranges["0"]) == 1


def test_weight_gradients_are_right_in_expectation():
    """The mean of 2000 draws is within three standard errors of the exact gradient, where nothing is clipped."""
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    layer = nn.Linear(8, 3)
    exact = gradients(copy.deepcopy(layer), x)[1]
    model, live = covered(layer, bits=2)
    draws = []
    for _ in range(2000):
        live.ranges.clear()  # a first step never clips
        draws.append(gradients(model, x)[1])
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert float(error.max()) < 3
    assert float(draws.std(0).min()) > 0  # each of the 24 is rounded at random
    nearest = [gradients(covered(nn.Linear(8, 3), bits=2, stochastic=False)[0], x)[1] for _ in range(2)]
    assert torch.equal(*nearest)


def test_the_noise_of_rounding_is_uniform_and_never_a_whole_step():
    torch.manual_seed(0)
    noise = codes.noise(torch.empty(3, 10**5))
    assert noise.shape == (3, 10**5) and noise.dtype == torch.float32
    assert float(noise.min()) >= 2**-17 and float(noise.max()) <= 1 - 2**-17
    counts = torch.histc(noise, 16, 0, 1)
    assert float((counts - 3e5 / 16).abs().max()) < 5 * (3e5 / 16) ** 0.5
    assert float(torch.corrcoef(torch.stack([noise[0, :-1], noise[0, 1:]]))[0, 1].abs()) < 0.015


@pytest.mark.parametrize("layer", [nn.GELU(), nn.Softmax(-1), nn.LayerNorm(8)], ids=lambda each: type(each).__name__)
def test_gradients_are_those_at_the_values_that_were_kept(layer):
    """With two bits and nearest rounding what is kept is known, and so is the gradient: the layer's own formula there.

    GELU's derivative at the kept input; softmax's product with the kept output; the layer norm's with the kept input,
    and the exact mean and deviation.
    """
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    dx, *parameters = gradients(covered(copy.deepcopy(layer), bits=2, stochastic=False)[0], x, dy)
    saved = layer(x).detach() if isinstance(layer, nn.Softmax) else x
    kept = torch.cat([nearest_of_four(piece) for piece in saved.chunk(4, -1)], -1)
    assert not torch.allclose(kept, saved, atol=0.1 if not isinstance(layer, nn.Softmax) else 0.01)
    if isinstance(layer, nn.GELU):
        at = kept.clone().requires_grad_()
        (expected,) = torch.autograd.grad((F.gelu(at) * dy).sum(), at)
    elif isinstance(layer, nn.Softmax):
        expected = kept * (dy - (dy * kept).sum(-1, keepdim=True))
    else:
        mean, rstd = x.mean(-1, keepdim=True), (x.var(-1, correction=0, keepdim=True) + layer.eps).rsqrt()
        normal = (kept - mean) * rstd  # the weight is one
        expected = rstd * (dy - dy.mean(-1, keepdim=True) - normal * (dy * normal).mean(-1, keepdim=True))
        torch.testing.assert_close(parameters[0], (dy * normal).sum((0, 1)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parameters[1], dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)


def nearest_of_four(piece: torch.Tensor) -> torch.Tensor:
    """Return each value's nearest of four levels, evenly from the least to the greatest."""
    levels = torch.linspace(float(piece.min()), float(piece.max()), 4)
    return levels[(piece[..., None] - levels).abs().argmin(-1)]


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 15), (2, 3)])
@pytest.mark.parametrize(
    ("shape", "groups", "heads"),
    [((4, 5, 8), 4, None), ((7, 8), 2, None), ((3, 6, 4, 4), 3, None), ((2, 4, 5, 5), 4, 4)],
)
def test_codes_are_within_a_step_of_the_values(bits, levels, shape, groups, heads):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layout, span = Layout.of(x.shape, groups, heads), Range(torch.empty(0), torch.empty(0))
    span.update(x, layout, 0.9)
    small = codes.compress(x, bits, span, layout, True)
    assert small.codes.dtype == torch.uint8
    assert small.codes.numel() == -(-x.numel() * bits // 8)
    # A group is a head or some channels, over the whole batch: its range is theirs.
    axis = 1 if x.ndim == 4 else x.ndim - 1
    chunks = x.chunk(groups, dim=axis)
    torch.testing.assert_close(span.alpha, torch.stack([c.max() - c.min() for c in chunks]))
    for number, error in enumerate((small.values() - x).abs().chunk(groups, dim=axis)):
        assert float(error.max()) <= float(span.alpha[number]) / levels * (1 + 1e-5)


def test_heads_that_lie_in_the_batch_axis_have_ranges_of_their_own():
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(1))  # two images of three heads
    span = Range(torch.empty(0), torch.empty(0))
    span.update(x, Layout.of(x.shape, 3, 3), 0.9)
    for head in range(3):
        assert float(span.beta[head]) == float(x[head::3].min())
        assert float(span.alpha[head]) == float(x[head::3].max() - x[head::3].min())


def test_values_outside_the_range_are_clipped_and_constants_survive():
    span = Range(torch.tensor([1.0]), torch.tensor([0.0]), 5)
    x = torch.tensor([[-3.0, 0.5, 9.0]])
    values = codes.compress(x, 8, span, Layout(1, 3), False).values()
    torch.testing.assert_close(values, torch.tensor([[0.0, 0.5, 1.0]]), atol=1 / 255, rtol=0)
    flat = Range(torch.empty(0), torch.empty(0))
    constant = torch.full((2, 4), 3.7)
    flat.update(constant, Layout(2, 2), 0.9)
    assert torch.equal(codes.compress(constant, 8, flat, Layout(2, 2), True).values(), constant)


def test_the_range_follows_its_closed_form():
    span = Range(torch.empty(0), torch.empty(0))
    span.update(torch.tensor([[0.0, 5.0]]), Layout(1, 2), 0.9)
    for step in range(1, 8):
        span.update(torch.tensor([[-1.0, 1.0]]), Layout(1, 2), 0.9)
        assert float(span.alpha) == pytest.approx(2 + 0.9**step * 3, rel=1e-5)
        assert float(span.beta) == pytest.approx(-1 + 0.9**step, rel=1e-5)


def test_a_relu_keeps_a_bit_a_value_and_loses_nothing():
    x = torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    model, live = covered(nn.ReLU())
    (dx,) = gradients(model, x)
    assert torch.equal(dx, gradients(nn.ReLU(), x)[0])
    with live.counting([]) as count:
        model(x.clone().requires_grad_())
    assert (count.exact, count.kept) == (4 * x.numel(), -(-x.numel() // 8))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(8), (3, 5, 8)),
        (nn.GELU(), (3, 5, 8)),
        (nn.Softmax(-1), (3, 5, 8)),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 6)),
        (nn.BatchNorm2d(4), (5, 4, 6, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_layers_gradient_is_close_at_eight_bits_and_exact_at_32(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = gradients(copy.deepcopy(layer).train(), x)
    eight, _ = covered(copy.deepcopy(layer))
    for one, other in zip(gradients(eight.train(), x), exact, strict=True):
        assert float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.99
    identity, live = covered(copy.deepcopy(layer), bits=32)
    for one, other in zip(gradients(identity.train(), x), exact, strict=True):
        assert torch.equal(one, other)
    assert not live.ranges
    assert torch.autograd.gradcheck(
        covered(copy.deepcopy(layer).double().train(), bits=32)[0], [x[:1].double().requires_grad_()], nondet_tol=0
    )


def test_attention_keeps_its_matrix_once_and_softmax_uses_what_was_kept():
    torch.manual_seed(0)
    model = nn.Sequential(mesa.Attention(VisionTransformer((1, 8, 8), 10, 2, 16, 1, 4, 2).blocks[0].attn))
    live = compression(model)
    activations.cover(model, mesa.COVERED, lambda: live)
    x = torch.randn(3, 17, 16)
    exact = gradients(copy.deepcopy(model[0]).eval(), x)
    for one, other in zip(gradients(model, x), exact, strict=True):
        assert float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.99
    assert {name: len(spans) for name, spans in live.ranges.items()} == {"0": 4, "0.qkv": 1, "0.project": 1}
    assert all(len(span.alpha) == 4 for spans in live.ranges.values() for span in spans)


def test_two_forward_passes_before_a_backward_pass_do_not_mix():
    """The second pass moves the running range; what the first one kept is read under its own."""
    model, _ = covered(nn.Linear(4, 2), stochastic=False)
    x = torch.linspace(-1, 1, 12).view(3, 4)
    first = model(x)
    model(100 * x)
    (dw,) = torch.autograd.grad(first.sum(), [model[0].weight])
    torch.testing.assert_close(dw, x.sum(0).expand(2, 4), atol=0.02, rtol=0)


def test_in_evaluation_and_without_gradients_nothing_changes():
    model, live = covered(nn.Linear(8, 3))
    x = torch.randn(4, 8)
    with torch.no_grad():
        model.train()(x)
    found = gradients(model.eval(), x)
    assert not live.ranges
    for one, exact in zip(found, gradients(copy.deepcopy(model[0]), x), strict=True):  # the copy's hooks are gone
        assert torch.equal(one, exact)


def test_an_exception_inside_a_layer_leaves_no_context_behind():
    model, live = covered(nn.Linear(8, 3))
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 9))
    x = torch.randn(4, 8, requires_grad=True)
    (x * x).sum().backward()  # would be compressed under the layer's name, and inexact
    assert torch.equal(x.grad, 2 * x)
    assert [span.steps for spans in live.ranges.values() for span in spans] in ([], [1])  # at most the pass that failed


def watched(model: nn.Module) -> dict[str, StorageWeakRef]:
    """Follow the outputs of linear layers, layer norms and GELUs by weak references, by the layer's name."""
    found: dict[str, StorageWeakRef] = {}

    def note(name):
        return lambda _, __, out: found.update({name: StorageWeakRef(out.untyped_storage())})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.GELU):
            module.register_forward_hook(note(name))
    return found


def test_no_exact_activation_outlives_the_forward_pass():
    """While the loss is held, in the counted step and in the ones after it. At 32 bits they do."""
    alive = {}
    for bits in (8, 32):
        site = site_of(FILE, [*SMALL, f"trainer.bits={bits}"])
        site.trainer.compression = compression(site.model, bits)
        batch = site.federation.client(0).train.batch(torch.arange(16))
        found = watched(site.model.train())
        for step in ("counted", "later"):
            found.clear()
            loss = site.trainer.loss(site.model, batch, turn())
            assert len(site.trainer.counts) == 1
            alive[bits, step] = {name for name, storage in found.items() if not storage.expired()}
            assert len(found) == 9  # a block has two norms, four linear layers and a GELU; a norm and the head follow
            loss.backward()
    assert alive[8, "counted"] == alive[8, "later"] == set()
    kept = {"blocks.0.norm1", "blocks.0.norm2", "blocks.0.mlp.0", "blocks.0.mlp.1", "norm"}
    assert alive[32, "counted"] == alive[32, "later"] == kept


@pytest.mark.parametrize("bits", [32, 8, 2])
@pytest.mark.parametrize("model", [SMALL[2], CNN], ids=["transformer", "convolutions"])
def test_the_count_is_the_memory_that_is_alive(model, bits):
    site = site_of(FILE, [*SMALL, model, f"trainer.bits={bits}"])
    batch = site.federation.client(0).train.batch(torch.arange(16))
    site.trainer.compression = compression(site.model, bits)
    model, loss = site.model.train(), 4
    first, second = (bytes_alive(lambda: site.trainer.loss(model, batch, turn())) for _ in range(2))
    (count,) = site.trainer.counts
    assert first == second == count.kept + loss
    assert (count.kept == count.exact) == (bits == 32)


def test_two_passes_before_a_backward_pass_leave_no_activation_behind():
    model, _ = covered(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)))
    found, x = watched(model), torch.randn(3, 4)
    outs = []
    for _ in range(2):
        outs.append(model(x))
        assert [name for name, storage in found.items() if not storage.expired()] == ["0.2"]  # what `outs` holds
    del outs


def test_bytes_alive_are_those_of_a_layer_counted_by_hand():
    linear, x = nn.Linear(6, 4), torch.randn(5, 6)
    assert bytes_alive(lambda: linear(x)) == 5 * 4 * 4  # the result; the input was there before
    assert bytes_alive(lambda: F.relu(linear(x))) == 5 * 4 * 4  # which keeps its result, and not what it was made of
    assert bytes_alive(lambda: F.gelu(linear(x))) == 2 * 5 * 4 * 4
    assert bytes_alive(lambda: linear(x).detach().sum()) == 4
    assert bytes_alive(lambda: linear.weight.t()) == 0


def test_storages_are_one_piece_whatever_views_them_and_are_not_held():
    x = torch.zeros(4, 4)
    storages = Storages([x])
    assert x.t() in storages and storages.add(x[1:]) == 0 and storages.alive == 64
    assert torch.zeros(4, 4) not in storages
    del x
    assert storages.alive == 0


@pytest.mark.parametrize(("model", "most"), [(SMALL[2], 0.30), (CNN, 0.7)], ids=["transformer", "convolutions"])
def test_bytes_kept(model, most):
    """What is kept and would be kept; the latter agrees with counting by torch's own hooks alone.

    Max-pooling is none of Mesa's layers: it keeps its input and its indices, which the small network feels.
    """
    site = site_of(FILE, [*SMALL, model])
    data = site.federation.client(0)
    metrics = site.trainer.fit(site.model, data, {}, turn())
    assert metrics["saved-share"] == metrics["saved-bytes"] / metrics["exact-bytes"] < most
    again = site_of(FILE, [*SMALL, model, "trainer.bits=32"])
    plain = again.trainer.fit(again.model, data, {}, turn())
    assert plain["saved-share"] == 1
    assert plain["exact-bytes"] == metrics["exact-bytes"] == kept_by_torch(again, data)


def kept_by_torch(site, data) -> int:
    model = copy.deepcopy(site.model).train()
    site.trainer.compression = None
    batch = next(site.trainer.batches(data.train, turn()))
    apart = {v.untyped_storage().data_ptr() for v in (*model.parameters(), *model.buffers(), *batch.fields.values())}
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in apart:
            found[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        F.cross_entropy(model(batch.x), batch.y)
    return sum(size for size, _ in found.values())


def test_ranges_are_the_clients_own():
    """They grow by one step a batch across turns, are not sent, and another client starts anew."""
    site = site_of(FILE, SMALL)
    data, state = site.federation.client(0), {}
    site.trainer.fit(site.model, data, state, turn(1))
    steps = [span["steps"] for spans in state[mesa.RANGES].values() for span in spans]
    site.trainer.fit(site.model, data, state, turn(2))
    assert [span["steps"] for spans in state[mesa.RANGES].values() for span in spans] == [2 * n for n in steps]
    other = {}
    site.trainer.fit(site.model, site.federation.client(1), other, turn(2))
    assert [span["steps"] for spans in other[mesa.RANGES].values() for span in spans] == steps
    assert set(site.initial()) == {name for name, v in site.model.state_dict().items() if v.is_floating_point()}


def test_ranges_survive_a_restart(tmp_path):
    text = (
        "name: mesa\ndata: digits\nclients: 2\nmodel: {name: vit, patch: 4, dim: 16, depth: 1, heads: 2}\n"
        "trainer: {name: mesa, batch_size: 128}\nrounds: {count: 3}\nprobe: {every: 0}\nruntime: {grid: local}\n"
    )
    _, whole = run(tmp_path, (), text)
    broken = Run.create(tmp_path / "cut", scenario.load(tmp_path / "digits.yaml"))

    class Stop(Exception):
        pass

    def stop(_, line):
        if line["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        experiment.execute(broken, experiment.Hooks(on_round=stop))
    outcome = experiment.execute(Run.open(broken.path))
    assert outcome.summaries[0]["sha256"] == whole.summaries[0]["sha256"]


@pytest.mark.parametrize("model", [SMALL[2], CNN], ids=["transformer", "convolutions"])
def test_contract(model):
    contract.check(FILE, [*SMALL, model])
