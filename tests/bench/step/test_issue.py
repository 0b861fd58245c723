"""Issue slots counted in hand-written SASS, occupancy by hand, and the bounds of real kernels compiled for an H100."""

import pytest
import torch
import triton
import triton.language as tl

from bench.step import issue
from bench.step.issue import (
    H100,
    LAYERS,
    IssueOptions,
    Loop,
    by_class,
    convolution_trips,
    issue_bound,
    longest_path,
    loops,
    matrix_flops,
    occupancy,
    parse,
    record,
    record_convolution,
)
from engine.errors import UserError
from engine.measuring import records
from kernels.convolution import tilings
from kernels.guess import launch_guess_labels

# A loop over rows around a loop over channels with a branch in it, and a second loop that is left from its middle.
SASS = """
\tcode for sm_90a
\t\tFunction : kernel
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000fe20000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;                   /* 0x0000000000007919 */
        /*0020*/                   LDG.E.128 R4, desc[UR8][R2.64] ;     /* 0x000000080204d981 */
        /*0030*/                   LDS R6, [R7] ;                       /* 0x0000000007067984 */
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/              @!P1 BRA 0x80 ;
        /*0060*/                   MUFU.EX2 R8, R8 ;
        /*0070*/                   MUFU.RCP R8, R8 ;
        /*0080*/               @P0 BRA 0x30 ;
        /*0090*/                   STS.128 [R9], R4 ;
        /*00a0*/                   BRA.U UP0, 0x20 ;
        /*00b0*/                   ISETP.GE.AND P0, PT, R0, 0x20, PT ;
        /*00c0*/               @P0 BRA 0xf0 ;
        /*00d0*/                   STL [R1], R4 ;
        /*00e0*/                   BRA 0xb0 ;
        /*00f0*/               @P2 EXIT ;
        /*0100*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0110*/                   STG.E desc[UR8][R2.64], R4 ;
        /*0120*/                   EXIT ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   NOP;
"""


def test_loops_are_found_outermost_first():
    instructions = parse(SASS)
    assert [one.address for one in instructions] == list(range(0, 0x150, 0x10))
    assert instructions[4].name == "HGMMA.64x32x16.F32.BF16" and instructions[5].target == 0x80
    assert [one.address for one in instructions if one.conditional] == [0x50, 0x80, 0xA0, 0xC0, 0xF0]
    assert loops(instructions) == [Loop(0x20, 0xA0, 0), Loop(0x30, 0x80, 1), Loop(0xB0, 0xE0, 0)]
    with pytest.raises(ValueError, match="several functions"):
        parse(SASS + SASS)


def test_the_longest_path_is_counted_with_trips():
    names = longest_path(parse(SASS), (3, 5, 7))
    counts = by_class(names)
    # Two instructions, then three rows of a load, five channels of six and a store with a branch; seven trips of the
    # second loop's test and body; four at the end.
    assert sum(counts.values()) == 2 + 3 * (1 + 5 * 6 + 2) + 7 * 4 + 4
    assert (counts["matrix"], counts["special"], counts["local"], counts["synchronization"]) == (15, 30, 7, 1)
    assert counts["shared"] == 15 + 3 and counts["global"] == 3 + 1
    # 15 products of 64 x 32 x 16, each by four warps.
    assert names["HGMMA.64x32x16.F32.BF16"] == 15 and matrix_flops(names) == 15 * 2 * 64 * 32 * 16 / 4
    assert matrix_flops({"HMMA.16816.F32.BF16": 2, "FADD": 9}) == 2 * 2 * 16 * 8 * 16
    assert by_class(longest_path(parse(SASS), lambda found: [1 + loop.depth for loop in found]))["matrix"] == 2
    with pytest.raises(ValueError, match=r"expected trips of 3 loops, got 2; loops: 0x20 to 0xa0 in 0 loops, 0x30"):
        longest_path(parse(SASS), (1, 1))


def test_the_longer_of_two_branches_is_counted():
    sass = """
        /*0000*/              @!P0 BRA 0x40 ;
        /*0010*/                   FADD R1, R1, R1 ;
        /*0020*/                   EXIT ;
        /*0030*/                   NOP ;
        /*0040*/                   MUFU.EX2 R8, R8 ;
        /*0050*/                   FADD R1, R1, R1 ;
        /*0060*/                   EXIT ;
    """
    assert by_class(longest_path(parse(sass), ())) == {"other": 3, "special": 1}


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        (32, 4, 0, 16),  # 64 warps
        (120, 4, 0, 4),  # 4 warps of 3840 registers a block
        (121, 4, 0, 4),  # 3872 registers are allocated as 4096
        (129, 4, 0, 3),  # 4128 as 4352
        (42, 8, 0, 5),  # 1344 as 1536
        (16, 1, 0, 32),  # blocks
        (32, 4, 99 * 1024, 2),  # 100 of 228 KiB
        (255, 8, 228 * 1024, 0),
    ],
)
def test_occupancy(registers, warps, shared, blocks):
    assert occupancy(registers, warps, shared, H100) == blocks


def guess(classes):
    logits, history = torch.zeros(64, classes), torch.zeros(128, classes)
    return record(launch_guess_labels, logits, history, torch.tensor(0), torch.zeros(classes), 0.5)


