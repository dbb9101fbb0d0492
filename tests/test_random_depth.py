"""Training with random blocks: draws, survival, the plain network at the end, resuming, the command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resens_fast as rf
from resens_fast.errors import ModelError
from resens_fast.training import Recipe, measure, sample_blocks, stochastic_depth, train
from tests import styles
from tests.test_cli import call, refused
from tests.test_training import Stop

RECIPE = Recipe(epochs=3, batch=32, learning_rate=0.1, crop=1, flip=False, dtype="float32")
CARD = {"name": "small", "factory": "resnet", "arguments": {"depth": 14, "width": 8, "in_channels": 1}}


@pytest.fixture(scope="module")
def sets() -> tuple[Any, Any]:
    return rf.data.open("digits", train=True, limit=128), rf.data.open("digits", limit=100)


def network(seed: int = 0, depth: int = 14, **options: Any) -> rf.ResidualNetwork:
    torch.manual_seed(seed)
    return rf.wrap(rf.models.resnet(depth, width=8, in_channels=1, **options), torch.zeros(1, 1, 8, 8))


def double(kind: Any) -> rf.ResidualNetwork:
    torch.manual_seed(0)
    return rf.wrap(styles.randomise(styles.Network(kind)).double(), torch.zeros(1, 3, 16, 16))


def test_sampled_masks_have_k_blocks_and_all_blocks_their_turn() -> None:
    torch.manual_seed(0)
    forward = sample_blocks(23)
    draws = torch.stack([forward.draw(54) for _ in range(2000)])
    assert draws.dtype == torch.bool
    assert (draws.sum(1) == 23).all()
    share = draws.double().mean(0)
    assert float((share - 23 / 54).abs().max()) < 5 * (0.43 * 0.57 / 2000) ** 0.5
    assert len(set(map(tuple, draws.tolist()))) > 1990
    assert forward.survival(54).tolist() == [23 / 54] * 54


def test_stochastic_depth_survives_by_linear_decay() -> None:
    torch.manual_seed(0)
    forward = stochastic_depth(0.5)
    p = forward.survival(54)
    assert p[53] == 0.5
    assert p[26] == 0.75
    assert float(p[0]) == pytest.approx(1 - 0.5 / 54)
    share = torch.stack([forward.draw(54) for _ in range(4000)]).double().mean(0)
    assert float((share - p).abs().max()) < 5 * (0.25 / 4000) ** 0.5
    assert bool(stochastic_depth(1).draw(54).all())
    assert not stochastic_depth(0).draw(54)[53]


def test_every_batch_runs_its_own_draw_and_the_seed_repeats_it() -> None:
    net, x = network().train(), torch.randn(4, 1, 8, 8)
    runs: Counter[int] = Counter()
    for block in net.blocks:
        net.get_submodule(block.name).conv2.register_forward_hook(lambda *_, i=block.index: runs.update([i]))
    forward, logits = sample_blocks(2), []
    for seed in (1, 1, 2, 3, 4, 5):
        torch.manual_seed(seed)
        before = runs.total()
        logits.append(forward(net, x))
        assert runs.total() == before + 2
    assert torch.equal(logits[0], logits[1])
    assert len(runs) > 2


@pytest.mark.parametrize("forward", [sample_blocks(4), stochastic_depth(0.3)], ids=["sampled", "stochastic"])
@pytest.mark.parametrize(
    "kind", [styles.PaddedBlock, styles.ProjectedBlock, styles.RawProjectionBlock, styles.FunctionBottleneck]
)
@torch.no_grad()
def test_the_plain_network_is_the_one_under_survival_gates(kind: Any, forward: Any) -> None:
    net = double(kind)
    before = net.fingerprint()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    plain = forward.plain(net)
    torch.testing.assert_close(plain.model(x), forward(net, x), rtol=1e-9, atol=1e-9)
    by_hand, state = forward.survival(6), net.stem(x)
    for block, p in zip(net.blocks, by_hand.tolist(), strict=True):
        inner = block.prologue(state)
        state = block.closing(block.shortcut(inner) + p * block.branch(inner))
    torch.testing.assert_close(plain.model(x), net.head(state), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain.model(x), net.model(x))
    assert net.fingerprint() == before
    # A lesion of it is a lesion of the gated network.
    mask = torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(plain(x, mask=mask), net(x, mask=mask * by_hand), rtol=1e-9, atol=1e-9)


class Dropped(styles.RawProjectionBlock):
    """Ends in dropout, and the norm in front of it has no weights in the second kind."""

    affine = True

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__(i, o, stride)
        self.last = nn.Sequential(nn.BatchNorm2d(o, affine=self.affine), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        s = x if self.downsample is None else self.downsample(x)
        return s + self.last(self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x)))))))


class NoWeights(Dropped):
    affine = False


class Shared(nn.Module):
    """Two blocks whose branches end in one convolution."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.conv = styles.conv3(3, 4)
        self.first, self.second = (nn.Sequential(styles.conv3(4, 4), nn.ReLU(), styles.conv3(4, 4)) for _ in range(2))
        if tied:
            self.second[2].weight = self.first[2].weight
        else:
            self.second[2] = self.first[2]
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.fc(x.mean((2, 3)))


