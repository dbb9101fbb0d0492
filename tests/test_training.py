"""Training lowers the loss, can be stopped and resumed, and says what is wrong."""

import csv
import json

import pytest
import torch

import resens_fast as rf
from resens_fast import data
from resens_fast.errors import DataError, ModelError
from resens_fast.training import Recipe, augment, best_dtype, measure, train

RECIPE = Recipe(epochs=2, batch=32, learning_rate=0.1, crop=1, flip=False, dtype="float32")


@pytest.fixture(scope="module")
def sets():
    return data.open("digits", train=True, limit=256), data.open("digits", limit=100)


def network(seed=0):
    torch.manual_seed(seed)
    return rf.models.resnet(8, width=8, in_channels=1)


def run(sets, out, model=None, recipe=RECIPE, **options):
    return train(model or network(), *sets, out, recipe, progress=False, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_augmentation_keeps_shape_dtype_order_and_source():
    images = torch.randint(1, 256, (50, 3, 9, 7), dtype=torch.uint8)
    before = images.clone()
    out = augment(images, 2, True, generator())
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    assert torch.equal(images, before)
    shifts = set()
    for source, result in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(source, (2, 2, 2, 2))
        crops = {(y, x): padded[:, y : y + 9, x : x + 7] for y in range(5) for x in range(5)}
        places = {(*at, False) for at, crop in crops.items() if torch.equal(crop, result)}
        places |= {(*at, True) for at, crop in crops.items() if torch.equal(crop.flip(2), result)}
        assert len(places) == 1
        shifts |= places
    assert len(shifts) > 20
    assert {mirrored for *_, mirrored in shifts} == {False, True}


def test_augmentation_is_repeatable_and_can_be_off():
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment(images, 2, True, generator(1)), augment(images, 2, True, generator(1)))
    assert not torch.equal(augment(images, 2, True, generator(1)), augment(images, 2, True, generator(2)))
    assert torch.equal(augment(images, 0, False, generator()), images)
    mirrored = augment(images, 0, True, generator())
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(mirrored, images, strict=True))


def test_two_epochs_lower_the_loss_and_leave_everything(sets, tmp_path):
    model = network()
    before = measure(model, sets[1])
    losses = []
    result = run(
        sets,
        tmp_path / "run",
        model,
        callback=lambda epoch, step, loss: losses.append((epoch, step, loss)),
        card={"name": "small", "factory": "resnet", "arguments": {"depth": 8, "width": 8, "in_channels": 1}},
    )
    after = measure(model, sets[1])
    assert after.loss < before.loss
    assert [(e, s) for e, s, _ in losses] == [(e, s) for e in range(2) for s in range(8)]
    assert sum(loss for *_, loss in losses[-4:]) < sum(loss for *_, loss in losses[:4])
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["test_error"]) == result.error == after.error
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert (card["errors"], card["test_images"], card["train_images"]) == (after.errors, 100, 256)
    assert card["recipe"]["epochs"] == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "card.json",
        "checkpoint.pt",
        "metrics.csv",
        "weights.safetensors",
    ]
    loaded = rf.models.load(str(tmp_path / "run"))
    assert measure(loaded, data.open("digits", card=rf.models.card(str(tmp_path / "run")), limit=100)) == after


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stop])
def test_resumed_training_ends_as_the_uninterrupted_one(sets, tmp_path, stop):
    recipe = Recipe(epochs=3, batch=32, learning_rate=0.1, crop=1, flip=True, dtype="float32")
    whole = network()
    run(sets, tmp_path / "whole", whole, recipe)

    def interrupt(epoch, step, _loss):
        if (epoch, step) == (1, 3):
            raise stop

    with pytest.raises(stop):
        run(sets, tmp_path / "parts", network(), recipe, callback=interrupt)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["history"][-1]["epoch"] == 1
    assert not (tmp_path / "parts" / "card.json").exists()
    with pytest.raises(ModelError, match="has not ended"):
        rf.models.load(str(tmp_path / "parts"))
    with pytest.raises(ModelError, match="already holds a training run"):
        run(sets, tmp_path / "parts", network(), recipe)
    resumed = network(seed=99)
    history = run(sets, tmp_path / "parts", resumed, recipe, resume=True).history
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_resume_without_a_run_begins_one_and_after_the_end_changes_nothing(sets, tmp_path):
    model, again = network(), network(seed=5)
    run(sets, tmp_path, model, resume=True)
    run(sets, tmp_path, again, resume=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_interrupted_writing_leaves_the_last_checkpoint(sets, tmp_path, monkeypatch):
    save = torch.save

    def full(state, path):
        save(state, path)
        if len(state["history"]) == 2:
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ModelError, match="No space left"):
        run(sets, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.csv"]
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]) == 1


