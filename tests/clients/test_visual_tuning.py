"""Visual tuning: every recipe's start, count, frozen base and fold; what travels; resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from federations import lines, run, sha
from test_bits import resumed
from trellis import registry, scenario
from trellis.data.loading import load_data
from trellis.errors import DataError, TrellisError
from trellis.scenario import from_mapping
from trellis_clients import contract
from trellis_clients.contract import site_of
from trellis_clients.site import KEPT
from trellis_clients.trainer import Turn
from trellis_clients.trainers.efficiency._memory import bytes_alive
from trellis_clients.trainers.tuning import _parameter
from trellis_clients.trainers.tuning.visual_tuning import trained

SCENARIO = """\
name: tuning
data: {name: novel-digits, per_class: 12}
clients: 2
model: {name: vit, patch: 4, dim: 16, depth: 2, heads: 2}
trainer: {name: visual-tuning, base: {epochs: 1}, batch_size: 16}
rounds: {count: 4}
evaluation: {federated_every: 0}
probe: {every: 0, least: 0}
runtime: {grid: local}
"""
WIDTH, DEPTH, CLASSES = 16, 2, 5
HEAD = WIDTH * CLASSES + CLASSES
RECIPES = {
    "linear": ["trainer.kind=linear"],
    "shallow": ["trainer.kind=prompt", "trainer.prompt=shallow"],
    "deep": ["trainer.kind=prompt"],
    "parallel": ["trainer.kind=adapter"],
    "sequential": ["trainer.kind=adapter", "trainer.adapter=sequential"],
    "lora": ["trainer.kind=parameter"],
    "lora-a": ["trainer.kind=parameter", "trainer.lora_a=trained"],
    "bitfit": ["trainer.kind=parameter", "trainer.parameter=bitfit"],
    "ssf": ["trainer.kind=parameter", "trainer.parameter=ssf"],
    "norm": ["trainer.kind=parameter", "trainer.parameter=norm"],
    "ladder": ["trainer.kind=remapping"],
    "side": ["trainer.kind=remapping", "trainer.remapping=side"],
    "full": ["trainer.kind=full"],
}
BLOCK_BIASES = 3 * WIDTH + WIDTH + 2 * WIDTH + WIDTH + 2 * WIDTH  # qkv, projection, two MLP layers, two norms
SIDE_WIDTH = 4
LADDER = (
    (DEPTH + 1) * (WIDTH * SIDE_WIDTH + SIDE_WIDTH)
    + DEPTH
    + DEPTH * (4 * SIDE_WIDTH * SIDE_WIDTH + 4 * SIDE_WIDTH + 4 * SIDE_WIDTH * SIDE_WIDTH + 3 * SIDE_WIDTH)
    + DEPTH * 4 * SIDE_WIDTH
    + 2 * SIDE_WIDTH
    + SIDE_WIDTH * WIDTH
    + WIDTH
)
COUNTS = {
    "linear": 0,
    "shallow": 4 * WIDTH,
    "deep": DEPTH * 4 * WIDTH,
    "parallel": DEPTH * (2 * WIDTH * 8 + 8 + WIDTH),
    "sequential": DEPTH * (2 * WIDTH * 8 + 8 + WIDTH),
    "lora": 2 * DEPTH * 4 * WIDTH,
    "lora-a": 2 * DEPTH * 2 * 4 * WIDTH,
    "bitfit": WIDTH + DEPTH * BLOCK_BIASES + WIDTH,
    "ssf": 2 * (WIDTH + DEPTH * (BLOCK_BIASES) + WIDTH),
    "norm": 2 * WIDTH * (2 * DEPTH + 1),
    "ladder": LADDER,
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """One site a recipe, all of the same seed."""
    path = tmp_path_factory.mktemp("tuning") / "tuning.yaml"
    path.write_text(SCENARIO)
    made = {}

    def get(recipe: str):
        if recipe not in made:
            made[recipe] = site_of(path, RECIPES[recipe])
        return made[recipe]

    return get


def images(site, count: int = 12) -> torch.Tensor:
    return site.federation.data.train.batch(torch.arange(count)).x


def stirred(model: nn.Module) -> nn.Module:
    """Return a copy whose tuned values are anything but their start."""
    twin = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for values in trained(twin).values():
            values += 0.2 * torch.randn(values.shape, generator=generator)
    return twin


def fitted(site, epochs: int = 1):
    """Train client 0 for a turn."""
    message = contract._message(site, 1, 0)
    turn = site.turn(message, 0, "train")
    site.load(turn.received["arrays"], {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        metrics = site.trainer.fit(site.model, site.federation.client(0), {}, turn)
    return metrics, turn


@pytest.mark.parametrize("recipe", COUNTS)
def test_the_tuned_values_are_as_many_as_published(sites, recipe):
    site = sites(recipe)
    assert sum(p.numel() for p in trained(site.model).values()) == COUNTS[recipe] + HEAD
    assert set(site.trainer.shared(site.model)) == set(trained(site.model))


@pytest.mark.parametrize("recipe", ["parallel", "sequential", "lora", "bitfit", "ssf", "norm", "full"])
def test_a_recipe_starts_at_the_frozen_function_bit_for_bit(sites, recipe):
    frozen, site = sites("linear"), sites(recipe)
    x = images(site)
    frozen.load(frozen.trainer.shared(frozen.model), {})
    with torch.no_grad():
        # A fresh model: the site's own may have been trained by another test.
        model = site.trainer._injected(copy.deepcopy(frozen.model.body)).eval()
        assert torch.equal(model(x), frozen.model.eval().features(x))


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_leaves_the_base_alone_and_moves_the_rest(sites, recipe):
    site = sites(recipe)
    before = {name: values.clone() for name, values in site.model.state_dict().items()}
    metrics, turn = fitted(site)
    tuned = trained(site.model)
    for name, values in site.model.state_dict().items():
        if name not in tuned:
            assert torch.equal(values, before[name]), name
    moved = [name for name in tuned if not torch.equal(tuned[name], before[name])]
    assert len(moved) > 0.6 * len(tuned)
    optimizer = site.trainer.optimizer(site.model, turn)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in tuned.values()}
    plain = next(g for g in optimizer.param_groups if g["weight_decay"] == 0)
    assert all(p.dim() <= 1 for p in plain["params"])
    assert metrics["tuned-values"] == sum(p.numel() for p in tuned.values())


def test_what_is_frozen_stays_in_evaluation_mode(sites):
    model = sites("parallel").model
    model.train()
    adapter = model.body.blocks[0]
    assert adapter.adapter.dropout.training and not adapter.block.training and not adapter.block.mlp.training
    assert sites("full").model.train().body.training
    assert not copy.deepcopy(model).train().body.blocks[1].block.training


# -- prompts ----------------------------------------------------------------------------------------------


def lengths(model, x) -> list[int]:
    """Return the number of tokens that enter each block."""
    seen: list[int] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for b in model.body.base.blocks]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_prompts_are_replaced_before_every_block(sites):
    for recipe in ("shallow", "deep"):
        assert lengths(sites(recipe).model, images(sites(recipe))) == [1 + 4 + 4] * DEPTH
    model = stirred(sites("deep").model)
    x, base, body = images(sites("deep")), sites("deep").model.body.base, model.body
    tokens = base.embed(x)
    for number, block in enumerate(base.blocks):  # by hand: class token, this block's prompts, the patches
        own = body.prompts[number].expand(len(x), -1, -1)
        tokens = block(torch.cat([tokens[:, :1], own, tokens[:, -4:]], 1))
    torch.testing.assert_close(model.features(x), base.read_out(tokens))


def test_dropout_of_prompts_draws_a_mask_for_each_image(sites):
    model = copy.deepcopy(sites("shallow").model).train()
    seen = []
    model.body.base.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 1:5]))
    torch.manual_seed(0)
    model(images(sites("shallow")))
    dropped = seen[0] == 0
    assert bool(dropped.any()) and not torch.equal(dropped, dropped[:1].expand_as(dropped))
    kept = (model.body.prompts[0] / 0.9).expand_as(seen[0])
    torch.testing.assert_close(seen[0][~dropped], kept[~dropped])


def test_shallow_prompts_are_those_of_the_zoo_and_none_are_the_plain_model(sites, tmp_path):
    model = stirred(sites("shallow").model)
    x = images(sites("shallow"))
    zoo = model.body.base.model
    torch.testing.assert_close(model.features(x), zoo.features(x, model.body.prompts[0]))
    (tmp_path / "none.yaml").write_text(SCENARIO)
    none = site_of(tmp_path / "none.yaml", ["trainer.kind=prompt", "trainer.prompts=0"])
    assert torch.equal(none.model.eval().features(x), none.model.body.base.model.features(x))


def test_prompts_start_in_the_published_range(sites):
    prompts = trained(site_of_fresh(sites("deep")))["body.prompts"].detach()
    limit = (6 / (1 * 4 * 4 + WIDTH)) ** 0.5
    assert float(prompts.abs().max()) <= limit
    assert float(prompts.std()) == pytest.approx(limit / 3**0.5, rel=0.15)


def site_of_fresh(site) -> nn.Module:
    torch.manual_seed(1)
    return site.trainer.build()


# -- folding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["lora", "lora-a", "ssf"])
def test_a_folded_model_is_the_plain_one_with_the_same_answers(sites, recipe):
    model, x = stirred(sites(recipe).model), images(sites(recipe))
    with torch.no_grad():
        expected, plain = model(x), sites("linear").model.eval()(x)
        folded = _parameter.merged(copy.deepcopy(model))
        torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert {type(m) for m in folded.modules()} == {type(m) for m in sites("linear").model.modules()}
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in sites("linear").model.parameters())


def test_lora_leaves_the_keys_alone_and_follows_its_equation():
    linear, x = nn.Linear(6, 18), torch.randn(3, 5, 6)
    lora = _parameter.Lora(linear, rank=2, alpha=6.0)
    with torch.no_grad():
        lora.b.normal_()
        q, k, v = (lora(x) - linear(x)).chunk(3, -1)
        torch.testing.assert_close(q, 3 * x @ (lora.b[0] @ lora.a[0]).T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v, 3 * x @ (lora.b[1] @ lora.a[1]).T, rtol=1e-4, atol=1e-5)
    assert not k.any()


@pytest.mark.parametrize("recipe", ["lora", "lora-a"])
def test_averages_of_what_is_sent_are_those_of_the_folded_weights_only_under_one_a(sites, recipe):
    """Two clients train from the same start, and the cloud averages what they send."""
    site = sites(recipe)
    first = records_of(site)
    sent, folded = [], []
    for client in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(client)
            site.load(first, {})
            site.trainer.fit(site.model, site.federation.client(client), {}, Turn(2, 4, client, 2, generator(client)))
        sent.append(records_of(site))
        folded.append(projections(site.model))
    assert not torch.equal(folded[0], folded[1])
    site.load({name: (values + sent[1][name]) / 2 for name, values in sent[0].items()}, {})
    apart = float((projections(site.model) - (folded[0] + folded[1]) / 2).abs().max())
    moved = float((folded[0] - folded[1]).abs().max())
    assert apart < 1e-6 if recipe == "lora" else apart > 1e-3 * moved > 1e-6
    site.load(first, {})


def records_of(site) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in site.trainer.shared(site.model).items()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def projections(model: nn.Module) -> torch.Tensor:
    """Return the folded weights of every block's projection to q, k and v."""
    return torch.stack([block.attn.qkv.folded().weight.detach() for block in model.body.blocks])


