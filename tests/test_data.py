"""Data sets are found, checked, and the same every time; what is wrong with them is said with the file's name."""

import socket

import numpy as np
import pytest
import torch
from PIL import Image

from resens_fast import data
from resens_fast.errors import DataError
from resens_fast.imageset import FolderData, ImageData, decode


def write_images(root, classes=("a", "b"), count=3, size=(8, 8), mode="RGB", suffix=".png", seed=0):
    random = np.random.RandomState(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            shape = (size[0], size[1], 3) if mode == "RGB" else size
            Image.fromarray(random.randint(0, 256, shape, dtype=np.uint8)).save(root / name / f"{index:04d}{suffix}")
    return root


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data set on this machine: the home and the current folder are empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RESENS_FAST_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_digits_are_split_once_and_for_all():
    train, test = data.open("digits", train=True), data.open("digits")
    assert (len(train), len(test)) == (1297, 500)
    assert train.classes == test.classes == tuple("0123456789")
    assert test.images.shape == (500, 1, 8, 8)
    assert torch.bincount(test.labels).tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    assert [int(label) for label in test.labels[:20]] == [3, 5, 7, 3, 6, 9, 2, 6, 0, 8, 7, 7, 1, 0, 8, 0, 3, 7, 3, 6]
    from sklearn.datasets import load_digits

    everything = {image.tobytes() for image in np.rint(load_digits().images * 255 / 16).astype(np.uint8)}
    parts = [{image.tobytes() for image in part.images.numpy()} for part in (train, test)]
    assert parts[0] | parts[1] == everything
    assert sum(map(len, parts)) == len(everything) == 1797


def test_items_are_normalised_as_the_card_says_and_agree_with_tensors():
    card = {"mean": [0.5], "std": [0.25], "input_shape": [1, 8, 8], "classes": list("0123456789")}
    test = data.open("digits", card=card)
    images, labels = test.tensors()
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    torch.testing.assert_close(images * 0.25 + 0.5, test.images / 255)
    image, label = test[7]
    assert isinstance(label, int)
    assert torch.equal(image, images[7])
    assert label == labels[7]
    train, _ = data.open("digits", train=True).tensors()
    assert abs(float(train.mean())) < 0.01
    assert abs(float(train.std()) - 1) < 0.01


def test_limits_are_stable_nested_and_spread_over_the_classes(tmp_path):
    write_images(tmp_path, count=30)
    # The files are in the order of their classes: the first ten would all be of one.
    assert 2 < int(data.open(f"folder:{tmp_path}", limit=10).labels.sum()) < 8
    small, large = data.open("digits", limit=50), data.open("digits", limit=100)
    assert torch.equal(small.images, data.open("digits", limit=50).images)
    assert {i.numpy().tobytes() for i in small.images} < {i.numpy().tobytes() for i in large.images}
    assert len(set(small.labels.tolist())) == 10
    assert len(data.open("digits", limit=10_000)) == 500


@pytest.mark.parametrize("seed", range(5))
def test_split_is_stratified_and_complete(seed):
    labels = np.random.RandomState(seed).choice(4, 101, p=[0.5, 0.3, 0.15, 0.05])
    train, test = data.split(labels, 30)
    assert len(test) == 30
    assert sorted([*train, *test]) == list(range(101))
    for c in range(4):
        assert abs((labels[test] == c).sum() - (labels == c).sum() * 30 / 101) < 1


def test_folder_takes_test_or_train_or_itself(tmp_path):
    write_images(tmp_path / "both" / "train", count=4)
    write_images(tmp_path / "both" / "test", count=2, seed=1)
    assert len(data.open(f"folder:{tmp_path / 'both'}", train=True)) == 8
    assert len(data.open(f"folder:{tmp_path / 'both'}")) == 4
    found = data.open(f"folder:{tmp_path / 'both' / 'test'}")
    assert isinstance(found, ImageData)
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [0, 0, 1, 1]
    with Image.open(tmp_path / "both" / "test" / "b" / "0001.png") as image:
        assert np.array_equal(found.images[3].permute(1, 2, 0).numpy(), np.asarray(image))


def test_folder_too_large_for_memory_is_decoded_when_read(tmp_path, monkeypatch):
    write_images(tmp_path, count=2)
    whole = data.open(f"folder:{tmp_path}")
    monkeypatch.setattr(data, "MEMORY", 10)
    lazy = data.open(f"folder:{tmp_path}")
    assert isinstance(lazy, FolderData)
    assert all(torch.equal(lazy[i][0], whole[i][0]) and lazy[i][1] == whole[i][1] for i in range(4))


def test_large_images_are_resized_and_cropped_to_the_card(tmp_path):
    write_images(tmp_path, size=(64, 48))
    found = data.open(f"folder:{tmp_path}", card={"input_shape": [3, 28, 28]})
    assert found.images.shape[1:] == (3, 28, 28)
    # A constant image stays constant, and the crop is from the middle.
    Image.fromarray(np.full((50, 40, 3), 9, np.uint8)).save(tmp_path / "flat.png")
    assert (decode(tmp_path / "flat.png", (3, 28, 28)) == 9).all()
    stripes = np.zeros((32, 40, 3), np.uint8)
    stripes[:, 4:36] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert (decode(tmp_path / "stripes.png", (3, 32, 32)) == 255).all()


def test_card_with_one_channel_reads_grey(tmp_path):
    write_images(tmp_path)
    found = data.open(f"folder:{tmp_path}", card={"input_shape": [1, 8, 8]})
    assert found.images.shape[1:] == (1, 8, 8)
    write_images(tmp_path / "grey", mode="L")
    assert data.open(f"folder:{tmp_path / 'grey'}").images.shape[1:] == (3, 8, 8)


def test_cifar10_is_found_where_it_was_put(nowhere, monkeypatch):
    assert data.find_cifar10() is None
    write_images(nowhere / "here" / "data" / "cifar10-jpeg" / "test", data.CIFAR10_CLASSES, 2, (32, 32), suffix=".jpg")
    assert data.find_cifar10() == "cifar10:data/cifar10-jpeg"
    found = data.open("cifar10")
    assert (len(found), found.classes, found.name) == (20, data.CIFAR10_CLASSES, "cifar10-jpeg (test)")
    write_images(nowhere / "elsewhere" / "test", data.CIFAR10_CLASSES, 1, (32, 32))
    monkeypatch.setenv("RESENS_FAST_DATA", str(nowhere / "elsewhere"))
    assert data.find_cifar10() == f"cifar10:{nowhere / 'elsewhere'}"
    assert data.open("cifar10").name == "cifar10 (test)"
    (nowhere / "home" / ".cache" / "resens_fast" / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.delenv("RESENS_FAST_DATA")
    assert data.find_cifar10() == f"cifar10:{nowhere / 'home' / '.cache' / 'resens_fast'}"


def test_missing_cifar10_says_where_it_looked_and_what_to_do(nowhere, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(DataError) as raised:
        data.open("cifar10")
    message = str(raised.value)
    assert all(part in message for part in ("CIFAR-10", ".cache/resens_fast", "data", "RESENS_FAST_DATA", "digits"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("spec", "card", "limit", "names"),
    [
        ("mnist", None, None, ["'mnist'", "digits", "cifar10", "folder:PATH"]),
        ("", None, None, ["''", "digits"]),
        ("digits:5", None, None, ["'digits:5'"]),
        ("folder:", None, None, ["'folder:'"]),
        ("cifar10:", None, None, ["'cifar10:'"]),
        ("digits", None, 0, ["0"]),
        ("digits", None, -3, ["-3"]),
        ("digits", {"input_shape": [3, 32, 32], "name": "big"}, None, ["1 x 8 x 8", "big", "3 x 32 x 32"]),
        ("digits", {"classes": ["x", "y"]}, None, ["10", "2"]),
        ("digits", {"classes": list("abcdefghij")}, None, ["0, 1, 2, ...", "a, b, c, ..."]),
        ("digits", {"classes": list("9012345678")}, None, ["0, 1, 2, ...", "9, 0, 1, ..."]),
        ("digits", {"mean": [0.5] * 3, "std": [0.5] * 3}, None, ["1 channel", "3"]),
        ("digits", {"mean": [0.5], "std": [0.0]}, None, ["0.0"]),
        ("digits", {"mean": [float("nan")], "std": [1.0]}, None, ["nan"]),
        ("folder:/no/such/place", None, None, ["/no/such/place"]),
        ("cifar10:/no/such/place", None, None, ["/no/such/place"]),
    ],
)
def test_bad_requests_name_the_value(spec, card, limit, names):
    with pytest.raises(DataError) as raised:
        data.open(spec, card=card, limit=limit)
    assert all(name in str(raised.value) for name in names), str(raised.value)
    assert "\n" not in str(raised.value)


def empty_class(root):
    (root / "c").mkdir()
    (root / "c" / "notes.txt").write_text("no image")
    return root / "c"


def truncated(root):
    path = root / "b" / "0001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    return path


def not_an_image(root):
    path = root / "b" / "0000.jpg"
    path.write_text("hello")
    return path


def empty_file(root):
    path = root / "a" / "0000.jpg"
    path.write_bytes(b"")
    return path


def too_small(root):
    path = root / "b" / "0002.jpg"
    Image.new("RGB", (4, 16)).save(path)
    return path


def flat(root):
    for name in ("a", "b"):
        for path in (root / name).iterdir():
            path.unlink()
        (root / name).rmdir()
    return root


@pytest.mark.parametrize("damage", [empty_class, truncated, not_an_image, empty_file, too_small, flat])
def test_damaged_folders_name_the_file(tmp_path, damage):
    write_images(tmp_path, size=(16, 16), suffix=".jpg")
    data.open(f"folder:{tmp_path}")
    culprit = damage(tmp_path)
    with pytest.raises(DataError) as raised:
        data.open(f"folder:{tmp_path}")
    assert str(culprit) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folder_with_only_the_other_half_is_refused(tmp_path):
    write_images(tmp_path / "train")
    with pytest.raises(DataError, match="no folder test"):
        data.open(f"folder:{tmp_path}")


def test_other_images_are_not_cifar10(tmp_path):
    write_images(tmp_path / "test", size=(32, 32))
    with pytest.raises(DataError, match="not CIFAR-10"):
        data.open(f"cifar10:{tmp_path}")


def test_damaged_archive_is_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"short")
    with pytest.raises(DataError, match="cifar-10-batches-py is incomplete or damaged"):
        data.open(f"cifar10:{tmp_path}")
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)


def test_damaged_fashion_mnist_is_named(nowhere, monkeypatch):
    (nowhere / "root" / "FashionMNIST" / "raw").mkdir(parents=True)
    monkeypatch.setenv("RESENS_FAST_DATA", str(nowhere / "root"))
    with pytest.raises(DataError, match="FashionMNIST is incomplete or damaged"):
        data.open("fashion-mnist")
