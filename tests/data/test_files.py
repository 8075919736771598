"""Folders with links, pipes and what else is no image file; zip files that unpack to more than they say."""

import os
import re
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from lbpwht_jax.data import load_image, open_dataset
from lbpwht_jax.data.files import LARGEST, list_folder, list_zip, read_file


@pytest.fixture
def two_classes(tmp_path):
    """Two classes of twelve images each."""
    for path in (tmp_path / "data" / label / f"{i}.png" for label in "ab" for i in range(12)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    return tmp_path / "data"


def every_image(root):
    dataset = open_dataset(f"folder:{root}")
    return sorted(file for split in (dataset.train, dataset.test) for file in split.files)


@pytest.mark.parametrize(
    ("link", "target"), [("a/loop", ".."), ("a/loop", "."), ("a/loop", "../.."), ("b/again", "../a"), ("a/self", "self")]
)
def test_link_loops_are_left_out_and_counted(two_classes, caplog, link, target):
    plain = every_image(two_classes)
    assert len(plain) == 24 and not caplog.records
    (two_classes / link).symlink_to(target)
    assert every_image(two_classes) == plain
    # a link to itself leads to no folder: it is a file like any other without an image's suffix
    messages = [] if link == "a/self" else [rf"folder:{two_classes}: links left out, .*: 1 \({link}\)"]
    assert len(caplog.messages) == len(messages)
    assert all(re.fullmatch(wanted, found) for found, wanted in zip(caplog.messages, messages, strict=True))


def test_links_to_elsewhere_are_followed_once(two_classes, tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.rename(two_classes / "b", elsewhere / "b")
    (two_classes / "b").symlink_to(elsewhere / "b")
    (elsewhere / "b" / "back").symlink_to(two_classes)
    assert len(every_image(two_classes)) == 24
    assert "1 (b/back)" in caplog.text
    # two links to one folder: the first in the alphabet is followed
    (two_classes / "c").symlink_to(elsewhere / "b")
    assert {name.split("/")[0] for name in every_image(two_classes)} == {"a", "b"}


def test_linked_files_are_listed_once(two_classes, tmp_path, caplog):
    pool = tmp_path / "data" / ".pool"
    pool.mkdir()
    for i in range(12):
        os.rename(two_classes / "a" / f"{i}.png", pool / f"{i}.png")
        (two_classes / "a" / f"{i}.png").symlink_to(pool / f"{i}.png")
    assert len(every_image(two_classes)) == 24 and not caplog.records
    (two_classes / "b" / "twice.png").symlink_to(pool / "0.png")
    (two_classes / "b" / "thrice.png").symlink_to(two_classes / "b" / "0.png")
    assert len(every_image(two_classes)) == 24
    assert "2 (b/thrice.png, b/twice.png)" in caplog.text


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(two_classes):
    (two_classes / "a" / "gone.png").symlink_to("nowhere.png")
    paths, read = list_folder(two_classes)
    assert "a/gone.png" in paths
    with pytest.raises(FileNotFoundError):
        read("a/gone.png")


def test_a_folder_that_cannot_be_listed_is_named(two_classes, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).rstrip("/").endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=rf"folder:{two_classes}: cannot list b/: Permission denied"):
        open_dataset(f"folder:{two_classes}")


def test_pipes_and_devices_are_not_waited_for(two_classes):
    os.mkfifo(two_classes / "a" / "pipe.png")
    _, read = list_folder(two_classes)
    refused = []

    def call(function, argument):
        with pytest.raises((OSError, ValueError), match="it is no regular file, but a pipe or a device"):
            function(argument)
        refused.append(function)

    for arguments in ((read, "a/pipe.png"), (list_zip, two_classes / "a" / "pipe.png")):
        # what waits for a pipe waits for good: in a thread that the process leaves behind
        thread = threading.Thread(target=call, args=arguments, daemon=True)
        thread.start()
        thread.join(10)
    assert len(refused) == 2
    with pytest.raises(ValueError, match="cannot read the image /dev/null: it is no regular file"):
        load_image("/dev/null", 8, 3, 1.0)


def test_files_too_large_for_an_image_are_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(LARGEST + 1)  # a hole, which takes no space
    with pytest.raises(OSError, match="320 MiB, more than the 320 MiB that an image file may have"):
        read_file(tmp_path / "a.png")


def packed(path, sizes, declared=None, compression=zipfile.ZIP_DEFLATED):
    """A zip file with members of zeros; ``declared`` replaces the size of the last in the directory."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, size in sizes.items():
            with archive.open(name, "w", force_zip64=True) as file:
                for start in range(0, size, 2**20):
                    file.write(bytes(min(2**20, size - start)))
    if declared is not None:
        data = bytearray(path.read_bytes())
        at = data.rindex(b"PK\x01\x02") + 24
        data[at : at + 4] = declared.to_bytes(4, "little")
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_take_no_more_than_they_declare(tmp_path, compression):
    path = packed(tmp_path / "a.zip", {"a/1.png": 10, "a/2.png": 2**20}, compression=compression)
    _, read = list_zip(path)
    assert read("a/1.png") == bytes(10) and read("a/2.png") == bytes(2**20)
    _, read = list_zip(packed(path, {"a/2.png": 2**20}, declared=LARGEST + 2**20, compression=compression))
    with pytest.raises(OSError, match="321 MiB, more than the 320 MiB"):
        read("a/2.png")
    _, read = list_zip(packed(path, {"a/2.png": 2**20}, declared=100, compression=compression))
    with pytest.raises(OSError, match=r"Bad CRC-32|holds \d+ bytes"):
        read("a/2.png")


def test_deep_names_cost_no_more_than_their_length(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/" * 20_000 + "1.png", b"")
    paths, _ = list_zip(tmp_path / "a.zip")
    assert len(list(paths)) == 5


def test_a_directory_of_names_that_are_no_text(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("ä/1.png", b"")
    data = (tmp_path / "a.zip").read_bytes().replace("ä".encode(), b"\xff\xff")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ValueError, match="neither a folder nor a readable zip file: 'utf-8' codec"):
        open_dataset(f"folder:{tmp_path / 'a.zip'}")


def test_long_strips_are_cut_before_they_are_resized(tmp_path):
    """1 x 200,000 pixels once took 13.6 GB: the strip was resized whole, to 256 x 51,200,000."""
    Image.fromarray(np.full((200_000, 1), 7, np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", 24, 3, 0.9), np.full((24, 24, 3), 7))
