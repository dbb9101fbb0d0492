"""Factories make the networks they promise; shipped networks are the ones on their cards."""

import json
import shutil

import pytest
import torch

import resens_fast as rf
from resens_fast.errors import ModelError
from resens_fast.models import highway, resnet, vgg, zoo
from resens_fast.training import measure

SHIPPED = (
    "highway32-cifar10",
    "resnet110-cifar10",
    "resnet20-digits",
    "resnet56-cifar10",
    "resnet56-sampled-cifar10",
    "resnet56-stochastic-cifar10",
    "vgg15-cifar10",
)


def layers(model):
    """Weighted layers on the longest path: convolutions and linear layers, without shortcuts and gates."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    return sum(
        isinstance(m, kinds)
        for name, m in model.named_modules()
        if not name.endswith(("shortcut", "shortcut.0", "gate"))
    )


@pytest.mark.parametrize("preactivation", [True, False])
@pytest.mark.parametrize(
    ("depth", "bottleneck", "blocks"), [(8, None, 3), (20, None, 9), (110, None, 54), (20, True, 6), (29, None, 9)]
)
def test_resnet_has_the_depth_it_is_named_after(depth, bottleneck, blocks, preactivation):
    model = resnet(depth, preactivation=preactivation, bottleneck=bottleneck)
    assert layers(model) == depth
    assert len(model.blocks) == blocks


@pytest.mark.parametrize("option", ["projection", "pad"])
@pytest.mark.parametrize("preactivation", [True, False])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_resnet_halves_the_image_and_doubles_the_channels_twice(option, preactivation, bottleneck):
    model = resnet(
        20, preactivation=preactivation, bottleneck=bottleneck, option=option, classes=7, width=8, in_channels=2
    ).eval()
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.randn(3, 2, 16, 16)).shape == (3, 7)
    widths = [8, 16, 32] if not bottleneck else [32, 64, 128]
    per_stage = len(model.blocks) // 3
    assert shapes == [(w, s, s) for w, s in zip(widths, (16, 8, 4), strict=True) for _ in range(per_stage)]


def test_preactivation_transition_projects_the_activated_input():
    block = resnet(8).blocks[1].eval()
    x = torch.randn(2, 16, 8, 8)
    h = torch.relu(block.bn1(x))
    branch = block.conv2(torch.relu(block.bn2(block.conv1(h))))
    torch.testing.assert_close(block(x), branch + block.shortcut(h))
    assert not torch.allclose(block(x), branch + block.shortcut(x))


def test_pad_shortcut_puts_zeros_on_both_sides():
    block = resnet(8, preactivation=False, option="pad").blocks[1]
    out = block.shortcut(torch.ones(1, 16, 4, 4))
    assert out.shape == (1, 32, 2, 2)
    assert out[0, :, 0, 0].tolist() == [0.0] * 8 + [1.0] * 16 + [0.0] * 8


@pytest.mark.parametrize("batch_norm", [True, False])
def test_vgg15_has_thirteen_equal_convolutions_and_two_linear_layers(batch_norm):
    model = vgg(15, batch_norm=batch_norm, width=24, classes=5, in_channels=1).eval()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert layers(model) == 15
    assert {(c.in_channels, c.out_channels) for c in convolutions[1:]} == {(24, 24)}
    assert len(convolutions) == 13
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == batch_norm
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_highway_begins_near_the_identity_and_follows_its_formula():
    model = highway(20, in_channels=1).eval()
    assert layers(model) == 20
    block = model.blocks[1]
    x = torch.randn(2, 16, 8, 8)
    t = torch.sigmoid(block.gate(x))
    f = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
    torch.testing.assert_close(block(x), t * f + (1 - t) * x)
    assert t.mean() < 0.3


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: resnet(21), ["21", "6n+2", "20"]),
        (lambda: resnet(32, bottleneck=True), ["32", "9n+2", "29"]),
        (lambda: resnet(2), ["2", "8"]),
        (lambda: resnet(-4), ["-4", "8"]),
        (lambda: resnet(20, option="C"), ["'C'", "projection", "pad"]),
        (lambda: resnet(20, classes=0), ["0"]),
        (lambda: vgg(16), ["16", "15"]),
        (lambda: highway(19), ["19", "20"]),
        (lambda: rf.models.load("resnet56"), ["'resnet56'", "resnet110-cifar10"]),
        (lambda: rf.models.card("alexnet"), ["'alexnet'", "resnet20-digits"]),
        (lambda: rf.models.build({"factory": "mine:net", "arguments": {}}), ["mine:net", "resnet"]),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(make, names):
    with pytest.raises(ModelError) as raised:
        make()
    assert all(name in str(raised.value) for name in names)
    assert "\n" not in str(raised.value)


def test_shipped_names_and_size():
    assert rf.models.names() == sorted(SHIPPED)
    assert sum(path.stat().st_size for path in zoo.WEIGHTS.iterdir()) < 20e6


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_network_is_the_one_on_its_card(name):
    card = rf.models.card(name)
    model = rf.models.load(name)
    assert not model.training
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert model(torch.zeros(1, *card["input_shape"])).shape == (1, len(card["classes"]))
    assert card["error"] == card["errors"] / card["test_images"]
    assert {"data", "mean", "std", "recipe", "license", "date", "commit", "name"} <= card.keys()
    assert "/root" not in json.dumps(card)
    stored = {value.dtype for key, value in read(name).items() if key.endswith("weight") and value.ndim > 1}
    assert stored == {torch.float16}


def read(name):
    from safetensors.torch import load_file

    return load_file(str(zoo.WEIGHTS / f"{name}.safetensors"))


def test_digits_network_reaches_the_error_on_its_card():
    card = rf.models.card("resnet20-digits")
    test = rf.data.open("digits", card=card)
    assert len(test) == card["test_images"] == 500
    assert measure(rf.models.load("resnet20-digits"), test).errors == card["errors"] < 10


@pytest.mark.parametrize(
    ("name", "kind", "count", "transitions"),
    [
        ("highway32-cifar10", "highway", 15, [5, 10]),
        ("resnet110-cifar10", "basic_preact", 54, [18, 36]),
        ("resnet20-digits", "basic_preact", 9, [3, 6]),
        ("resnet56-cifar10", "basic_preact", 27, [9, 18]),
        ("resnet56-sampled-cifar10", "basic_preact", 27, [9, 18]),
        ("resnet56-stochastic-cifar10", "basic_preact", 27, [9, 18]),
        ("vgg15-cifar10", "plain", 12, [0, 2, 5, 8]),
    ],
)
def test_shipped_network_wraps(name, kind, count, transitions):
    card = rf.models.card(name)
    net = rf.wrap(rf.models.load(name), example=torch.randn(2, *card["input_shape"]))
    assert {block.kind for block in net.blocks} == {kind}
    assert len(net.blocks) == count
    assert [block.index for block in net.blocks if block.is_transition] == transitions
    assert all(block.deletable for block in net.blocks)


def test_highway_wraps():
    net = rf.wrap(highway(14), example=torch.randn(2, 3, 16, 16))
    assert [block.kind for block in net.blocks] == ["highway"] * 6


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The shipped files of the smallest network in a folder where they may be damaged."""
    for path in zoo.WEIGHTS.glob("resnet20-digits.*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    rf.models.load("resnet20-digits")
    return tmp_path


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [damage_end, damage_middle, lambda path: path.write_bytes(b""), lambda path: path.unlink()]
)
def test_damaged_weights_are_named(copied, damage):
    damage(copied / "resnet20-digits.safetensors")
    with pytest.raises(ModelError, match=r"resnet20-digits\.safetensors.*install the package again"):
        rf.models.load("resnet20-digits")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"factory": "resnet"}'])
def test_damaged_card_is_named(copied, content):
    (copied / "resnet20-digits.json").write_text(content)
    with pytest.raises(ModelError, match=r"resnet20-digits\.json"):
        rf.models.load("resnet20-digits")


def test_packing_keeps_batch_norm_in_float32_and_everything_else_close():
    state = resnet(8).state_dict()
    packed = zoo.pack(state)
    assert packed["conv.weight"].dtype == packed["fc.weight"].dtype == torch.float16
    assert packed["bn.running_var"].dtype == packed["fc.bias"].dtype == torch.float32
    back = zoo.unpack(packed)
    assert back.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(back[key], value, rtol=1e-3, atol=1e-6)