def test_forward_can_be_replaced(sets, tmp_path):
    calls = []

    def forward(model, images):
        calls.append(model.training)
        return model(images)

    run(sets, tmp_path, forward=forward)
    assert calls == [True] * 16


def test_bfloat16_autocast_trains(sets, tmp_path):
    result = run(
        sets, tmp_path, recipe=Recipe(epochs=1, batch=64, learning_rate=0.05, flip=False, crop=0, dtype="bfloat16")
    )
    assert json.loads((tmp_path / "card.json").read_text())["recipe"]["dtype"] == "bfloat16"
    assert result.history[0]["train_loss"] < 3
    # What is reported is what the weights answer in float32, as a lesion does; the epoch was measured in bfloat16.
    assert result.final is not None
    assert result.error == json.loads((tmp_path / "card.json").read_text())["error"] == result.final.error
    assert best_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_infinite_loss_stops_with_a_sentence(sets, tmp_path):
    with pytest.raises(ModelError, match=r"loss is (nan|inf) in epoch 1, step 3.*learning rate"):
        run(sets, tmp_path, forward=bad_forward())
    assert not list(tmp_path.iterdir())


def bad_forward():
    steps = iter(range(100))
    return lambda model, images: model(images) * (float("nan") if next(steps) == 2 else 1.0)


def test_non_finite_logits_count_as_errors(sets):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.right = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            logits = torch.zeros(len(x), 10)
            logits[:, 0] = float("inf")
            return logits

    assert measure(Broken(), sets[1]).errors == 100


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup": 1.0},
        {"crop": -1},
        {"dtype": "int8"},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"seed": -1},
    ],
)
def test_bad_recipes_name_the_value(options):
    with pytest.raises(ModelError) as raised:
        Recipe(**options)
    assert str(next(iter(options.values()))) in str(raised.value)


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:1000], lambda c: b"hello"])
def test_damaged_checkpoint_is_named(sets, tmp_path, damage):
    run(sets, tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=r"checkpoint\.pt is damaged"):
        run(sets, tmp_path, resume=True)


def test_resuming_something_else_is_refused(sets, tmp_path):
    run(sets, tmp_path)
    with pytest.raises(ModelError, match=r"learning_rate = 0\.1, not 0\.2"):
        run(sets, tmp_path, recipe=Recipe(**{**vars(RECIPE), "learning_rate": 0.2}), resume=True)
    with pytest.raises(ModelError, match="images = 256, not 200"):
        run((data.open("digits", train=True, limit=200), sets[1]), tmp_path, resume=True)
    with pytest.raises(ModelError, match="another network"):
        run(sets, tmp_path, rf.models.resnet(14, width=8, in_channels=1), resume=True)
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ModelError, match="lacks history"):
        run(sets, tmp_path, resume=True)


def test_sets_that_do_not_fit_are_refused(sets, tmp_path):
    learn, test = sets
    other = data.ImageData(test.images, test.labels, "abcdefghij", data.DIGITS, "letters (test)")
    larger = data.ImageData(
        torch.zeros(3, 1, 9, 9, dtype=torch.uint8), test.labels[:3], test.classes, data.DIGITS, "large (test)"
    )
    for pair, words in (
        ((learn, other), "letters .* different classes"),
        ((learn, larger), "1 x 8 x 8 and 1 x 9 x 9"),
        ((learn.subset([]), test), "no images"),
        ((learn, test.subset([])), "no images"),
        ((learn.subset([3]), test), "single image"),
    ):
        with pytest.raises(DataError, match=words):
            run(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(sets, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        run(sets, tmp_path / "out")
