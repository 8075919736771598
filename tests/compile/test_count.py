"""Counts of compiled programs against counts by hand. The two files are an H100's programs as XLA wrote them."""

from pathlib import Path

import pytest

from lbpwht_jax.compile.count import count
from lbpwht_jax.compile.hlo import parse

HERE = Path(__file__).parent


def program(*entry, others=""):
    """A program of these instructions of its entry, after other computations."""
    lines = "\n".join(f"  {line}" for line in entry)
    return parse(f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{lines}\n}}\n")


def test_three_kernels_by_hand():
    # y = tanh(x @ w) + v and the sum of y over its rows, in bfloat16: x [512, 384], w [384, 640], v [512, 640]
    counts = count(parse((HERE / "three_kernels_h100.hlo").read_text()))
    x, w, y, total = 512 * 384 * 2, 384 * 640 * 2, 512 * 640 * 2, 640 * 4
    assert [kernel.bytes for kernel in counts.kernels] == [x + w + y, 3 * y, y + total]
    assert [kernel.flops for kernel in counts.kernels] == [2 * 512 * 384 * 640, 0, 0]
    assert counts.launches == 3 and counts.collectives == {}
    seconds = [kernel.seconds(1e12, 1e9) for kernel in counts.kernels]
    assert seconds == pytest.approx([(x + w + y) / 1e9, 3 * y / 1e9, (y + total) / 1e9])
    assert counts.kernels[0].seconds(1e9, 1e12) == pytest.approx(2 * 512 * 384 * 640 / 1e9)
    assert counts.kernels[0].source == "jit(three)/dot_general"


def test_a_loops_body_counts_as_often_as_it_runs():
    # seven times c = tanh(c @ w), c [128, 256], w [256, 256] in bfloat16, the sum of each c kept: a scan
    counts = count(parse((HERE / "loop_h100.hlo").read_text()))
    assert counts.flops == 7 * 2 * 128 * 256 * 256
    inside = {kernel.name: kernel for kernel in counts.kernels if kernel.runs == 7}
    c, w = 128 * 256 * 2, 256 * 256 * 2
    assert inside["custom-call.1"].bytes == c + w + c and inside["loop_convert_fusion"].bytes == 2 * c
    # the update of one number in a row of seven reads the number and where it goes, and writes it
    assert inside["loop_dynamic_update_slice_fusion"].bytes == 2 + 4 + 2
    once = sum(kernel.bytes for kernel in counts.kernels)
    assert counts.bytes - once == 6 * sum(kernel.bytes for kernel in inside.values())


@pytest.mark.parametrize("trips", [5, None], ids=["bound", "unknown"])
def test_a_loop_whose_length_the_compiler_does_not_name(trips):
    bound = "%n = s32[] constant(5)" if trips else "%n = s32[] get-tuple-element(%t), index=0"
    others = f"""
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]) parameter(0)
  %g = f32[8] get-tuple-element(%t), index=1
  %i = s32[] get-tuple-element(%t), index=0
  %e = f32[8] exponential(%g)
  ROOT %r = (s32[], f32[8]) tuple(%i, %e)
}}

%cond (t: (s32[], f32[8])) -> pred[] {{
  %t = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  {bound}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}
"""
    entry = "%a = (s32[], f32[8]) parameter(0)", "ROOT %w = (s32[], f32[8]) while(%a), condition=%cond, body=%body"
    counts = count(program(*entry, others=others))
    runs = {kernel.name: kernel.runs for kernel in counts.kernels}
    assert runs == {"lt": trips or 1, "e": trips or 1} and counts.loops_of_unknown_length == (0 if trips else 1)


def test_an_operand_used_twice_is_read_once_and_a_slice_is_read_alone():
    others = """
%fused (p0: f32[100,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[100,8] parameter(0)
  %p1 = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = f32[1,8] dynamic-slice(%p0, %p1, %z), dynamic_slice_sizes={1,8}
}
"""
    counts = count(
        program(
            "%a = f32[100,8]{1,0} parameter(0)",
            "%i = s32[] parameter(1)",
            "%b = f32[800]{0} bitcast(%a)",
            '%twice = f32[100,8]{1,0} custom-call(%a, %b), custom_call_target="mine"',
            "ROOT %row = f32[1,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%fused",
            others=others,
        )
    )
    assert {kernel.name: kernel.bytes for kernel in counts.kernels} == {"twice": 2 * 3200, "row": 32 + 4 + 32}


def test_a_tpu_moves_what_is_in_its_main_memory_padded_to_tiles():
    # spaces other than 0 and 5 are on the chip; bfloat16 comes in tiles of 8 x 128, so that 197 tokens take the room of 200
    x, w = "bf16[64,197,768]{2,1,0:T(8,128)(2,1)", "f32[700,2304]{1,0:T(8,128)"
    others = f"""
%fused (p0: bf16[64,197,768], p1: f32[700,2304]) -> bf16[64,197,768] {{
  %p0 = {x}S(1)}} parameter(0)
  %p1 = {w}}} parameter(1)
  ROOT %e = {x}}} add(%p0, %p1)
}}
"""
    counts = count(
        program(
            f"%x = {x}}} parameter(0)",
            f"%w = {w}}} parameter(1)",
            f"%c = ({x}S(1)}}, {x}}}, u32[]{{:S(2)}}) copy-start(%x)",
            f"%d = {x}S(1)}} copy-done(%c)",
            f"%s = (({w}}}), f32[100,2304]{{1,0:T(8,128)S(1)}}, s32[]{{:S(2)}}) slice-start(%w), slice={{[0:100], [0:2304]}}",
            "%t = f32[100,2304]{1,0:T(8,128)S(1)} slice-done(%s)",
            f"%f = {x}}} fusion(%d, %w), kind=kLoop, calls=%fused",
            f"%on = {x}S(1)}} negate(%d)",
            '%v = f32[1000]{0:T(1024)} custom-call(%t), custom_call_target="mine"',
            f"ROOT %out = {x}S(5)}} copy(%f)",
            others=others,
        )
    )
    array, weights = 64 * 200 * 768 * 2, 704 * 2304 * 4
    assert {kernel.name: kernel.bytes for kernel in counts.kernels} == {
        "c": array,  # read; what is written is on the chip
        "s": 100 * 2304 * 4,
        "f": weights + array,
        "on": 0,
        "v": 1024 * 4,
        "out": 2 * array,
    }


