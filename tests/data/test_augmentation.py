import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from scipy import stats

from lbpwht_jax.data import Augmentation, make_augmentation
from lbpwht_jax.data.augmentation import crop_boxes, mix, resample
from lbpwht_jax.data.crops import Draws
from lbpwht_jax.data.validation import plain_errors

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(60, 196, (8, 12, 12, 3)).astype(np.uint8)
LABELS = np.arange(8, dtype=np.int32) % 3
ASPECT = np.linspace(0.5, 2, 8, dtype=np.float32)
KEY = jax.random.key(0)
BOXES = jax.jit(crop_boxes, static_argnums=2)
MIX = jax.jit(mix, static_argnums=(3, 4))


def augment(augmentation, images=IMAGES, size=12, key=KEY):
    run = jax.jit(make_augmentation(augmentation, size), static_argnums=4)
    return run(key, images, ASPECT[: len(images)], LABELS[: len(images)], 3)


def test_by_default_nothing_changes():
    images, targets = augment(Augmentation())
    np.testing.assert_allclose(images, IMAGES / 255, rtol=1e-6)
    np.testing.assert_array_equal(targets, np.eye(3)[LABELS])


def reference_box(rng, aspect, scale):
    """One box as torchvision's documentation describes it: ten tries, then the centre; over the image's height and width."""
    for _ in range(10):
        area = aspect * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= aspect and height <= 1:
            top, left = rng.uniform(0, 1 - height), rng.uniform(0, aspect - width)
            return top, left / aspect, height, width / aspect
    width, height = (aspect, aspect / 0.75) if aspect < 0.75 else (4 / 3, 1) if aspect > 4 / 3 else (aspect, 1)
    return (1 - height) / 2, (aspect - width) / 2 / aspect, height, width / aspect


def on_the_host(count, aspect, scale):
    draws = Draws(np.random.default_rng(0), count, scale)
    return np.asarray([draws.box(row, aspect) for row in range(count)])


def on_the_device(count, aspect, scale):
    return np.asarray(BOXES(KEY, jnp.full(count, aspect), scale), np.float64)


@pytest.mark.parametrize("drawn", [on_the_host, on_the_device])
@pytest.mark.parametrize(("aspect", "scale"), [(1.0, (0.08, 1.0)), (1.6, (0.3, 0.9)), (0.4, (0.08, 1.0)), (1.5, (0.8, 1.0))])
def test_crops_are_drawn_as_torchvision_draws_them(aspect, scale, drawn):
    count = 4000
    ours = drawn(count, aspect, scale)
    rng = np.random.default_rng(1)
    theirs = np.asarray([reference_box(rng, aspect, scale) for _ in range(count)])
    area, ratio = ours[:, 2] * ours[:, 3], aspect * ours[:, 3] / ours[:, 2]
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 1 + 1e-6).all()
    assert ratio.min() >= 0.75 - 1e-5 and ratio.max() <= 4 / 3 + 1e-5 and area.max() <= scale[1] + 1e-5
    for column in range(4):
        # the same distribution, unless chance puts the two samples as far apart as it does once in a thousand times
        assert stats.ks_2samp(ours[:, column].round(5), theirs[:, column].round(5)).pvalue > 1e-3


@pytest.mark.parametrize(("aspect", "box"), [(4.0, (0, 1 / 3, 1, 1 / 3)), (0.25, (1 / 3, 0, 1 / 3, 1))])
def test_where_no_box_fits_the_centre_is_cut_out(aspect, box):
    for boxes in (on_the_host(5, aspect, (0.9, 1.0)), on_the_device(5, aspect, (0.9, 1.0))):
        np.testing.assert_allclose(boxes, np.tile(box, (5, 1)), atol=1e-6)


@pytest.mark.parametrize("size", [5, 12, 30])
def test_boxes_are_resized_as_pillow_does(size):
    boxes = np.asarray([[0, 0, 1, 1], [0.25, 0.5, 0.5, 0.25], [0.1, 0.0, 0.33, 0.9]], np.float32)
    ours = np.asarray(resample(jnp.asarray(IMAGES[:3], jnp.float32) / 255, jnp.asarray(boxes), size)) * 255
    for image, (top, left, height, width), pixels in zip(IMAGES, 12 * boxes, ours, strict=False):
        region = (left, top, left + width, top + height)
        wanted = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=region)
        # Pillow rounds to integers between its two passes, and at the end; of low contrast, nothing is clipped between them
        assert abs(pixels - np.asarray(wanted, np.float32)).max() <= 1.5


def test_a_crop_changes_the_size_and_stays_in_range():
    images, _ = augment(Augmentation(crop_scale=(0.08, 1.0)), size=7)
    assert images.shape == (8, 7, 7, 3) and images.dtype == jnp.float32
    assert images.min() >= 0 and images.max() <= 1
    whole, _ = augment(Augmentation(), size=7)
    wanted = [np.asarray(Image.fromarray(image).resize((7, 7), Image.Resampling.BICUBIC)) for image in IMAGES]
    assert abs(np.asarray(whole) * 255 - np.stack(wanted)).max() <= 1.5