# -- remapping --------------------------------------------------------------------------------------------


def test_the_gates_closed_forms(sites):
    model, x = stirred(sites("side").model), images(sites("side"))
    base, body = model.body.base, model.body
    with torch.no_grad():
        body.gate.zero_()
        torch.testing.assert_close(body(x), (base(x) + body.side(x)) / 2)
        body.gate.fill_(50.0)
        assert torch.equal(body(x), base(x))
    ladder = copy.deepcopy(sites("ladder").model).body
    with torch.no_grad():
        ladder.gates.zero_()
        assert float(ladder.gate(0)) == 0.5
        ladder.gates.fill_(0.1)
        assert float(ladder.gate(1)) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))))


def test_the_ladder_keeps_nothing_of_the_encoder_for_backward(sites):
    site = sites("ladder")
    x = images(site, 32)
    kept = {}
    for recipe in ("ladder", "lora", "full"):
        model = sites(recipe).model.train()
        kept[recipe] = bytes_alive(lambda m=model: m(x).sum())
    assert kept["ladder"] < kept["lora"] <= kept["full"]
    states = []
    hook = site.model.body.base.blocks[0].register_forward_hook(lambda _, __, out: states.append(out))
    F.cross_entropy(site.model(x), torch.zeros(32, dtype=torch.long)).backward()
    hook.remove()
    assert not states[0].requires_grad
    assert all(p.grad is None for p in site.model.body.base.parameters())
    site.model.zero_grad(set_to_none=True)


