"""Small files that ask for far more memory than they have bytes, and how much reading each takes.

    python tests/bombs.py FOLDER

writes them into a folder and reads them one after the other, after an ordinary photo and ordinary weights. Prints, as JSON, the
highest memory the process had until then (MiB) and what was said, by name.
"""

import json
import resource
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lbpwht_jax.data import load_image, open_dataset
from lbpwht_jax.weights import BUNDLED, load_pretrained
from lbpwht_jax.weights.files import bundled_file
from lbpwht_jax.weights.torch_file import read_torch_file

UNPACKED = 3 * 2**30
STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI%d\ntQ"


def zeros() -> bytes:
    """``UNPACKED`` zeros as one deflated stream of 3 MB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return part * (UNPACKED // 2**20) + packer.flush()


def pack(path: Path, name: str, stream: bytes, declared: int, others: Mapping[str, bytes]) -> Path:
    """A zip file of members and, as the last one, a deflated stream that declares a size."""
    with zipfile.ZipFile(path, "w") as archive:
        for other, content in others.items():
            archive.writestr(other, content)
        archive.writestr(name, stream)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 10 : entry + 12] = zipfile.ZIP_DEFLATED.to_bytes(2, "little")
    data[entry + 24 : entry + 28] = declared.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def tensor(shape: int, stride: int, storage: int) -> bytes:
    """The pickle of a state dict of one tensor of one axis."""
    arguments = STORAGE % storage + b"I0\n(I%d\nt(I%d\ntI00\nccollections\nOrderedDict\n)RtR" % (shape, stride)
    return b"\x80\x02}Vw\nctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"s."


def black(path: Path, size: int) -> Path:
    """A black PNG of one bit per pixel."""
    rows = zlib.compress(bytes((1 + size // 8) * size))
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", size, size, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return path


def readings(folder: Path) -> dict[str, Callable[[], Any]]:
    """Functions that read one bomb each, by name."""
    Image.new("L", (1, 200_000)).save(folder / "strip.png")
    black(folder / "large.png", 12_000)
    stream = zeros()
    for name, declared in {"large": UNPACKED, "liar": 1000}.items():
        pack(folder / f"{name}.zip", "train/a/1.png", stream, declared, {"test/a/1.png": b""})
        pickled = tensor(declared // 4, 1, declared // 4)
        pack(folder / f"{name}.pth", "a/data/0", stream, declared, {"a/data.pkl": pickled})
    for name, content in {"memo": b"\x80\x02}r\xff\xff\xff\x0f.", "stride": tensor(2**31, 0, 1)}.items():
        with zipfile.ZipFile(folder / f"{name}.pth", "w") as archive:
            archive.writestr("a/data.pkl", content)
            archive.writestr("a/data/0", bytes(4))

    images = {name: lambda name=name: load_image(folder / f"{name}.png", 224, 3, 0.9) for name in ("strip", "large")}
    archives = {name: lambda name=name: open_dataset(f"folder:{folder / name}.zip").train.read(0) for name in ("large", "liar")}
    weights = {
        name: lambda name=name: {k: np.array(v, np.float32) for k, v in read_torch_file(folder / f"{name}.pth").items()}
        for name in ("large", "liar", "memo", "stride")
    }
    kinds = {"png": images, "zip": archives, "pth": weights}
    return {f"{name}.{kind}": read for kind, found in kinds.items() for name, read in found.items()}


def ordinary(folder: Path) -> None:
    """Reads a photo of 12 million pixels, and the weights that come with the package."""
    Image.new("RGB", (4000, 3000)).save(folder / "photo.jpg")
    load_image(folder / "photo.jpg", 224, 3, 0.9)
    with bundled_file() as path:
        load_pretrained(BUNDLED, path)


def measure(read: Callable[[], Any]) -> tuple[float, str]:
    """Memory (MiB) and what was said."""
    try:
        read()
        said = "read"
    except (OSError, ValueError) as error:
        said = str(error)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, said


def main(folder: Path) -> None:
    """Prints what each file took."""
    bombs = readings(folder)
    found = {"ordinary": measure(lambda: ordinary(folder))}
    # so that a bomb that goes off ends this process, not the machine
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, size + 2**32))
    print(json.dumps(found | {name: measure(read) for name, read in bombs.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
