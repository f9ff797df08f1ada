"""Every model takes the shapes it says, offers features and a head, and starts from the seed it is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trellis import registry, seeding
from trellis.errors import DataError, PluginError
from trellis.models import models, torchvision_shim
from trellis.models._base import Classifier

VECTOR, SMALL, LARGE = (16,), (1, 8, 8), (3, 32, 32)
CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("auto", {}, VECTOR),
    ("auto", {}, SMALL),
    ("linear", {}, LARGE),
    ("mlp", {"hidden": [32, 8]}, SMALL),
    *[
        ("small-cnn", {"norm": norm, "blocks": 3}, shape)
        for norm in ("none", "batch", "group")
        for shape in (SMALL, LARGE)
    ],
    *[("resnet", {"norm": norm, "depth": 14, "width": 4}, LARGE) for norm in ("none", "batch", "group")],
    ("resnet", {}, SMALL),
    ("four-conv", {"width": 8}, LARGE),
    ("four-conv", {"width": 8}, (1, 28, 28)),
    ("vit", {"patch": 4, "depth": 2}, SMALL),
    ("spiking-cnn", {}, SMALL),
]


def build(name: str, shape: tuple[int, ...], classes: int = 5, **params: Any) -> Classifier:
    cls = registry.load("models", name)
    model = cls(cls.Config.model_validate(params)).build(shape, classes, {})  # type: ignore[attr-defined]
    assert isinstance(model, Classifier)
    return model


def test_the_bundled_models_are_all_tested() -> None:
    assert {plugin.name for plugin in models()} == {name for name, *_ in CASES} | {"timm"}


@pytest.mark.parametrize(("name", "params", "shape"), CASES)
def test_logits_are_the_head_on_the_features(name: str, params: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = build(name, shape, **params).eval()
    x = torch.randn(3, *shape, generator=seeding.torch_generator(0))
    features, logits = model.features(x), model(x)
    assert features.shape == (3, model.head.in_features)
    assert logits.shape == (3, 5)
    assert torch.equal(model.head(features), logits)


@pytest.mark.parametrize(("name", "params", "shape"), CASES)
def test_every_weight_learns(name: str, params: dict[str, Any], shape: tuple[int, ...]) -> None:
    """A step on one batch lowers its loss, and no weight is cut off from it."""
    with seeding.scoped(3):
        model = build(name, shape, **params)
    x = torch.randn(16, *shape, generator=seeding.torch_generator(1))
    y = torch.arange(16) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(bool(p.grad is not None and p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize(("name", "params", "shape"), CASES)
def test_weights_follow_the_seed(name: str, params: dict[str, Any], shape: tuple[int, ...]) -> None:
    def weights(seed: int) -> torch.Tensor:
        with seeding.scoped(seed):
            return nn.utils.parameters_to_vector(build(name, shape, **params).parameters()).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_auto_goes_by_the_shape() -> None:
    assert type(build("auto", SMALL)) is type(build("small-cnn", SMALL))
    assert type(build("auto", VECTOR)) is type(build("mlp", VECTOR))
    assert type(build("auto", (1, 7, 8))) is type(build("mlp", VECTOR))


def test_resnet20_has_the_weights_of_the_paper() -> None:
    """Stem 432, 18 convolutions, 19 batch norms, head 650: the paper rounds it to 0.27 M (table 6)."""
    stages = 6 * 16 * 16 * 9 + (16 + 5 * 32) * 32 * 9 + (32 + 5 * 64) * 64 * 9
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    count = sum(p.numel() for p in build("resnet", LARGE, 10, depth=20).parameters())
    assert count == 3 * 16 * 9 + stages + norms + 650
    assert round(count / 1e6, 2) == 0.27


@pytest.mark.parametrize("name", ["small-cnn", "resnet"])
@pytest.mark.parametrize("shape", [VECTOR, (1, 4, 8)])
def test_models_for_images_say_what_they_take(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=name) as caught:
        build(name, shape)
    assert caught.value.code == "model-shape"
    assert str(shape) in str(caught.value)


def test_batch_statistics_are_only_where_asked_for() -> None:
    for norm, expected in (("none", False), ("group", False), ("batch", True)):
        names = [name for name, _ in build("small-cnn", SMALL, norm=norm).named_buffers()]
        assert any("running_mean" in name for name in names) == expected


def test_timm_by_name(tmp_path: Path) -> None:
    torchvision_shim.make_importable()
    timm = pytest.importorskip("timm")
    model = build("timm", LARGE, model="resnet18").eval()
    x = torch.randn(2, *LARGE)
    assert torch.equal(model.head(model.features(x)), model(x))
    from safetensors.torch import save_file

    trained = timm.create_model("resnet18", num_classes=7)
    save_file(trained.state_dict(), tmp_path / "resnet18.safetensors")
    loaded = build("timm", LARGE, model="resnet18", checkpoint=str(tmp_path / "resnet18.safetensors"))
    assert torch.equal(loaded.state_dict()["body.conv1.weight"], trained.conv1.weight)
    with pytest.raises(PluginError, match="Did you mean 'resnet18'"):
        build("timm", LARGE, model="resnet118")
    with pytest.raises(DataError, match="nothing is at"):
        build("timm", LARGE, model="resnet18", checkpoint=str(tmp_path / "gone.safetensors"))


def test_timm_refuses_names_that_would_be_downloaded() -> None:
    cls = registry.load("models", "timm")
    with pytest.raises(ValueError, match="pattern"):
        cls.Config.model_validate({"model": "hf-hub:someone/model"})  # type: ignore[attr-defined]


def test_timm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_shim, "make_importable", lambda: False)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PluginError, match="timm and torchvision") as caught:
        build("timm", LARGE, model="resnet18")
    assert caught.value.code == "model-timm"


# What torchvision does when it is imported without its compiled part: describe two operators to the compiler.
_TORCHVISION = """
import torch
from torchvision import part

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets.new_empty(0)