# -- the base ---------------------------------------------------------------------------------------------


def test_every_side_builds_the_same_base_on_any_number_of_threads(tmp_path):
    from trellis_clients.trainers.tuning import _base

    (tmp_path / "base.yaml").write_text(SCENARIO)
    first = site_of(tmp_path / "base.yaml").model.state_dict()
    _base._TRAINED.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second = site_of(tmp_path / "base.yaml").model.state_dict()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(values, second[name]) for name, values in first.items())


def test_pretraining_has_learnt_the_base_digits(tmp_path):
    from trellis_clients.trainers.tuning import _base

    (tmp_path / "base.yaml").write_text(SCENARIO)
    site = site_of(tmp_path / "base.yaml", ["trainer.base.epochs=12", "data.rotations=false"])
    data = site.trainer.task.splits["base"]
    batch = data.batch(torch.arange(len(data)))
    fresh = site_of(tmp_path / "base.yaml", ["trainer.base.epochs=0", "data.rotations=false"])
    errors = []
    for each in (site, fresh):  # of a linear fit by least squares on the features
        with torch.no_grad():
            z = each.model.body.base(batch.x) if hasattr(each.model.body, "base") else each.model.features(batch.x)
        z = torch.cat([z, torch.ones(len(z), 1)], 1)
        fit = torch.linalg.lstsq(z, F.one_hot(batch.y).float()).solution
        errors.append(float(((z @ fit).argmax(1) != batch.y).float().mean()))
    assert errors[0] < 0.5 * errors[1]
    assert _base._TRAINED