class Looped(Shared):
    """One branch that runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for _ in range(2):
            x = x + self.first(x)
        return self.fc(x.mean((2, 3)))


def test_branches_that_cannot_take_up_a_number_are_refused() -> None:
    example = torch.zeros(1, 3, 16, 16)
    net, x = rf.wrap(styles.Network(Dropped).eval(), example), torch.randn(2, 3, 16, 16)
    forward = stochastic_depth(0.5)
    with torch.no_grad():
        torch.testing.assert_close(forward.plain(net).model(x), forward(net, x), rtol=1e-4, atol=1e-4)
    for model in (styles.Network(NoWeights).eval(), styles.Network(styles.HighwayBlock).eval()):
        with pytest.raises(ModelError, match=r"branch of block 0 \(layer1\.0\) does not end in a convolution"):
            forward.plain(rf.wrap(model, example))
    normed = styles.Network(styles.RawProjectionBlock).eval()
    nn.utils.parametrizations.weight_norm(normed.layer1[0].conv2)
    with pytest.raises(ModelError, match="does not end in a convolution"):
        forward.plain(rf.wrap(normed, example))
    for model in (Shared(False), Shared(True), Looped(False)):
        if isinstance(model, Looped):
            del model.second
        with pytest.raises(ModelError, match="is used more than once"):
            forward.plain(rf.wrap(model.eval(), example))


def test_wrong_numbers_and_networks_are_refused() -> None:
    for k in (0, -1, 2.5, True, "3"):
        with pytest.raises(ModelError, match="whole number of 1 or more, not"):
            sample_blocks(k)  # type: ignore[arg-type]
    for p in (-0.1, 1.1, float("nan"), "0.5", None):
        with pytest.raises(ModelError, match="between 0 and 1, not"):
            stochastic_depth(p)  # type: ignore[arg-type]
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ModelError, match="cannot sample 7 blocks of a network that has 6"):
        sample_blocks(7)(network(), x)
    with pytest.raises(ModelError, match=r"not in a ResNet: call resens_fast\.wrap"):
        sample_blocks(2)(network().model, x)
    vgg = rf.wrap(styles.randomise(styles.sequential_vgg()), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ModelError, match="has no shortcut beside its branch"):
        stochastic_depth(0.5)(vgg, torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("forward", [sample_blocks(3), stochastic_depth(0.5)], ids=["sampled", "stochastic"])
def test_resumed_training_ends_as_the_uninterrupted_one(sets: Any, tmp_path: Path, forward: Any) -> None:
    whole = network()
    history = train(whole, *sets, tmp_path / "whole", RECIPE, forward=forward, progress=False, card=CARD).history

    def interrupt(epoch: int, step: int, _loss: float) -> None:
        if (epoch, step) == (1, 2):
            raise Stop

    def run(net: rf.ResidualNetwork, **options: Any) -> Any:
        return train(net, *sets, tmp_path / "parts", RECIPE, forward=forward, progress=False, **options)

    with pytest.raises(Stop):
        run(network(), callback=interrupt)
    resumed = network(seed=9)
    rows = run(resumed, resume=True).history
    assert [r["test_loss"] for r in rows] == [r["test_loss"] for r in history]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    again = network(seed=5)  # after the end, resuming folds the same numbers once more into the checkpoint's weights
    run(again, resume=True)
    assert again.fingerprint() == whole.fingerprint()
    with pytest.raises(ModelError, match=r"was trained with (sample_blocks|stochastic_depth) = .*, not None"):
        train(network(), *sets, tmp_path / "parts", RECIPE, progress=False, resume=True)
    with pytest.raises(ModelError, match=r"sample_blocks = (3|None), not 2"):
        train(network(), *sets, tmp_path / "parts", RECIPE, forward=sample_blocks(2), progress=False, resume=True)


@pytest.mark.parametrize("forward", [sample_blocks(3), stochastic_depth(0.5)], ids=["sampled", "stochastic"])
def test_what_is_measured_and_loaded_is_the_gated_network(sets: Any, tmp_path: Path, forward: Any) -> None:
    net = network()
    result = train(net, *sets, tmp_path, RECIPE, forward=forward, progress=False, card=CARD)
    raw = network(seed=3)
    raw.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = raw

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, mask=forward.survival(6))

    gated, loaded = measure(Gated(), sets[1]), measure(rf.models.load(str(tmp_path)), sets[1])
    assert loaded.loss == pytest.approx(gated.loss, rel=1e-4)
    assert loaded.loss == pytest.approx(result.history[-1]["test_loss"], rel=1e-6)
    assert loaded.error == result.error
    assert measure(raw.model, sets[1]).loss != pytest.approx(gated.loss, rel=1e-3)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["recipe"].items() >= forward.about.items()
    assert card["error"] == loaded.error
    study = rf.evaluate(rf.wrap(rf.models.load(str(tmp_path))), rf.sweeps.intact(net), sets[1], progress=False)
    assert study.frame["errors"][0] == loaded.errors


def test_a_network_that_cannot_be_trained_so_leaves_no_folder(sets: Any, tmp_path: Path) -> None:
    def attempt(net: nn.Module, forward: Any, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            train(net, *sets, tmp_path / "out", RECIPE, forward=forward, progress=False)
        assert not (tmp_path / "out").exists()

    attempt(network(), sample_blocks(7), "cannot sample 7")
    attempt(network().model, sample_blocks(2), "wrap")
    highway = rf.wrap(rf.models.highway(8, in_channels=1, width=4), torch.zeros(1, 1, 8, 8))
    attempt(highway, stochastic_depth(0.5), "does not end in a convolution")


def test_command_line(tmp_path: Path) -> None:
    def arguments(*options: object) -> list[object]:
        small = ("--data", "digits", "--epochs", 1, "--batch", 32, "--limit-images", 64, "--dtype", "float32")
        return ["resnet8", *small, "--out", tmp_path / "net", *options]

    for options, message in (
        (("--sample-blocks", 4), "cannot sample 4 blocks of a network that has 3"),
        (("--sample-blocks", 0), "1 or more, not 0"),
        (("--stochastic-depth", 1.5), "between 0 and 1, not 1.5"),
        (("--stochastic-depth", "nan"), "between 0 and 1, not nan"),
        (("--stochastic-depth", 0.5, "--sample-blocks", 2), "give one of them"),
    ):
        assert message in refused("train", *arguments(*options))
        assert not (tmp_path / "net").exists()
    result = call("train", *arguments("--sample-blocks", 2))
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "net" / "card.json").read_text())
    assert card["recipe"]["sample_blocks"] == 2
    assert "sample_blocks = 2, not None" in refused("train", *arguments("--resume"))
    assert call("train", *arguments("--sample-blocks", 2, "--resume")).exit_code == 0
    study = ("lesion", tmp_path / "net", "--data", "digits", "--limit-images", 20, "--out", tmp_path / "study")
    assert call(*study).exit_code == 0
