import dataclasses

import pytest

from lbpwht_jax.compile.fit import largest_batch
from lbpwht_jax.compile.request import Row


def compiler(chips, fixed, each, memory, tells=True):
    """A compiler of steps that take ``fixed + each(images of a chip)`` bytes, and how often it was asked."""
    asked = []

    def compile_batch(size):
        assert size > 0 and size % chips == 0 and size not in asked
        asked.append(size)
        total = fixed + each(size // chips)
        row = Row(
            "m", "full", "t", size, argument_bytes=fixed, output_bytes=0, alias_bytes=0, temp_bytes=total - fixed, code_bytes=0
        )
        row = dataclasses.replace(row, fits=total <= memory)
        return row if tells or row.fits else dataclasses.replace(row, temp_bytes=None)

    return compile_batch, asked


@pytest.mark.parametrize("tells", [True, False], ids=["tells by how much", "says no more than no"])
@pytest.mark.parametrize("start", [1, 64, 4096])
@pytest.mark.parametrize("chips", [1, 8])
@pytest.mark.parametrize("each", [lambda n: 90 * n, lambda n: 128 * -(-70 * n // 128)], ids=["line", "steps"])
def test_the_largest_batch_is_found_with_few_compilations(each, chips, start, tells):
    memory, fixed = 100_000, 10_000
    compile_batch, asked = compiler(chips, fixed, each, memory, tells)
    found = largest_batch(compile_batch(start * chips), chips, memory, compile_batch)
    best = max(n for n in range(2000) if fixed + each(n) <= memory) * chips
    assert best - max(chips, best // 64) <= found <= best
    assert found in asked and len(asked) <= 12


def test_nothing_fits():
    compile_batch, asked = compiler(4, 200, lambda n: n, 100, tells=False)
    assert largest_batch(compile_batch(256), 4, 100, compile_batch) == 0
    assert min(asked) == 4