def test_weights_come_from_a_file_without_its_head(sites, tmp_path):
    source = sites("linear").model.body.model
    weights = {name: values.clone() for name, values in source.state_dict().items()}
    save_file(
        {**weights, "head.weight": torch.zeros(3, WIDTH), "head.bias": torch.zeros(3)}, tmp_path / "base.safetensors"
    )
    (tmp_path / "file.yaml").write_text(
        SCENARIO.replace("base: {epochs: 1}", f"base: {{weights: {tmp_path}/base.safetensors}}")
    )
    loaded = site_of(tmp_path / "file.yaml", ["trainer.kind=linear"]).model
    assert all(torch.equal(values, loaded.body.model.state_dict()[name]) for name, values in weights.items())
    with pytest.raises(DataError, match=r"trainer\.base\.weights"):
        site_of(tmp_path / "file.yaml", ["trainer.base.weights=nowhere.safetensors"])


def test_mistakes_are_named(tmp_path):
    (tmp_path / "bad.yaml").write_text(SCENARIO)
    with pytest.raises(TrellisError, match="takes a vision transformer"):
        site_of(tmp_path / "bad.yaml", ["model=mlp"])
    with pytest.raises(TrellisError, match="no stream 'base'"):
        site_of(tmp_path / "bad.yaml", ["data=digits"])


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(sites):
    trainer = sites("linear").trainer  # warms up for a tenth of the rounds
    rates = [trainer.rate(Turn(number, 40, 0, 2, generator(0))) for number in range(1, 41)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    for number, rate in enumerate(rates[4:]):
        assert rate == pytest.approx((1 + math.cos(math.pi * number / 36)) / 2)
    assert 0 < rates[-1] < 0.01
    one = [trainer.rate(Turn(number, 2, 0, 2, generator(0))) for number in (1, 2)]
    assert one == pytest.approx([1.0, (1 + math.cos(math.pi * 4 / 9)) / 2])  # a warm-up shorter than a round is none
    sent = sites("linear").trainer.optimizer(sites("linear").model, Turn(2, 40, 0, 2, generator(0)))
    assert [group["lr"] for group in sent.param_groups] == pytest.approx([0.5 * trainer.config.lr] * 2)


@pytest.mark.parametrize("recipe", ["deep", "parallel", "lora", "ssf", "ladder"])
def test_timms_transformers_are_taken_too(tmp_path, recipe):
    (tmp_path / "timm.yaml").write_text(SCENARIO.replace("epochs: 1", "epochs: 0"))
    options = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, init_values: 0.1}"
    overrides = [f"model={{name: timm, model: vit_tiny_patch16_224, options: {options}}}", *RECIPES[recipe]]
    site = site_of(tmp_path / "timm.yaml", overrides)
    count = COUNTS[recipe] + HEAD
    if recipe == "ladder":
        assert sum(p.numel() for p in trained(site.model).values()) == count
    x = images(site)
    timm = site.trainer.task.model()
    with torch.no_grad():
        encoder = site_of(tmp_path / "timm.yaml", [*overrides, "trainer.kind=linear"]).model.eval()
        assert torch.equal(encoder.features(x), encoder.body.body(x))  # taken apart and put together again
        model = site.model.eval()
        if recipe in ("parallel", "lora", "ssf"):
            assert torch.equal(model.features(x), encoder.features(x))
        if recipe in ("lora", "ssf"):
            changed = stirred(model)
            torch.testing.assert_close(_parameter.merged(copy.deepcopy(changed))(x), changed(x), rtol=1e-4, atol=1e-5)
    assert type(timm.body).__name__ == "VisionTransformer"
    metrics, _ = fitted(site)
    assert metrics["loss"] > 0


