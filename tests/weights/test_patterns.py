"""Regular expressions from files: what names modules is matched, what may take for ever is refused."""

import re
import time

import pytest

from lbpwht_jax.weights.patterns import compile_pattern

KEY = "base.model.encoder.blocks.11.attention.self.query_key_value.proj"


@pytest.mark.parametrize(
    "pattern",
    [
        re.escape(KEY),
        r"blocks.11.attn",
        r".*\.layers\.(0|1|2|3|4|5|6|7|8|9|10|11|12|13|14|15|16|17|18|19|20|21|22|23)\.self_attn",
        r"blocks\.(?:1|2)\.mlp\.fc[12]$",
        r"^blocks\.\d+\.mlp\..*",
        r"[\w.]*proj",
        r"a{2,3}",
        "",
    ],
)
def test_patterns_that_name_modules(pattern):
    assert compile_pattern(pattern, "here").pattern == pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*x",
        "(.|.)*x",
        ".*.*.*.*x",
        "(b|b)(a|a)(s|s)(e|e)(.|.)(m|m)(o|o)(d|d)(e|e)(l|l)(.|.)(e|e)(n|n)(c|c)(o|o)(d|d)(e|e)(r|r)(.|.)(b|b)(l|l)x",
        ".?" * 40 + "x",
        r"(.)\1",
        "(?=a)b",
        "((a))",
        "a{2}{3}",
    ],
)
def test_patterns_that_may_take_for_ever(pattern):
    with pytest.raises(ValueError, match=r"^here: .*(may take for ever|is no regular expression: multiple repeat)"):
        compile_pattern(pattern, "here")


@pytest.mark.parametrize("pattern", ["[" * 100_000, "(" * 100_000, "a" * 501])
def test_long_patterns(pattern):
    with pytest.raises(ValueError, match=rf"a pattern of {len(pattern)} characters is longer than the 500"):
        compile_pattern(pattern, "here")


@pytest.mark.parametrize("pattern", ["(" * 400, "fc[", "a{99999999999}", "(?P<n>"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(ValueError, match=r"^here: .* is no regular expression"):
        compile_pattern(pattern, "here")


@pytest.mark.parametrize("pattern", [".*.*.*x", "[a-z.]*[a-z.]*[a-z.]*x", "(b|b)(a|a)(s|s)(e|e)(.|.)(m|m)(o|o)" + ".*x"])
def test_the_slowest_that_are_taken_end_soon(pattern):
    compiled = compile_pattern(pattern, "here")
    start = time.process_time()
    assert not compiled.fullmatch(KEY.replace("x", "y"))
    assert time.process_time() - start < 2  # a million steps take a tenth of a second
