import io
import re
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lbpwht_jax.data import Loading, evaluation_batches, open_dataset, training_batches


def picture(label, format, size=(5, 4)):
    """An image whose grey is ten times its label."""
    file = io.BytesIO()
    Image.new("RGB", size, (10 * label,) * 3).save(file, format)
    return file.getvalue()


def write(root, *paths, data=None):
    """Writes images; those in a class named "c3" are of label 3."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        suffix = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}.get(file.suffix[1:].lower(), file.suffix[1:])
        label = int(re.search(r"c(\d)/", path)[1])
        file.write_bytes(picture(label, suffix) if data is None else data)
    return root


def zipped(root, target, *, top="", folders=False, compression=zipfile.ZIP_DEFLATED):
    """A zip file of a folder, with or without a top folder and entries for folders."""
    with zipfile.ZipFile(target, "w", compression) as archive:
        for path in sorted(root.rglob("*")):
            if folders or path.is_file():
                archive.write(path, top + path.relative_to(root).as_posix())
    return target


def listed(split):
    return [(split.files[i], split.read(i)[1]) for i in range(len(split))]


def evaluate(dataset, batch_size=4, **loading):
    with evaluation_batches(dataset.test, Loading(batch_size, 8, 3, **loading), crop=1.0) as batches:
        return list(batches), batches.skipped


LAYOUT = ("train/c0/1.jpg", "train/c0/2.PNG", "train/c1/deep/3.webp", "train/c1/4.JPEG")
LAYOUT += ("test/c1/5.bmp", "test/c0/6.gif", "test/c0/7.tif")


@pytest.fixture(params=["folder", "zip", "zip with a top folder", "stored zip with folders", "folder in a folder"])
def layout(request, tmp_path):
    root = write(tmp_path / "data", *LAYOUT)
    for junk in ("train/c0/notes.txt", "train/.hidden/8.png", "test/c1/._9.png", "train/.DS_Store", "README.md"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_bytes(b"junk")
    match request.param:
        case "zip":
            return zipped(root, tmp_path / "data.zip")
        case "zip with a top folder":
            (root / "train" / "c0" / "notes.txt").unlink()
            (root / "README.md").unlink()
            target = zipped(root, tmp_path / "data.zip", top="data/")
            with zipfile.ZipFile(target, "a") as archive:
                archive.writestr("__MACOSX/data/train/c0/1.jpg", b"junk")
            return target
        case "stored zip with folders":
            return zipped(root, tmp_path / "data.ZIP", folders=True, compression=zipfile.ZIP_STORED)
        case "folder in a folder":
            (tmp_path / "outer").mkdir()
            shutil.move(root, tmp_path / "outer" / "inner")
            return tmp_path / "outer"
    return root


def test_train_and_test(layout):
    dataset = open_dataset(f"folder:{layout}")
    assert dataset.name == f"folder:{layout}" and dataset.classes == ("c0", "c1")
    names = [[(file.rpartition("/")[2], label) for file, label in listed(split)] for split in (dataset.train, dataset.test)]
    assert names == [[("1.jpg", 0), ("2.PNG", 0), ("4.JPEG", 1), ("3.webp", 1)], [("6.gif", 0), ("7.tif", 0), ("5.bmp", 1)]]
    (batch,), skipped = evaluate(dataset)
    assert not skipped
    np.testing.assert_array_equal(batch.images[:3, 0, 0, 0], [0, 0, 10])
    np.testing.assert_array_equal(batch.valid, [True, True, True, False])


def test_validation_beside_a_test_split(tmp_path):
    root = write(tmp_path, "train/c0/1.png", "train/c1/2.png", "val/c0/3.png", "test/c1/4.png")
    dataset = open_dataset(f"folder:{root}")
    assert listed(dataset.test) == [("test/c1/4.png", 1)] and listed(dataset.validation) == [("val/c0/3.png", 0)]
    with pytest.raises(ValueError, match="validation images of its own; leave --validation out"):
        open_dataset(f"folder:{root}", validation=0.5)
    write(tmp_path, "validation/c0/5.png")
    with pytest.raises(ValueError, match="has the folders val and validation; keep one of them"):
        open_dataset(f"folder:{root}")


def test_validation_stands_in_for_a_test_split(tmp_path):
    root = write(tmp_path, "train/c0/1.png", "train/c1/2.png", "val/c0/3.png")
    assert listed(open_dataset(f"folder:{root}").test) == [("val/c0/3.png", 0)]
    write(root, "test/c1/4.png")
    assert listed(open_dataset(f"folder:{root}").test) == [("test/c1/4.png", 1)]


@pytest.mark.parametrize("archive", [False, True])
def test_a_fifth_of_each_class_is_held_out_where_there_are_no_splits(tmp_path, archive):
    counts = {0: 2, 1: 10, 2: 23}
    root = write(tmp_path / "data", *(f"c{label}/{i}.png" for label, n in counts.items() for i in range(n)))
    name = f"folder:{zipped(root, tmp_path / 'data.zip') if archive else root}"
    dataset = open_dataset(name, seed=1)
    train, test = listed(dataset.train), listed(dataset.test)
    assert sorted(train + test) == sorted((f"c{label}/{i}.png", label) for label, n in counts.items() for i in range(n))
    assert Counter(label for _, label in test) == {0: 1, 1: 2, 2: 5}
    assert listed(open_dataset(name, seed=1).test) == test
    assert listed(open_dataset(name, seed=2).test) != test


def test_many_threads_read_one_zip(tmp_path):
    rng = np.random.default_rng(0)
    target = tmp_path / "data.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(200):
            file = io.BytesIO()
            Image.fromarray(np.where(rng.random((40, 40)) < 0.5, i, 0).astype(np.uint8)).save(file, "PNG")
            archive.writestr(f"{'train' if i < 100 else 'test'}/c{i % 100:02}/x.png", file.getvalue())
    dataset = open_dataset(f"folder:{target}")
    with training_batches(dataset, Loading(25, 40, 1, workers=8)) as batches:
        for batch in (next(batches) for _ in range(40)):
            np.testing.assert_array_equal(batch.images.max((1, 2, 3)), batch.labels)
        assert not batches.skipped


def test_damaged_images_are_skipped_and_named(tmp_path):
    root = write(tmp_path, *(f"{split}/c{i}/{n}.png" for split in ("train", "test") for i in range(2) for n in range(4)))
    whole = open_dataset(f"folder:{root}")
    (root / "train/c0/1.png").write_bytes(b"")
    (root / "train/c1/0.png").write_bytes((root / "train/c1/0.png").read_bytes()[:45])
    (root / "test/c0/2.png").write_bytes(b"these are words")
    (root / "test/c1/3.png").unlink()
    batches, skipped = evaluate(whole)
    assert [batch.valid.tolist() for batch in batches] == [[True, True, False, True], [True, True, True, False]]
    assert {name: reason.split(":")[0] for name, reason in skipped.items()} == {
        f"{root}/test/c0/2.png": "UnidentifiedImageError",
        f"{root}/test/c1/3.png": "[Errno 2] No such file or directory",
    }
    with training_batches(whole, Loading(8, 8, 3)) as batches:
        batch = next(batches)
        assert set(batches.skipped) == {f"{root}/train/c0/1.png", f"{root}/train/c1/0.png"}
    np.testing.assert_array_equal(batch.images[:, 0, 0, 0], 10 * batch.labels)
    assert batch.valid.all() and np.bincount(batch.labels).tolist() == [4, 4]


def test_a_damaged_member_of_a_zip_is_skipped(tmp_path):
    root = write(tmp_path / "data", *(f"{split}/c{i}/1.bmp" for split in ("train", "test") for i in range(2)))
    target = zipped(root, tmp_path / "data.zip", compression=zipfile.ZIP_STORED)
    pixels = picture(1, "BMP")[-8:]
    data = bytearray(target.read_bytes())
    at = data.index(pixels, data.index(b"test/c1/1.bmp"))
    data[at] ^= 255
    target.write_bytes(data)
    (batch,), skipped = evaluate(open_dataset(f"folder:{target}"))
    assert batch.valid.tolist() == [True, False, False, False]
    assert list(skipped) == [f"{target}/test/c1/1.bmp"] and "Bad CRC-32" in skipped[f"{target}/test/c1/1.bmp"]


def write_none(root):
    (root / "train" / "c0").mkdir(parents=True)
    (root / "train" / "c0" / "notes.txt").write_text("no image")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write_none, r"holds no images \(\.jpg, .*; wanted are CLASS/IMAGE files, or train/CLASS/IMAGE and test/CLASS/IMAGE"),
        (lambda root: write(root, "train/c0/1.png", "other/c0/1.png"), "has a folder train but no test or val"),
        (lambda root: write(root, "val/c0/1.png", "other/c0/1.png"), "has a folder val but no train"),
        (lambda root: (write_none(root), write(root, "train/c1/1.png", "test/c1/1.png")), "the folder train/c0 holds no image"),
        (lambda root: (write_none(root / "x"), write(root, "c1/1.png", "c1/2.png")), "the folder x holds no image"),
        (
            lambda root: write(root, "train/c0/1.png", *(f"test/c{i}/1.png" for i in range(8))),
            "of the classes in test, train lacks 7: c1, c2, c3, c4, c5, ...",
        ),
        (lambda root: write(root, "c0/1.png", "c0/2.png", "c1/1.png"), "class c1 has one image; two are needed"),
        (
            lambda root: (write(root, "train/c0/1.png", "test/c0/1.png"), (root / "train/2.png").write_bytes(b"")),
            r"train/2\.png is in no class folder; wanted are",
        ),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_folders_that_are_no_data_set(tmp_path, make, message, archive):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    path = zipped(root, tmp_path / "data.zip") if archive else root
    with pytest.raises(ValueError, match=re.escape(f"folder:{path}") + ".*" + message):
        open_dataset(f"folder:{path}")


def test_what_is_no_folder_and_no_zip(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"folder:{tmp_path}/none: there is no such folder or zip file"):
        open_dataset(f"folder:{tmp_path}/none")
    with pytest.raises(ValueError, match="holds no images"):
        open_dataset(f"folder:{tmp_path}")
    for data in (b"these are words", zipped(write(tmp_path, "c0/1.png"), tmp_path / "whole.zip").read_bytes()[:-30]):
        (tmp_path / "half.zip").write_bytes(data)
        with pytest.raises(ValueError, match=r"half\.zip is neither a folder nor a readable zip file: File is not a zip file"):
            open_dataset(f"folder:{tmp_path}/half.zip")


def test_a_home_folder_that_is_nobody_s():
    with pytest.raises(ValueError, match=r"^folder:~nosuchuser/x: there is no user 'nosuchuser'"):
        open_dataset("folder:~nosuchuser/x")


@pytest.mark.parametrize("name", ["numbers", "folder", "folder:", "tfds:", "mnist:1.0.0"])
def test_unknown_names(name):
    with pytest.raises(
        ValueError, match=rf"unknown data set '{name}'; write digits, folder:PATH, tfds:NAME or tfds:NAME:VERSION"
    ):
        open_dataset(name)