# -- federation -------------------------------------------------------------------------------------------


def test_the_base_never_travels_or_travels_once(tmp_path):
    alike, _ = run(tmp_path, text=SCENARIO)
    sent, outcome = run(tmp_path, ("trainer.base.sent=true", "strategy=partial"), SCENARIO)
    assert not outcome.failed, outcome.failed
    rows, once = lines(alike), lines(sent)
    tuned = 4 * (DEPTH * 4 * WIDTH + HEAD)
    assert all(tuned <= row["bytes_up"] / 2 < 2 * tuned for row in rows[1:])
    assert once[1]["bytes_down"] > 10 * once[2]["bytes_down"]
    assert once[2]["bytes_down"] < rows[2]["bytes_down"] + 1000  # what the strategy says of it; the base has 17 kB
    assert [row["bytes_up"] for row in once[2:]] == [row["bytes_up"] for row in rows[2:]]
    assert once[-1]["central"] == rows[-1]["central"]


@pytest.mark.parametrize("personal", ["head", "tuned"])
def test_what_is_personal_stays_over_rounds_and_survives_a_restart(tmp_path, personal):
    text = SCENARIO.replace("batch_size: 16", f"batch_size: 16, personal: {personal}")
    assert resumed(tmp_path, text) == sha(tmp_path, text=text)
    (tmp_path / "personal.yaml").write_text(text)
    site, states = site_of(tmp_path / "personal.yaml"), ({}, {})
    heads = {"head.weight", "head.bias"}
    own = heads if personal == "head" else set(trained(site.model)) - heads
    assert own and set(site.trainer.shared(site.model)) == set(trained(site.model)) - own
    common = records_of(site)
    for number in (1, 2):
        for client, state in enumerate(states):
            turn = Turn(number, 4, client, 2, generator(client), received={"arrays": common})
            before = {name: values.clone() for name, values in state.get(KEPT, {}).items()}
            site.load(common, state)  # after another client's turn, its own is back
            live = site.model.state_dict()
            assert all(torch.equal(live[name], values) for name, values in {**common, **before}.items())
            site.train(turn, state)
            assert set(state[KEPT]) == own
            assert not before or any(not torch.equal(state[KEPT][name], values) for name, values in before.items())
    assert any(not torch.equal(values, states[1][KEPT][name]) for name, values in states[0][KEPT].items())