def test_an_update_in_place_on_the_chip_moves_what_it_reads_alone():
    others = """
%fused (p0: f32[16,128], p1: f32[8,128]) -> f32[16,128] {
  %p0 = f32[16,128]{1,0:T(8,128)S(1)} parameter(0)
  %p1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %z = s32[] constant(0)
  ROOT %u = f32[16,128]{1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %z, %z)
}
"""
    for space, written in (("S(1)", 0), ("", 8 * 128 * 4)):
        whole = f"f32[16,128]{{1,0:T(8,128){space}}}"
        entry = (
            f"%a = {whole} parameter(0)",
            "%b = f32[8,128]{1,0:T(8,128)} parameter(1)",
            f"ROOT %f = {whole} fusion(%a, %b), kind=kLoop, calls=%fused",
        )
        assert count(program(*entry, others=others)).bytes == 8 * 128 * 4 + written


def test_attention_of_cudnn():
    # batch 8, 256 tokens, 12 heads of 64: forward 4 and backward 10 x batch x heads x tokens^2 x size
    scores = 'backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", '
    scores += '"dimensions": ["8", "12", "256", "256"]}}}'
    qkv = "bf16[8,256,12,64]{3,2,1,0}"
    counts = count(
        program(
            f"%q = {qkv} parameter(0)",
            f"%k = {qkv} parameter(1)",
            f"%f = (bf16[8,12,256,64]{{3,1,2,0}}, f32[8,12,256]{{2,1,0}}, u8[4096]{{0}}) custom-call(%q, %k, %k), "
            f'custom_call_target="__cudnn$fmhaSoftmax", {scores}',
            f"ROOT %b = ({qkv}, {qkv}, {qkv}, u8[0]{{0}}) custom-call(%q, %k, %k), "
            f'custom_call_target="__cudnn$fmhaSoftmaxBackward", {scores}',
        )
    )
    one = 8 * 12 * 256**2 * 64
    array = 8 * 256 * 12 * 64 * 2
    assert [kernel.flops for kernel in counts.kernels] == [4 * one, 10 * one]
    assert [kernel.bytes for kernel in counts.kernels] == [3 * array + 8 * 12 * 256 * 4, 5 * array]


@pytest.mark.parametrize("target", ["", "__cudnn$convForward", "__cudnn$convBackwardFilter", "__cudnn$convBackwardInput"])
def test_convolutions(target):
    # a 3x3 window at steps of 2 over 8x8 with padding 0 before and 1 after: the last one hangs over the edge by one, so that
    # 11 of 12 pairs of an output and a kernel position along each axis meet the image
    image, kernel, result = "f32[2,8,8,4]", "f32[3,3,4,6]", "f32[2,4,4,6]"
    takes = {"__cudnn$convBackwardFilter": (image, result, kernel), "__cudnn$convBackwardInput": (result, kernel, image)}
    first, second, made = takes.get(target, (image, kernel, result))
    window = "window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f"
    call = f'custom-call(%a, %b), {window}, custom_call_target="{target}"' if target else f"convolution(%a, %b), {window}"
    counts = count(program(f"%a = {first} parameter(0)", f"%b = {second} parameter(1)", f"ROOT %c = {made} {call}"))
    assert counts.flops == 2 * (11 * 11) * 2 * 4 * 6


def test_collectives_in_whole_arrays_and_what_a_ring_sends():
    counts = count(
        program(
            "%a = f32[4,8] parameter(0)",
            "%r = f32[4,8] all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%sum",
            "%g = (f32[4,8], f32[16,8]) all-gather-start(%r), dimensions={0}",
            "%h = f32[16,8] all-gather-done(%g)",
            "ROOT %s = f32[4,8] reduce-scatter(%h), dimensions={0}, to_apply=%sum",
        )
    )
    assert counts.collectives == {"all-reduce": 128, "all-gather": 512, "reduce-scatter": 512}
    assert counts.link_bytes(4) == 3 / 4 * (2 * 128 + 512 + 512)
    assert counts.link_bytes(1) == 0


def test_a_collective_that_goes_on_beside_other_kernels_counts_once():
    others = "".join(
        f"""
%fused.{n} (p: f32[4,8]) -> f32[16,8] {{
  %p = f32[4,8] parameter(0)
  ROOT %g.{n} = f32[16,8] all-gather(%p), dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}
}}
"""
        for n, chain in enumerate((7, 7, 8))
    )
    fusions = [f"%f.{n} = f32[16,8] fusion(%a), kind=kCustom, calls=%fused.{n}" for n in range(3)]
    assert count(program("%a = f32[4,8] parameter(0)", *fusions, others=others)).collectives == {"all-gather": 2 * 512}


def test_a_text_without_a_program():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("HloModule m")
