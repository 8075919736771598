import pytest

from lbpwht_jax.compile import CHIPS, parse_target


@pytest.mark.parametrize(
    "name, platform, chip, devices",
    [
        ("v5e:2x2", "tpu", "v5e", 4),
        ("v5e:16x16", "tpu", "v5e", 256),
        ("v6e:1x1", "tpu", "v6e", 1),
        ("v6e", "tpu", "v6e", 1),
        ("v5p:2x2x1", "tpu", "v5p", 4),
        ("v4:2x2x4", "tpu", "v4", 16),
        ("h100", "cuda", "h100", 1),
        ("h200:2", "cuda", "h200", 2),
        ("cpu:8", "cpu", "", 8),
        ("cpu", "cpu", "", 1),
    ],
)
def test_targets(name, platform, chip, devices):
    target = parse_target(name)
    assert (target.name, target.platform, target.chip, target.devices) == (name, platform, chip, devices)
    assert target.limits is (CHIPS[chip] if chip else None)


@pytest.mark.parametrize("name", ["v3:2x2", "h100:a", "v5e:0x1", "gpu", "", "cpu:2x2", "v5e:2x", "h100:2x2"])
def test_unknown_targets(name):
    with pytest.raises(ValueError, match=r"unknown target .*write v5e:2x2"):
        parse_target(name)


def test_a_topology_of_the_wrong_number_of_axes():
    with pytest.raises(ValueError, match=r"the chips of a v5p stand along 3 axes, such as v5p:2x2x1"):
        parse_target("v5p:2x2")


def test_a_chip_reads_its_memory_in_a_fraction_of_a_second_and_computes_hundreds_of_flops_meanwhile():
    # every maker's numbers lie between these; a slip by a thousand does not
    for name, chip in CHIPS.items():
        assert 0.005 < chip.memory / chip.bandwidth < 0.06, name
        assert 100 < chip.flops / chip.bandwidth < 600, name
        assert 2 < chip.bandwidth / chip.links < 12, name
        assert chip.source, name