@pytest.mark.parametrize("recipe", ["deep", "lora", "ladder"])
def test_a_run_resumes_to_the_same_bits(tmp_path, recipe):
    overrides = dict(entry.removeprefix("trainer.").split("=") for entry in RECIPES[recipe])
    text = SCENARIO.replace("batch_size: 16", "batch_size: 16, " + ", ".join(f"{k}: {v}" for k, v in overrides.items()))
    assert resumed(tmp_path, text) == sha(tmp_path, text=text)


def test_the_data_set_is_cut_by_digits():
    each = from_mapping({"name": "data", "data": {"name": "novel-digits", "per_class": 7}})
    data, other = load_data(each, 0), load_data(each, 1)
    assert data.classes == ("5", "6", "7", "8", "9") and len(data.train) == 35
    assert torch.bincount(data.train.fields["y"]).tolist() == [7] * 5
    base = data.splits["base"]
    assert len(base) == 4 * 901 and data.facts["base_classes"] == 20
    assert torch.equal(base.fields["x"][901:1802], torch.rot90(base.fields["x"][:901], 1, (2, 3)))
    assert torch.equal(base.fields["y"][901:1802], base.fields["y"][:901] + 1)
    assert torch.equal(data.test.fields["x"], other.test.fields["x"])
    assert not torch.equal(data.train.fields["x"], other.train.fields["x"])  # which labels there are is drawn
    assert registry.load("datasets", "novel-digits").__doc__


def test_bases_and_targets_are_chosen_and_share_no_test_digit_with_validation():
    plain = {"name": "novel-digits", "per_class": 7, "client_digits": [8, 9]}
    small, large = (
        load_data(from_mapping({"name": "data", "data": {**plain, "base_digits": base}}), 0)
        for base in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7])
    )
    assert small.classes == large.classes == ("8", "9") and large.facts["base_classes"] == 32
    for name in ("train", "test"):  # the same scans of the same digits; only what they are standardised by differs
        one, other = (raw(each, getattr(each, name)) for each in (small, large))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    tuning = load_data(from_mapping({"name": "data", "data": {**plain, "judged_on": "validation"}}), 0)
    assert len(tuning.test) == len(small.test)
    parts = [
        {image.numpy().tobytes() for image in raw(each, split).round(decimals=3)}
        for each, split in ((small, small.test), (tuning, tuning.test), (tuning, tuning.train))
    ]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    with pytest.raises(TrellisError, match="digit 4 stands twice"):
        scenario.check(from_mapping({"name": "data", "data": {"name": "novel-digits", "client_digits": [4, 9]}}))


def raw(data, split) -> torch.Tensor:
    return split.batch(torch.arange(len(split))).x * data.facts["std"][0] + data.facts["mean"][0]
