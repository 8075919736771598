"""The map between parameters and timm's keys. The fixtures hold timm 1.0.31's keys and shapes."""

import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import create_model
from lbpwht_jax.models import list_models, model_info
from lbpwht_jax.models.info import Images, ModelInfo, TimmFiles
from lbpwht_jax.weights.timm_keys import entries, from_timm, to_timm

TIMM = Path(__file__).parents[1] / "fixtures" / "keys" / "timm"
FIXTURES = sorted({path.stem for path in TIMM.glob("*.json")} & set(list_models()))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 5), name="conv")(x)
        x = nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name="depthwise")(x)
        x = nn.BatchNorm(use_running_average=True, name="bn_0")(x)
        return nn.Dense(4, name="point")(x) * self.param("gamma", nn.initializers.ones, (4,)).reshape(1, 1, 1, 4)


class Toy(nn.Module):
    """One of every kind of tensor."""

    num_classes: int = 3
    image_size: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        x = Inner(name="stages_1")(x)
        x = nn.LayerNorm(name="old_norm")(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


INFO = ModelInfo(
    Toy,
    {},
    Images(4, channels=2),
    files=TimmFiles(
        pointwise=r"/point/kernel$",
        buffers=r"num_batches_tracked$|\.index$",
        renames=((r"^old_norm\.", "norm."),),
        make_buffers=lambda module: {"stages.1.index": np.arange(module.image_size)},
    ),
)
SHAPES = {
    "stages.1.conv.weight": (6, 2, 3, 5),
    "stages.1.conv.bias": (6,),
    "stages.1.depthwise.weight": (6, 1, 3, 3),
    "stages.1.bn.0.weight": (6,),
    "stages.1.bn.0.bias": (6,),
    "stages.1.bn.0.running_mean": (6,),
    "stages.1.bn.0.running_var": (6,),
    "stages.1.point.weight": (4, 6, 1, 1),
    "stages.1.point.bias": (4,),
    "stages.1.gamma": (4,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "head.weight": (3, 4),
    "head.bias": (3,),
}


def random_state(shapes=SHAPES):
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}


def test_keys_and_shapes():
    assert {entry.key: entry.shape for entry in entries(INFO, Toy())} == SHAPES


@pytest.mark.parametrize("name", FIXTURES)
def test_the_models_keys_are_timms(name):
    info, module = model_info(name), create_model(name)
    wanted = {key: tuple(shape) for key, shape in json.loads((TIMM / f"{name}.json").read_text()).items()}
    ours = {entry.key: entry.shape for entry in entries(name, module)}
    assert ours == {key: shape for key, shape in wanted.items() if not re.search(info.files.buffers, key)}
    buffers = info.files.make_buffers(module) if info.files.make_buffers else {}
    assert {**ours, **{key: value.shape for key, value in buffers.items()}} == wanted


def test_layouts():
    """Each number of timm's layout lands at its own indices: outputs, inputs, window become window, inputs, outputs."""
    state = random_state()
    variables = from_timm(INFO, Toy(), state)
    inner = variables["params"]["stages_1"]
    for index in np.ndindex(6, 2, 3, 5):
        o, i, y, x = index
        assert inner["conv"]["kernel"][y, x, i, o] == state["stages.1.conv.weight"][index]
    for o, y, x in np.ndindex(6, 3, 3):
        assert inner["depthwise"]["kernel"][y, x, 0, o] == state["stages.1.depthwise.weight"][o, 0, y, x]
    for o, i in np.ndindex(4, 6):
        assert inner["point"]["kernel"][i, o] == state["stages.1.point.weight"][o, i, 0, 0]
    for o, i in np.ndindex(3, 4):
        assert variables["params"]["head"]["kernel"][i, o] == state["head.weight"][o, i]
    np.testing.assert_array_equal(variables["batch_stats"]["stages_1"]["bn_0"]["var"], state["stages.1.bn.0.running_var"])
    np.testing.assert_array_equal(variables["params"]["old_norm"]["scale"], state["norm.weight"])


def test_variables_are_the_modules():
    init = Toy().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))
    ours = from_timm(INFO, Toy(), random_state())
    assert jax.tree.structure(ours) == jax.tree.structure(init)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(lambda a: (a.shape, a.dtype), init)


def test_round_trip_is_exact():
    state = random_state()
    back = to_timm(INFO, Toy(), from_timm(INFO, Toy(), {**state, "stages.1.bn.0.num_batches_tracked": np.array(5)}))
    assert back.keys() == {*state, "stages.1.index"}
    np.testing.assert_array_equal(back.pop("stages.1.index"), np.arange(4))
    for key, value in back.items():
        assert value.flags.c_contiguous
        np.testing.assert_array_equal(value, state[key], strict=True, err_msg=key)


def test_half_precision_becomes_float32_exactly():
    state = {key: value.astype(jnp.bfloat16) for key, value in random_state().items()}
    head = from_timm(INFO, Toy(), state)["params"]["head"]["kernel"]
    np.testing.assert_array_equal(head, state["head.weight"].astype(np.float32).T, strict=True)


def test_every_difference_is_listed():
    state = random_state()
    del state["stages.1.gamma"]
    state["stages.1.extra"] = np.zeros((2, 2), np.float32)
    state["head.weight"] = np.zeros((5, 4), np.float32)
    state["head.bias"] = np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="from_timm") as caught:
        from_timm(INFO, Toy(), state)
    assert str(caught.value).splitlines()[1:-1] == [
        "1 missing",
        "  - stages.1.gamma [4]",
        "1 unexpected",
        "  + stages.1.extra [2, 2]",
        "2 of another shape or dtype",
        "  - head.bias [3]",
        "  + head.bias [3] int64",
        "  - head.weight [3, 4]",
        "  + head.weight [5, 4]",
    ]


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"200 unexpected\n(.*\n){20}  and 180 more lines\n"):
        from_timm(INFO, Toy(), {**random_state(), **{f"extra.{i}": np.zeros(1, np.float32) for i in range(200)}})


def test_other_variables_are_refused():
    variables = from_timm(INFO, Toy(), random_state())
    with pytest.raises(ValueError, match=r"to_timm: the variables do not fit(.*\n)*.*\+ head\.weight \[3, 4\]"):
        to_timm(INFO, Toy(num_classes=7), variables)
    with pytest.raises(ValueError, match=r"2 missing\n(.*\n)*  - stages\.1\.bn\.0\.running_var \[6\]"):
        to_timm(INFO, Toy(), {"params": variables["params"]})
