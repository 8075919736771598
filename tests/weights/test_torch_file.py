"""Reading torch.save files without torch. ``fixtures/torch_file.pth`` was written by torch 2.13."""

import argparse
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax.weights.torch_file import read_torch_file

FIXTURE = Path(__file__).parents[1] / "fixtures" / "torch_file.pth"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI6\ntQ"


def write(path, content, byteorder="little"):
    """An archive as torch.save lays it out, around a pickle of our own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", np.arange(6, dtype=np.float32).tobytes())
    return path


def tensor(offset=0, shape=(2, 3), strides=(3, 1), storage=STORAGE):
    """The pickle of {"w": tensor}."""
    sizes = b"".join(b"(" + b"".join(b"I%d\n" % n for n in numbers) + b"t" for numbers in (shape, strides))
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I%d\n" % offset + sizes + b"I00\nccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}Vw\n" + rebuilt + b"s."


def test_tensors_of_a_file_torch_wrote():
    expected = {
        "view": BASE[1:3, ::2].T,
        "parameter": BASE,
        "half": BASE.astype(np.float16),
        "bfloat16": BASE.astype(jnp.bfloat16),
        "scalar": np.array(3),
        "empty": np.zeros((0, 2), np.float32),
        "bool": BASE > 11,
    }
    read = read_torch_file(FIXTURE)
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(read[key], value, strict=True, err_msg=key)


@pytest.mark.parametrize("wrappers", [(), ("model",), ("state_dict",), ("model", "state_dict")])
def test_wrappers(tmp_path, wrappers):
    content = tensor()[2:-1]
    for wrapper in wrappers:
        content = b"}V" + wrapper.encode() + b"\n" + content + b"s"
    read = read_torch_file(write(tmp_path / "a.pth", b"\x80\x02" + content + b"."))
    np.testing.assert_array_equal(read["w"], np.arange(6, dtype=np.float32).reshape(2, 3), strict=True)


def test_torch_is_not_needed():
    """The library reads a torch file in a process where importing torch fails."""
    code = (
        "import sys; sys.modules['torch'] = None; from lbpwht_jax.weights.torch_file import read_torch_file; "
        "print(len(read_torch_file(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(FIXTURE)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "7"


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    path = write(tmp_path / "a.pth", pickle.dumps({"w": _Code(trace)}))
    with pytest.raises(ValueError, match=r"a\.pth: refused, its pickle asks for .*\.mkdir"):
        read_torch_file(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(_Code(trace)))
    assert trace.exists()


def test_bare_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(_Code(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"a\.bin: no complete zip archive"):
        read_torch_file(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(("protocol", "header"), [(0, 0), (2, 2), (4, 11)])
def test_objects_beside_the_tensors_are_left_out_by_name(tmp_path, caplog, protocol, header):
    values = argparse.Namespace(lr=1, output=Path("x"), best=np.float64(3), means=np.ones(2))
    pickled = pickle.dumps(values, protocol)[header:-1]
    content = b"\x80\x04}Vmodel\n" + tensor()[2:-1] + b"sVargs\n" + pickled + b"s."
    read = read_torch_file(write(tmp_path / "a.pth", content))
    np.testing.assert_array_equal(read["w"], np.arange(6, dtype=np.float32).reshape(2, 3), strict=True)
    assert "a.pth: read the tensors and left out the objects beside them: " in caplog.text
    assert "argparse.Namespace" in caplog.text and "pathlib.PosixPath" in caplog.text


def test_what_holds_nothing_but_objects_is_refused(tmp_path):
    path = write(tmp_path / "a.pth", pickle.dumps({"args": argparse.Namespace(lr=1)}))
    with pytest.raises(ValueError, match=r"argparse\.Namespace.*save its state dict alone"):
        read_torch_file(path)


def test_tensors_whose_keys_are_no_names(tmp_path, caplog):
    numbered = tensor().replace(b"Vw\n", b"I0\n")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_torch_file(write(tmp_path / "a.pth", numbered))
    both = numbered[:-1] + tensor()[3:]
    assert list(read_torch_file(write(tmp_path / "a.pth", both))) == ["w"]
    assert "left out 1 tensors whose keys are no names" in caplog.text


def nested_tuples(levels, width=1):
    """A pickle whose dictionary's key is a tuple in a tuple in a tuple, each ``width`` times in the next."""
    level = b"q\x00" + b"h\x00" * (width - 1) + {1: b"\x85", 2: b"\x86"}[width]
    return b"\x80\x02})" + level * levels + b"Ns."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"\x80\x02}r\xff\xff\xff\x0f.", "3 bytes before entry 268435455 of its memo", id="memo"),
        pytest.param(tensor(shape=(2**31,), strides=(0,)), "far larger than the file", id="stride 0"),
        pytest.param(tensor(shape=(2**40, 2**40), strides=(0, 0)), "far larger than the file", id="large numbers"),
        pytest.param(nested_tuples(1_000_000), "nests a tuple of more than 10000 things", id="deep"),
        pytest.param(nested_tuples(60, 2), "nests a tuple of more than 10000 things", id="wide"),
        pytest.param(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.", "damaged", id="bytes"),
        pytest.param(b"\x80\x02" + b"N0" * 2**23 + b".", "its pickle has 16 MiB, more than tensors need", id="long"),
        pytest.param(b"\x80\x02" + b"(" * 100_000, "damaged", id="marks"),
        pytest.param(b"\x80\x02I" + b"9" * 5000 + b"\n.", "damaged", id="digits"),
    ],
)
def test_bombs(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
        read_torch_file(write(tmp_path / "a.pth", content))


def test_archives_that_unpack_to_far_more_than_their_size(tmp_path):
    path = write(tmp_path / "a.pth", tensor())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", bytes(2**25))
    with pytest.raises(ValueError, match="refused, it would unpack to 32 MiB, more than 16 times its size"):
        read_torch_file(path)


def test_storages_of_unknown_kinds_are_named(tmp_path):
    path = write(tmp_path / "a.pth", tensor(storage=STORAGE.replace(b"FloatStorage", b"ComplexFloatStorage")))
    with pytest.raises(ValueError, match=r"storage 0 is of torch\.ComplexFloatStorage, which is not read"):
        read_torch_file(path)


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    refused = []

    def call():
        with pytest.raises(ValueError, match=r"a\.pth: cannot be read: it is no regular file"):
            read_torch_file(tmp_path / "a.pth")
        refused.append(True)

    thread = threading.Thread(target=call, daemon=True)  # what waits for a pipe waits for good
    thread.start()
    thread.join(10)
    assert refused
    with pytest.raises(ValueError, match="Is a directory"):
        read_torch_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pth")


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_truncated(tmp_path, kept):
    data = FIXTURE.read_bytes()
    path = tmp_path / "a.pth"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match="no complete zip archive"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor(offset=1), "reaches outside its storage of 6"),
        (tensor(strides=(4, 1)), "reaches outside"),
        (tensor(offset=-1), "reaches outside"),
        (tensor(strides=(3, -1)), "reaches outside"),
        (tensor(storage=STORAGE.replace(b"I6", b"I7")), "storage 0 holds 6 float32, not 7 of FloatStorage"),
        (tensor(storage=STORAGE.replace(b"V0", b"V1")), "damaged"),
        (tensor(storage=tensor(shape=(9,), strides=(0,))[6:-2]), "damaged"),
        (tensor()[:-9], "damaged"),
        (b"\x80\x02}.", "holds no state dict"),
        (b"\x80\x02I3\n.", "holds no state dict"),
    ],
)
def test_damaged(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
        read_torch_file(write(tmp_path / "a.pth", content))


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(ValueError, match=r"not one torch\.save wrote"):
        read_torch_file(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="big-endian"):
        read_torch_file(write(tmp_path / "b.pth", tensor(), byteorder="big"))