def test_crops_made_while_loading_are_not_cut_again():
    images, _ = augment(Augmentation(crop_scale=(0.08, 0.5), crop_from="image"))
    np.testing.assert_allclose(images, IMAGES / 255, rtol=1e-6)


def test_half_of_the_images_are_mirrored():
    many = np.broadcast_to(IMAGES[:1], (400, 12, 12, 3))
    run = make_augmentation(Augmentation(flip=True), 12)
    images = np.asarray(run(KEY, many, np.ones(400, np.float32), np.zeros(400, np.int32), 3)[0])
    plain, mirrored = (np.isclose(images, wanted / 255).all((1, 2, 3)) for wanted in (IMAGES[0], IMAGES[0][:, ::-1]))
    assert (plain ^ mirrored).all()
    # four standard deviations of 400 fair coins
    assert abs(int(mirrored.sum()) - 200) <= 40


def test_shifts_repeat_the_edge():
    images = np.asarray(augment(Augmentation(shift=2))[0])
    shifts = set()
    for image, got in zip(IMAGES, images, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge") / 255
        found = [(y, x) for y in range(5) for x in range(5) if np.allclose(padded[y : y + 12, x : x + 12], got)]
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) > 4


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_targets_are_mixed_as_the_images_are(mixup, cutmix):
    # a blank image's grey stands for its class, so the mean grey is the mean of the targets
    greys = np.asarray([0.0, 0.25, 1.0])
    labels = RNG.integers(0, 3, 200)
    images = jnp.asarray(np.broadcast_to(greys[labels].reshape(-1, 1, 1, 1), (200, 10, 14, 2)), jnp.float32)
    mixed, targets = MIX(KEY, images, jax.nn.one_hot(labels, 3), mixup, cutmix)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), targets @ jnp.asarray(greys, jnp.float32), atol=1e-5)
    partners = labels != labels[::-1]
    values = [len(np.unique(image.round(4))) for image in np.asarray(mixed)[partners]]
    # a blend is one grey, a box in an image two
    blended = np.mean([n == 1 for n in values])
    assert max(values) == (2 if cutmix else 1)
    assert {(True, False): blended == 1, (False, True): blended < 0.3, (True, True): 0.3 < blended < 0.8}[mixup > 0, cutmix > 0]


def test_shares_are_drawn_from_the_beta_distribution():
    alpha = 0.3
    targets = jax.nn.one_hot(jnp.arange(3000) * 2 // 3000, 2)
    _, mixed = MIX(KEY, jnp.zeros((3000, 2, 2, 1)), targets, alpha, 0.0)
    kept = jnp.sum(mixed * targets, 1)
    assert stats.kstest(np.asarray(kept), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_boxes_are_as_large_as_their_shares():
    targets = jax.nn.one_hot(jnp.arange(3000) * 2 // 3000, 2)
    _, mixed = MIX(KEY, jnp.zeros((3000, 20, 20, 1)), targets, 0.0, 1.0)
    given = 1 - jnp.sum(mixed * targets, 1)
    # a box of edge e round a place drawn evenly shows e - e^2 / 4 of each edge, and e^2 is even in [0, 1]: the mean area is the
    # integral of (e - e^2 / 4)^2; four standard errors
    assert given.mean() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=4 * float(given.std()) / 3000**0.5)


ALL = Augmentation((0.2, 1.0), flip=True, shift=1, randaugment=(2, 9.0), mixup=0.8, cutmix=1.0)


@pytest.mark.heavy
def test_the_key_decides_and_devices_do_not():
    run = jax.jit(make_augmentation(ALL, 16), static_argnums=4)
    one, again, other = (run(key, IMAGES, ASPECT, LABELS, 3) for key in (KEY, jax.random.key(0), jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not np.allclose(one[0], other[0])
    assert one[0].shape == (8, 16, 16, 3) and one[0].min() >= 0 and one[0].max() <= 1 + 1e-6
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("batch")))
    spread = run(KEY, place(IMAGES), place(ASPECT), place(LABELS), 3)
    # float32 sums of a few products of numbers up to 1, in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-6), one, spread)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_from": "image"}, r"crop_from 'image' needs crop_scale \(--crop-scale\), such as 0\.08 1"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale\.0 must be greater than 0, got 0\.0"),
        ({"crop_scale": (0.5, 0.1)}, r"crop_scale: the least area must not be above the largest, got \(0\.5, 0\.1\)"),
        ({"shift": -1}, "shift must be greater than or equal to 0, got -1"),
        ({"shift": 1.5}, r"shift must be a valid integer, got 1\.5"),
        ({"mixup": -0.1}, r"mixup must be greater than or equal to 0, got -0\.1"),
        ({"cutmix": float("nan")}, "cutmix must be a finite number, got nan"),
        ({"randaugment": (2, 11)}, r"randaugment\.1 must be less than or equal to 10, got 11"),
        ({"randaugment": (0, 5)}, r"randaugment\.0 must be greater than 0, got 0"),
        ({"flop": True}, "flop: Unexpected keyword argument, got True"),
    ],
)
def test_values_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=f"^here: {message}$"), plain_errors("here"):
        Augmentation(**wrong)
