import importlib.util
import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from terminal import terminal

from lbpwht_jax.cli import main
from lbpwht_jax.data import Loading, evaluation_batches, open_dataset, training_batches
from lbpwht_jax.data.recipes import RECIPES, paper_recipe


def encoded(value, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (9, 6), (value,) * len(Image.new(mode, (1, 1)).getbands())).save(file, "PNG")
    return file.getvalue()


class LbpwhtShades(tfds.core.GeneratorBasedBuilder):
    """Greys, dark or bright, with a second image that must not be decoded."""

    VERSION = tfds.core.Version("1.10.0")
    TESTS = (("test", 5),)

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["dark", "bright"]),
            "mask": tfds.features.Image(shape=(None, None, 1)),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), **{name: self._generate_examples(n) for name, n in self.TESTS}}

    def _generate_examples(self, count):
        for i in range(abs(count)):
            label = i % 2 if count > 0 else -1
            yield i, {"image": encoded(200 * (i % 2) + i, "RGB"), "label": label, "mask": encoded(0), "name": str(i)}


class LbpwhtUnlabelled(LbpwhtShades):
    """Its test split has no labels, as some benchmarks' have not."""

    TESTS = (("test", -3), ("validation", 4))


class LbpwhtUntested(LbpwhtShades):
    TESTS = ()


class LbpwhtWords(LbpwhtShades):
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _generate_examples(self, count):
        yield 0, {"text": "word"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared by the command, where there is no TensorFlow."""
    path = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LbpwhtShades, "VERSION", tfds.core.Version("1.9.0"))
        assert main(["prepare", "tfds:lbpwht_shades:1.9.0", "--data-dir", str(path)]) == 0
    for name in ("shades", "unlabelled", "untested", "words"):
        assert main(["prepare", f"tfds:lbpwht_{name}", "--data-dir", str(path)]) == 0
    return path


def test_the_screen(tmp_path):
    """TFDS shows what it does in its own lines; the last one is this library's."""
    with terminal(80) as recording:
        assert main(["prepare", "tfds:lbpwht_untested", "--data-dir", str(tmp_path)]) == 0
    end = f"{tmp_path}/lbpwht_untested/1.10.0: 12 train; train on it with --dataset tfds:lbpwht_untested"
    shown = "".join("".join(recording.lines).split())  # a line that ends loses its last space, and long paths are broken
    assert shown.endswith("".join(end.split())), recording.lines


def test_it_is_read_as_it_was_prepared(folder):
    dataset = open_dataset("tfds:lbpwht_shades", data_dir=folder)
    assert dataset.name == "tfds:lbpwht_shades:1.10.0" and dataset.classes == ("dark", "bright")
    assert len(dataset.train) == 12 and len(dataset.test) == 5
    with evaluation_batches(dataset.test, Loading(4, 6, 3, workers=2), crop=1.0) as batches:
        whole = list(batches)
        assert not batches.skipped
    values = np.concatenate([batch.images[batch.valid] for batch in whole])
    labels = np.concatenate([batch.labels[batch.valid] for batch in whole])
    assert sorted(values[:, 0, 0, 0]) == [0, 2, 4, 201, 203]
    np.testing.assert_array_equal(values[:, 0, 0, 0] > 100, labels)
    with training_batches(dataset, Loading(12, 6, 1, workers=2)) as batches:
        batch = next(batches)
    np.testing.assert_array_equal(batch.images[:, 0, 0, 0] > 100, batch.labels)
    assert len(set(batch.images[:, 0, 0, 0])) == 12 and (batch.aspect == 1.5).all()
    assert dataset.train.where(3) == "tfds:lbpwht_shades:1.10.0 train[3]"


def test_a_version_can_be_asked_for(folder):
    assert open_dataset("tfds:lbpwht_shades:1.9.0", data_dir=folder).name == "tfds:lbpwht_shades:1.9.0"
    with pytest.raises(
        ValueError, match=r"not prepared in .* \(but 1\.9\.0, 1\.10\.0\); run: lbpwht prepare tfds:lbpwht_shades:2\.0\.0"
    ):
        open_dataset("tfds:lbpwht_shades:2.0.0", data_dir=folder)


def test_the_folder_may_come_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    assert open_dataset("tfds:lbpwht_shades").classes == ("dark", "bright")


def test_validation_stands_in_for_a_test_split_without_labels(folder):
    assert len(open_dataset("tfds:lbpwht_unlabelled", data_dir=folder).test) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"tfds:cifar10 is not prepared in .*; run: lbpwht prepare tfds:cifar10$"),
        ("cifar10:9.9.9", r"tfds:cifar10:9\.9\.9 is not prepared in .*; run: lbpwht prepare tfds:cifar10:9\.9\.9$"),
        ("cifar11", r"TFDS has no data set 'cifar11'; is it .*\bcifar10\b"),
        ("cifar10:newest", "tfds:cifar10:newest is no name of a TFDS data set; write tfds:NAME, or tfds:NAME:1.2.3"),
        ("lbpwht_untested", "has no labelled splits train and test .or validation., but train"),
        ("lbpwht_words", "does not consist of images with class labels, but of text"),
    ],
)
def test_what_cannot_be_opened(name, message, folder):
    with pytest.raises(ValueError, match=message):
        open_dataset(f"tfds:{name}", data_dir=folder)


def test_another_file_format(folder, tmp_path):
    source = folder / "lbpwht_shades" / "1.9.0"
    target = tmp_path / "lbpwht_shades" / "1.9.0"
    target.mkdir(parents=True)
    for file in source.glob("*.json"):
        (target / file.name).write_text(file.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        ValueError, match=r"not prepared as ArrayRecord files.*prepare tfds:lbpwht_shades --data-dir ANOTHER_FOLDER"
    ):
        open_dataset("tfds:lbpwht_shades", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "only TFDS data sets are prepared; write tfds:NAME, not 'digits'"),
        ("tfds:cifar11", "TFDS has no data set 'cifar11'"),
        ("tfds:cifar10:9.9.9", "Dataset cifar10 cannot be loaded at version 9.9.9, only: "),
    ],
)
def test_what_cannot_be_prepared(name, message, capsys, tmp_path):
    assert main(["prepare", name, "--data-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_preparing_needs_tensorflow(capsys, tmp_path):
    assert main(["prepare", "tfds:cifar10", "--data-dir", str(tmp_path)]) == 2
    wanted = "preparing tfds:cifar10 needs TensorFlow (reading it later does not): pip install 'lbpwht_jax[prepare]'"
    assert wanted in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_tfds_is_imported_when_it_is_needed():
    code = "import sys, lbpwht_jax.cli; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_recipes_are_for_data_sets_that_tfds_has():
    assert set(RECIPES) <= set(tfds.list_builders(with_community_datasets=False))
    assert paper_recipe("tfds:cars196:2.1.0")["lr"] == 5e-4 and paper_recipe("tfds:cifar100")["clip"] == 0
    assert paper_recipe("folder:some/cifar10.zip") == paper_recipe("folder:cifar10/") == paper_recipe("tfds:cifar10")
    for name in ("digits", "tfds:mnist", "folder:some/where"):
        with pytest.raises(ValueError, match=f"the paper has no recipe for {name}; it has one for cifar10, "):
            paper_recipe(name)