def test_a_launch_is_recorded_and_compiled():
    launch = guess(10)
    assert launch.grid == (1,) and launch.arguments["ALIGN"] is True
    assert launch.options == {"num_warps": 4, "enable_fp_fusion": True}
    bound = issue_bound(launch, ())
    assert 0 < bound.registers <= 255 and bound.spilled_bytes == 0 and bound.warps == 4 * bound.blocks > 0
    total = sum(bound.instructions.values())
    assert bound.instructions["special"] > 0 and bound.issue_seconds == pytest.approx(4 * total / (132 * 4 * 1.755e9))
    read_and_written = 2 * 64 * 10 * 4 + 128 * 10 * 4 + 10 * 4 + 8
    assert bound.bytes_seconds == pytest.approx(read_and_written / 3e12)
    assert issue_bound(launch, (), moved=3000).bytes_seconds == pytest.approx(1e-9)
    with pytest.raises(ValueError, match="bool launched 0 kernels, expected one"):
        record(bool)


@triton.jit
def _rows(x, rows, channels):
    for row in range(rows):
        for channel in range(channels):
            at = x + row * channels + channel
            tl.store(at, tl.load(at) + 1)


def test_loops_of_a_compiled_kernel_nest():
    def launch(x):
        _rows[(5,)](x, 32, 64, num_warps=2)

    compiled = issue.compile_launch(record(launch, torch.zeros(2048)), 90)
    found = loops(parse(issue.disassemble(compiled.asm["cubin"])))
    assert {loop.depth for loop in found} == {0, 1}


@triton.jit
def _product(a, b, c):
    rows, columns, terms = tl.arange(0, 64), tl.arange(0, 32), tl.arange(0, 64)
    left = tl.load(a + rows[:, None] * 64 + terms[None, :])
    right = tl.load(b + terms[:, None] * 32 + columns[None, :])
    tl.store(c + rows[:, None] * 32 + columns[None, :], tl.dot(left, right))


@pytest.mark.parametrize(("architecture", "name"), [(80, "HMMA"), (90, "HGMMA")])
def test_operations_of_a_compiled_product(architecture, name):
    a, b = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 32, dtype=torch.bfloat16)
    launch = record(lambda: _product[(1,)](a, b, torch.zeros(64, 32), num_warps=4))
    names = longest_path(parse(issue.disassemble(issue.compile_launch(launch, architecture).asm["cubin"])), ())
    assert any(one.startswith(name) for one in names)
    assert 4 * matrix_flops(names) == 2 * 64 * 32 * 64


@pytest.mark.parametrize(
    ("layer", "which", "excess"),
    [
        ("16->32 32x32, 3x3/1", "forward", 33 / 32),  # The row below the image.
        ("16->32 32x32, 3x3/1", "weight_grad", (18 + 16) / 2 / 16 * 4 / 3),  # Half of the tiles, and an empty stack.
        ("32->64 32x32, 3x3/2", "input_grad", 1),
    ],
)
def test_operations_of_a_convolution_are_those_of_its_shape(layer, which, excess):
    (layer,) = (one for one in LAYERS if str(one) == layer)
    samples, inputs, height, width, outputs, taps, stride = layer.shape
    launch = record_convolution(layer, which, tilings(layer.shape, which, 90)[0])
    assert launch.arguments["ROWS"] == {"forward": 32, "weight_grad": 16, "input_grad": 16}[which]
    bound = issue_bound(launch, convolution_trips(launch))
    products = samples * (height // stride) * (width // stride) * inputs * outputs * taps**2
    assert bound.matrix_seconds == pytest.approx(2 * products * excess / H100.matmul_flops_per_second)
    x, y = 2 * samples * inputs * height * width, 2 * samples * outputs * height * width // stride**2
    sums = sum(value.nbytes for name, value in launch.arguments.items() if name == "partial")
    least = {"forward": x + y, "weight_grad": x + y, "input_grad": 2 * x + 3 * y}[which] + sums
    assert 0 < bound.bytes_seconds * H100.copy_bytes_per_second - least < 50_000, "weights and parameters"


def test_convolutions_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(issue, "LAYERS", LAYERS[1:2])
    out = tmp_path / "issue.jsonl"
    issue.main(IssueOptions(out=out, kernels=("convolution_forward",)))
    (one,) = records.read(out)
    assert (one["kernel"], one["shape"]) == ("convolution_forward", "16->32 32x32, 1x1/1")
    assert one["tiling"] == [64, 32, 32, 16, 4, 1] and (one["programs"], one["warps_of_block"]) == (384, 4)
    assert one["waves"] == pytest.approx(384 / 132 / one["blocks"]) and one["spilled_bytes"] == 0


def test_kernels_are_listed(tmp_path, capsys):
    out = tmp_path / "issue.jsonl"
    issue.main(IssueOptions(out=out, kernels=("guess_labels", "assemble_batch")))
    first, second = records.read(out)
    assert (first["kernel"], second["kernel"]) == ("guess_labels", "assemble_batch")
    assert second["waves"] == pytest.approx(2688 / (second["blocks"] * 132)) and "bfloat16" in second["shape"]
    assert second["bytes_us"] == pytest.approx(7_692_824 / 3e6) and second["issue_us"] > 0
    assert "kernel: assemble_batch; " in capsys.readouterr().out
    with pytest.raises(UserError, match="--kernels: unknown kernel 'guess'"):
        issue.main(IssueOptions(kernels=("guess",)))