@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold):
    return dets.new_empty(0)
"""


def in_new_process(program: str, path: Path) -> str:
    """Run in a process of its own: operators, once declared, stay."""
    program = f"import sys; sys.path.insert(0, {str(path)!r})\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return done.stdout.strip() + done.stderr.strip().rpartition("\n")[2]


def test_torchvision_without_its_compiled_part_becomes_importable(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(_TORCHVISION)
    (tmp_path / "torchvision" / "part.py").write_text("")
    assert "operator torchvision::nms does not exist" in in_new_process("import torchvision", tmp_path)
    shim = "from trellis.models import torchvision_shim as shim\n"
    assert in_new_process(shim + "print(shim.make_importable(), shim.make_importable())", tmp_path) == "True True"


def test_torchvision_that_works_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("")
    program = (
        "from trellis.models import torchvision_shim as shim\nimport torch\n"
        "print(shim.make_importable(), hasattr(torch.ops.torchvision, 'nms'))"
    )
    assert in_new_process(program, tmp_path) == "True False"


def test_torchvision_with_another_fault_keeps_its_error(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('another fault')")
    program = "from trellis.models import torchvision_shim as shim\nshim.make_importable()"
    assert "another fault" in in_new_process(program, tmp_path)


def test_a_vision_transformer_has_the_published_number_of_weights() -> None:
    model = build("vit", (3, 224, 224), 1000, dim=768, depth=12, heads=12, patch=16, mlp_ratio=4)
    assert sum(p.numel() for p in model.parameters()) == 86_567_656  # timm's vit_base_patch16_224


def test_a_vision_transformer_with_its_weights_agrees_with_timm() -> None:
    torchvision_shim.make_importable()
    timm_layers = pytest.importorskip("timm.models.vision_transformer")
    ours = build("vit", (3, 16, 16), 5, dim=32, depth=2, heads=4, patch=4, mlp_ratio=2).eval()
    theirs = timm_layers.VisionTransformer(16, 4, 3, 5, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2).eval()
    names = {"patchify": "patch_embed.proj", "class_token": "cls_token", "positions": "pos_embed"}
    inside = {"attn.project": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    moved: dict[str, torch.Tensor] = {}
    for name, values in ours.state_dict().items():
        for old, new in {**names, **inside}.items():
            name = name.replace(old, new)
        moved[name] = values
    theirs.load_state_dict(moved)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))


def test_prompts_stand_behind_the_class_token() -> None:
    model = build("vit", (1, 8, 8), 10, dim=8, depth=1, heads=2).eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.features(x, torch.empty(0, 8)), model.features(x))
    assert not torch.allclose(model.features(x, torch.ones(3, 8)), model.features(x))


@pytest.mark.parametrize(("options", "said"), [({"patch": 3}, "divides"), ({"dim": 30}, "multiple of")])
def test_a_vision_transformer_says_what_does_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        build("vit", (1, 8, 8), 10, **options)
