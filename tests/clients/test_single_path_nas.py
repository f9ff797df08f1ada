"""Single-Path NAS: the superkernel against plain kernels, the latency model, and whose the thresholds are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from federations import run
from trellis import experiment, scenario
from trellis.errors import ScenarioError
from trellis.models import torchvision_shim
from trellis.runs import Run
from trellis_clients import contract
from trellis_clients.contract import site_of
from trellis_clients.site import KEPT
from trellis_clients.trainer import Turn
from trellis_clients.trainers.architecture_search import _superkernel as superkernel
from trellis_clients.trainers.architecture_search import single_path_nas as nas

FILE = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "single-path-nas.yaml"
SMALL = ["variants={}", "trainer.groups=[[6, 2, 2]]", "trainer.stem=4", "trainer.local_epochs=1"]
TABLE = "[[1, 2, 3, 8], [1, 2, 3, 8]]"
TABLES = f"trainer.tables=[{TABLE}, [[1, 9, 3, 80], [1, 9, 3, 80]]]"
TEXT = """\
name: nas
data: digits
clients: 2
trainer: {name: single-path-nas, groups: [[6, 2, 2]], stem: 4, warm_up: 0.4, thresholds: local, threshold_lr: 0.2}
rounds: {count: 4}
evaluation: {federated_every: 2}
screening: {max_norm_ratio: null}
probe: {every: 0}
runtime: {grid: local}
"""


def turn(number: int = 9, client: int = 0) -> Turn:
    return Turn(number, 10, client, 2, torch.Generator().manual_seed(3))


def test_the_indicator_is_a_step_with_a_sigmoids_gradient():
    x = torch.tensor([-3.0, -1e-6, 0.0, 0.2, 5.0], requires_grad=True)
    value = superkernel.indicator(x)
    assert value.tolist() == [0, 0, 1, 1, 1]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    s = x.detach().sigmoid()
    torch.testing.assert_close(gradient, s * (1 - s))


@pytest.mark.parametrize("skippable", [True, False])
def test_thresholds_choose_parts_of_the_kernel(skippable):
    torch.manual_seed(0)
    kernel = superkernel.SuperKernel(12, skippable)
    x, big = torch.randn(2, 12, 7, 7), 1e6

    def used(ring: float, half: float, full: float) -> tuple[torch.Tensor, str]:
        kernel.thresholds.data = torch.tensor([ring, half, full])
        weight, decisions = kernel()
        return F.conv2d(x, weight, padding=2, groups=12).detach(), decisions.option()

    w = kernel.weight.detach()
    whole, centre = F.conv2d(x, w, padding=2, groups=12), F.conv2d(x, w[..., 1:4, 1:4], padding=1, groups=12)
    for thresholds, wanted, option in (
        ((0, 0, 0), whole, "5x5-e6"),
        ((-big, -big, -big), whole, "5x5-e6"),
        ((big, 0, 0), centre, "3x3-e6"),
    ):
        found, name = used(*map(float, thresholds))
        torch.testing.assert_close(found, wanted)
        assert name == option
    found, name = used(0.0, 0.0, big)
    assert name == "5x5-e3" and not bool(found[:, 6:].any())
    torch.testing.assert_close(found[:, :6], whole[:, :6])
    found, name = used(0.0, big, 0.0)
    assert (name == "skip") == skippable
    assert bool(found.any()) != skippable


def test_halves_are_measured_after_the_ring_was_decided():
    """A second half that is large only by its ring is dropped together with the ring."""
    kernel = superkernel.SuperKernel(4, True)
    with torch.no_grad():
        kernel.weight.zero_()
        kernel.weight[:2, :, 2, 2] = 5.0
        kernel.weight[2:, :, 0, 0] = 5.0
        kernel.thresholds.copy_(torch.tensor([100.0, 1.0, 1.0]))
    assert kernel()[1].option() == "3x3-e3"
    with torch.no_grad():
        kernel.thresholds[0] = 1.0
    assert kernel()[1].option() == "5x5-e6"


def test_the_decision_table():
    options = set()
    for bits in itertools.product((0.0, 1.0), repeat=3):
        decisions = superkernel.Decisions(*map(torch.tensor, bits))
        options.add(decisions.option())
        assert (decisions.option() == "skip") == (bits[1] == 0)
    assert options == set(superkernel.OPTIONS)
    assert [nas.decisions_of(option).option() for option in superkernel.OPTIONS] == list(superkernel.OPTIONS)


def test_the_latency_of_a_layer():
    row = (1.0, 2.5, 4.0, 10.0)
    found = {o: float(superkernel.latency(nas.decisions_of(o), row)) for o in superkernel.OPTIONS}
    wanted = {"skip": 0.0, "3x3-e3": 4.0 * 2.5 / 10.0, "3x3-e6": 2.5, "5x5-e3": 4.0, "5x5-e6": 10.0}
    assert found == pytest.approx(wanted)


def counted(network: torch.nn.Module, x: torch.Tensor) -> float:
    """Return thousands of multiply-accumulates of a forward pass of one example, counted layer by layer as it runs."""
    total = 0

    def count(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    network.eval()(x)
    return total / 1000


@pytest.mark.parametrize("size", [(8, 8), (8, 13), (11, 6)], ids=str)
@pytest.mark.parametrize("option", superkernel.OPTIONS[1:])
def test_multiply_accumulates_are_those_of_the_network_built(option, size):
    layers = nas.places(size, 4, ((6, 2, 2), (8, 2, 1), (5, 1, 3)))
    network = superkernel.Network(3, 10, layers, [option] * len(layers))
    column = superkernel.OPTIONS.index(option) - 1
    rows = sum(row[column] for row in nas.counted(layers))
    assert rows + nas.around(layers, 3, 10) == pytest.approx(counted(network, torch.zeros(1, 3, *size)))


def test_the_latency_without_tables_is_of_the_whole_network():
    site = site_of(FILE, [*SMALL, "trainer.architecture=[5x5-e6, 3x3-e6]"])
    metrics = site.trainer.evaluate(site.model, site.federation.data.test, turn(client=-1))
    assert metrics["latency"] == pytest.approx(counted(site.model, torch.zeros(1, 1, 8, 8)))
    fixed = site_of(FILE, [*SMALL, "trainer.fixed_latency=7.0"]).trainer.fixed
    assert (fixed, site_of(FILE, [*SMALL, f"trainer.tables=[{TABLE}]"]).trainer.fixed) == (7.0, 0.0)


def test_raising_any_threshold_lowers_the_latency():
    site = site_of(FILE, [*SMALL, "trainer.groups=[[6, 3, 1]]", "trainer.stem=6"])
    _, decided = site.model.run(torch.zeros(2, 1, 8, 8))
    site.trainer.total(decided, 0).backward()
    for layer in site.model.layers:
        assert bool((layer.kernel.thresholds.grad < 0).all())


def test_the_search_costs_three_scalars_a_layer_more_than_its_largest_network():
    searched = site_of(FILE, ["variants={}"])
    largest = site_of(FILE, ["variants={}", f"trainer.architecture={['5x5-e6'] * 5}"])
    count = {site: sum(p.numel() for p in site.model.parameters()) for site in (searched, largest)}
    assert count[searched] == count[largest] + 3 * 5


def test_the_whole_superkernel_is_the_largest_network():
    searched = site_of(FILE, SMALL)
    largest = site_of(FILE, [*SMALL, "trainer.architecture=[5x5-e6, 5x5-e6]"])
    own = {name: v for name, v in searched.model.state_dict().items() if not name.endswith("thresholds")}
    largest.model.load_state_dict(own)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(searched.model.eval()(x), largest.model.eval()(x))


def test_layers_are_those_of_the_published_network():
    """With the paper's widths and options our layers have the weights of timm's, which is the network it found."""
    torchvision_shim.make_importable()
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("spnasnet_100", pretrained=False)
    assert sum(p.numel() for p in theirs.parameters()) == 4_421_616
    found = [["3x3-e3"] * 3, ["5x5-e6", *["3x3-e3"] * 3], ["5x5-e6", *["3x3-e3"] * 3], ["5x5-e6", *["5x5-e3"] * 3]]
    stages = [*found, ["5x5-e6"] * 4]
    inputs = 16
    for number, (width, options) in enumerate(zip((24, 40, 80, 96, 192), stages, strict=True), start=1):
        own = 0
        for option in options:
            layer = superkernel.Layer(superkernel.Place(inputs, width, 1, (8, 8)), option)
            own += sum(p.numel() for p in layer.parameters())
            inputs = width
        assert own == sum(p.numel() for p in theirs.blocks[number].parameters())


@pytest.mark.parametrize("skippable", [True, False])
def test_dropping_is_for_the_warm_up_and_seeded(skippable):
    """Each indicator is dropped by itself; the half of a layer that cannot be skipped never is."""
    kernel = superkernel.SuperKernel(12, skippable)
    torch.manual_seed(0)
    first = [tuple(round(value.item(), 4) for value in kernel(0.6)[1]) for _ in range(400)]
    torch.manual_seed(0)
    assert [tuple(round(value.item(), 4) for value in kernel(0.6)[1]) for _ in range(400)] == first
    halves = [0, 1.6667] if skippable else [1]
    assert set(first) == set(itertools.product([0, 1.6667], halves, [0, 1.6667]))  # (ring, half, full)
    for number in (0, 1, 2) if skippable else (0, 2):
        kept = sum(decisions[number] > 0 for decisions in first) / len(first)
        assert kept == pytest.approx(0.6, abs=0.08)
    assert {tuple(value.item() for value in kernel()[1]) for _ in range(5)} == {(1.0, 1.0, 1.0)}
    site = site_of(FILE, ["variants={}", "trainer.warm_up=0.5"])
    assert [site.trainer.warming(turn(number)) for number in (1, 5, 6, 10)] == [True, True, False, False]


def test_latency_counts_after_the_warm_up_only():
    site = site_of(FILE, [*SMALL, "trainer.latency_weight=0.3", "trainer.keep=1.0"])
    batch = site.federation.client(0).train.batch(torch.arange(20))
    plain = F.cross_entropy(site.model(batch.x), batch.y)
    torch.testing.assert_close(site.trainer.loss(site.model, batch, turn(1)), plain)
    total = site.trainer.total(site.trainer.found(site.model), 0)
    torch.testing.assert_close(site.trainer.loss(site.model, batch, turn(9)), plain + 0.3 * total.log())


def test_decisions_are_read_off_the_averaged_model():
    site = site_of(FILE, [*SMALL, f"trainer.tables=[{TABLE}]", "trainer.fixed_latency=1.0"])
    test = site.federation.data.test
    assert site.trainer.evaluate(site.model, test, turn(client=-1))["latency"] == 17
    with torch.no_grad():
        site.model.layers[1].kernel.thresholds[1] = 1e6
    metrics = site.trainer.evaluate(site.model, test, turn(client=-1))
    assert (metrics["latency"], metrics["skipped"], metrics["layer-0"], metrics["layer-1"]) == (9, 1, 4, 0)


def test_averaging_may_flip_a_decision():
    """Two clients use their rings, which cancel each other: the averaged network has 3x3 kernels."""
    site = site_of(FILE, [*SMALL, f"trainer.tables=[{TABLE}]"])
    test, sent = site.federation.data.test, []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for layer in site.model.layers:
                outer = 1 - layer.kernel.inner
                layer.kernel.weight.copy_(1 - outer + sign * outer)
                layer.kernel.thresholds.fill_(1.0)
        own = site.trainer.evaluate(site.model, test, turn(client=-1))
        assert (own["layer-0"], own["layer-1"], own["latency"]) == (4, 4, 16)
        sent.append({name: values.clone() for name, values in site.trainer.shared(site.model).items()})
    site.trainer.load_shared(site.model, {name: (values + sent[1][name]) / 2 for name, values in sent[0].items()})
    averaged = site.trainer.evaluate(site.model, test, turn(client=-1))
    assert (averaged["layer-0"], averaged["layer-1"], averaged["latency"]) == (2, 2, 4)


def test_every_client_has_its_own_thresholds_and_device():
    """Local thresholds are not sent, differ between clients, and count where a client evaluates."""
    shared = set(site_of(FILE, SMALL).initial())
    options = [*SMALL, "trainer.thresholds=local", TABLES, "trainer.latency_weight=2.0", "trainer.threshold_lr=0.05"]
    site = site_of(FILE, options)
    names = [f"layers.{n}.kernel.thresholds" for n in (0, 1)]
    assert shared - set(site.initial()) == set(names)
    decided = site.trainer.found(site.model)
    assert [float(site.trainer.total(decided, client)) for client in (0, 1, 2, -1)] == [16.0, 160.0, 16.0, 16.0]

    arrays = {name: torch.from_numpy(array.numpy()) for name, array in site.initial().items()}
    states: list[dict] = [{}, {}]
    for client, state in enumerate(states):
        own = turn(client=client)
        own.received = {"arrays": arrays}
        site.train(own, state)
    first, second = (torch.cat([state[KEPT][name] for name in names]) for state in states)
    assert not torch.equal(first, second)
    states[0][KEPT][names[1]] = torch.full((3,), 1e6)
    states[1][KEPT] |= {name: torch.zeros(3) for name in names}

    def latency(client: int) -> float:
        own = turn(client=client)
        own.received = {"arrays": arrays}
        return float(site.evaluate(own, states[client])["metrics"]["latency"])

    assert latency(1) == 160
    states[0][KEPT][names[0]] = torch.zeros(3)
    assert latency(0) == 8  # layer 1 is skipped by this client alone


def test_the_cloud_reports_no_network_where_every_client_has_its_own():
    site = site_of(FILE, [*SMALL, "trainer.thresholds=local", TABLES])
    test = site.federation.data.test
    assert set(site.trainer.evaluate(site.model, test, turn(client=-1))) == {"loss", "accuracy"}
    assert set(site.trainer.evaluate(site.model, test, turn(client=1))) == {"loss", "accuracy", "latency", "skipped"}


def test_every_option_of_the_optimizer_counts():
    site = site_of(FILE, [*SMALL, "trainer.momentum=0.5", "trainer.weight_decay=0.01"])
    thresholds, rest = site.trainer.optimizer(site.model, turn()).param_groups
    assert (thresholds["lr"], rest["lr"]) == (0.15, 2e-3)
    for group in (thresholds, rest):
        assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 0.01)


@pytest.mark.parametrize("cut", [2, 3])
def test_local_thresholds_survive_a_restart(tmp_path, cut):
    """In the warm-up and after it: state and schedule go on where they were."""
    _, whole = run(tmp_path, (), TEXT)
    assert not whole.failed, whole.failed
    broken = Run.create(tmp_path / "cut", scenario.load(tmp_path / "digits.yaml"))

    class Stop(Exception):
        pass

    def stop(_, line):
        if line["round"] == cut:
            raise Stop

    with pytest.raises(Stop):
        experiment.execute(broken, experiment.Hooks(on_round=stop))
    outcome = experiment.execute(Run.open(broken.path))
    assert outcome.summaries[0]["sha256"] == whole.summaries[0]["sha256"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.architecture=[5x5-e6]", r"trainer\.architecture: 1 options; it needs 2.*got \['5x5-e6'\]"),
        ("trainer.tables=[[[1, 2, 3, 4]]]", r"trainer\.tables: table 0 has 1 rows; it needs 2.*got \[\[\[1, 2, 3, 4"),
        (
            "trainer.architecture=[skip, 5x5-e6]",
            r"trainer\.architecture: layer 0 is 'skip'.*allowed are '3x3-e3', .*'5x5-e6'.*got \['skip', '5x5-e6'\]",
        ),
        (TABLES, r"trainer\.thresholds: trainer\.tables has 2 tables; .*take 'local'.*got 'shared'"),
        (
            f"trainer={{name: single-path-nas, groups: [[6, 2, 2]], tables: [{TABLE}, [[1, 2, 3, 4]]]}}",
            r"trainer\.tables: table 1 has 1 rows",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(override, message):
    with pytest.raises(ScenarioError, match=message):
        scenario.check(scenario.load(FILE, [*SMALL, override]))


@pytest.mark.parametrize("options", [[], ["trainer.thresholds=local"], ["trainer.architecture=[3x3-e3, skip]"]])
def test_contract(options):
    contract.check(FILE, [*SMALL, *options])
