"""Reading torch.save files without torch. ``fixtures/torch_file.pth`` was written by torch 2.13."""

import argparse
import os
import pickle
import subprocess
import sys
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


def test_objects_beside_the_tensors_are_refused_by_name(tmp_path):
    path = write(tmp_path / "a.pth", pickle.dumps({"args": argparse.Namespace(lr=1)}))
    with pytest.raises(ValueError, match=r"argparse\.Namespace.*save its state dict alone"):
        read_torch_file(path)


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
