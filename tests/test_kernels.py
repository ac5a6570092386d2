"""The attention kernels, run on the CPU by kernels/emulator.h: values and gradients against float64, and the rules of the machine.

Every launch must leave no word read before it was written or across a missing barrier, no bank conflict, nothing written
outside of a tensor. Bugs that such tests must see are planted in copies of the sources.
"""

import math
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from emulation import SOURCES, Emulator, Report, run_backward, run_forward
from packs import BF16, FP16, LIMIT, Case, by_torch, judge, make, off, rotate
from torch import Tensor

from engine.fused_attention import BLOCK, tile_list

SMALLEST_SHARED = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120; sm_80 and sm_90 have more
RAGGED = [1, 65, 130, 1, 37]


def launch(case: Case, grad: Tensor, seed: int = 0, kernels=None) -> tuple[list[Tensor], Tensor, list[Report]]:
    out, lse, forward = run_forward(case, seed, kernels)
    grads, backward = run_backward(case, out, lse, grad.contiguous(), seed, kernels)
    return [out, *grads], lse, [forward, backward]


def obeys(reports: list[Report]) -> None:
    for report in reports:
        assert report.errors == 0, f"{report.errors} errors, first: {report.first_error.decode()}"
        assert report.conflicts == 0, f"{report.conflicts} bank conflicts in {report.passes} passes"
        assert report.shared_bytes <= SMALLEST_SHARED


def check(lengths: list[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype, rotary: bool, capacity: int | None = None, gap: int = 0,
          seed: int = 0, kernels=None) -> None:
    case, grad = make(lengths, heads, kv_heads, width, dtype, rotary, capacity, gap)
    found, lse, reports = launch(case, grad, seed, kernels)
    obeys(reports)
    judge(found, case, lengths, grad)
    assert off(rows_of(lse, case.tiles, lengths), log_sum_exp(case, lengths)) <= LIMIT[dtype]


def rows_of(lse: Tensor, tiles: Tensor, lengths: list[int]) -> Tensor:
    """(heads, tiles, BLOCK) -> (heads, tokens); what lies past a document's end is infinite."""
    flat, found, slot = lse.flatten(1), [], 0
    for length in lengths:
        blocks = -(-length // BLOCK)
        rows = flat[:, slot * BLOCK : (slot + blocks) * BLOCK]
        assert bool((rows[:, length:] == math.inf).all()), "lse past the end of a document"
        found.append(rows[:, :length])
        slot += blocks
    return torch.cat(found, 1)


def log_sum_exp(case: Case, lengths: list[int]) -> Tensor:
    q, k = case.q.double(), case.k.double()
    if case.cosine is not None:
        q, k = (rotate(x, case.cosine.double()[:, None], case.sine.double()[:, None]) for x in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (torch.einsum("thc,shc->hts", a, b) * case.scale for a, b in zip(q.split(lengths), k.split(lengths), strict=True))
    return torch.cat([one.masked_fill(torch.ones_like(one).triu(1).bool(), -math.inf).logsumexp(-1) for one in scores], 1)


# ---- Values and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("width", [64, 128])
def test_ragged_documents(width, dtype, rotary, heads, kv_heads):
    check(RAGGED if heads < 8 else [1, 65, 37], heads, kv_heads, width, dtype, rotary, capacity=16, gap=16 * (heads == 4))


@pytest.mark.parametrize(("width", "dtype"), [(64, BF16), (128, FP16)])
def test_a_long_document_among_short_ones(width, dtype):
    check([3, 700, 1], 1, 1, width, dtype, width == 128)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [63], [64], [65], [127, 128, 129], []])
def test_borders_of_blocks(lengths):
    if lengths:
        check(lengths, 2, 1, 64, BF16, False)
    else:  # a batch of capacity alone
        case, grad = make([64], 2, 1, 64, BF16, False)
        case.tiles = torch.zeros(4, 4, dtype=torch.int32)
        found, _, reports = launch(case, grad)
        assert reports[0].mma == reports[1].mma == 0 and all(bool(x.isnan().all()) for x in found)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "dtype", "rotary"), list(product([64, 128], [BF16, FP16], [False, True])))
def test_the_whole_matrix(width, dtype, rotary, seed):
    draw = torch.Generator().manual_seed(seed)
    for heads, kv_heads in [(1, 1), (4, 1), (8, 1), (8, 2), (6, 2)]:
        longest = 700 // (heads if seed else 1)
        lengths = torch.randint(1, longest + 1, (4,), generator=draw).tolist() + [1, 1 + seed]
        check(lengths, heads, kv_heads, width, dtype, rotary, capacity=sum(-(-n // BLOCK) for n in lengths) + 5, gap=8 * seed, seed=seed)


def test_large_scores_stay_finite():
    """One key far ahead of all others; exponentials of the differences only."""
    case, grad = make([150, 70], 2, 1, 64, FP16, False)
    case.q *= 30
    found, lse, reports = launch(case, grad)
    obeys(reports)
    exact = by_torch(case, [150, 70], grad, torch.float64)
    assert all(bool(x.isfinite().all()) for x in (*found, rows_of(lse, case.tiles, [150, 70])))
    assert off(found[0], exact[0]) <= LIMIT[FP16] and float(lse[lse.isfinite()].max()) > 100


# ---- Determinism and work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 128])
def test_bits_depend_neither_on_the_order_of_the_lanes_nor_on_the_neighbours(width):
    lengths = [70, 5, 130]
    case, grad = make(lengths, 4, 2, width, BF16, True, capacity=9)
    first, _, reports = launch(case, grad, seed=1)
    again, _, others = launch(case, grad, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert [one.counts() for one in reports] == [other.counts() for other in others]
    begin = 0
    for length in lengths:
        end = begin + length
        alone = Case(*(x[begin:end] for x in (case.q, case.k, case.v)), tile_list([length]), case.scale, case.cosine[begin:end], case.sine[begin:end])
        found, _, _ = launch(alone, grad[begin:end], seed=3)
        assert all(torch.equal(one, whole[begin:end]) for one, whole in zip(found, first, strict=True))
        begin = end


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 64), (4, 1, 64), (4, 2, 128)])
def test_work_is_that_of_the_documents_alone(heads, kv_heads, width):
    """Counted in pieces of 16 x 16 scores, of which a warp takes those that a token of its 16 rows, or of either half of its 32, sees, and no other."""
    lengths = [200, 1, 64, 65, 18]
    case, grad = make(lengths, heads, kv_heads, width, BF16, False, capacity=20)
    _, _, (forward, backward) = launch(case, grad)
    rows = 32 if width == 64 else 16  # of a warp in the backward; in the forward 32
    sixteens = [-(-length // 16) for length in lengths]  # that have tokens, of a document
    pieces, steps = heads * sum(n * (n + 1) // 2 for n in sixteens), width // 16
    # A piece takes, of each of its products, `steps` times two mma.
    assert forward.mma == 2 * 2 * steps * pieces and backward.mma == 7 * 2 * steps * pieces

    # An ldmatrix.x4 of the other operand serves all of a warp's rows. Besides, the forward reads q, in whole blocks; grad_q's kernel q, grad_out
    # and out, of warps that have tokens; grad_k's, for each strip that a warp takes of a block of queries, its keys and values.
    blocks = heads * sum(-(-length // BLOCK) for length in lengths)
    warps = [(length, first) for length in lengths for first in range(0, length, rows)]
    before = heads * sum(-(-min(length, first + rows) // 16) for length, first in warps)  # sixteens of keys that a warp's queries see
    after = heads * sum(-(-length // 16) - first // 16 for length, first in warps)  # of queries that see a warp's keys
    strips = heads * sum(taken(length, first, 32) for length, first in warps)
    seen = heads * sum(-(-min(length, first + 32) // 16) for length in lengths for first in range(0, length, 32))
    assert forward.ldmatrix == 2 * steps * seen + BLOCK // 16 * steps * blocks
    assert backward.ldmatrix == steps * (3 * before + 4 * after) + rows // 16 * steps * (3 * heads * len(warps) + 2 * strips)

    # An exponential for each score of a piece; in the forward, two more a lane, 16 rows and strip of keys for what came before; in the backward
    # none for what the diagonal hides, in a piece for each 16 rows that have tokens.
    active = heads * sum(sixteens)
    strips = heads * sum(-(-(n + 1) // (2 if width == 64 else 1)) for count in sixteens for n in range(count))
    assert forward.exp2 == 256 * pieces + 2 * 32 * strips and backward.exp2 == 2 * (256 * (pieces - active) + 136 * active)

    # Blocks that are whole are copied whole; of the last of a document, the tokens that it has.
    rows = [[min(BLOCK, length - i * BLOCK) for i in range(-(-length // BLOCK))] for length in lengths]
    keys = sum(sum(document[: i + 1]) for document in rows for i in range(len(document)))
    assert forward.copied_bytes == 2 * width * heads * (sum(lengths) + 2 * keys)


def taken(length: int, key: int, strip: int) -> int:
    """Strips of queries in which the keys of a warp, from this one on, are seen."""
    return sum(-(-min(BLOCK, length - query) // strip) - max(0, key - query) // strip for query in range(key // BLOCK * BLOCK, length, BLOCK))


def test_tiles_are_longest_first_and_name_every_block_once():
    tiles = tile_list([130, 1, 64, 700])
    assert tiles.dtype == torch.int32 and tuple(tiles.shape) == (16, 4)
    used = tiles.tolist()
    assert sorted(used) == sorted([start, length, block, slot] for start, length, slot in ((0, 130, 0), (130, 1, 3), (131, 64, 4), (195, 700, 5))
                                  for block in range(-(-length // BLOCK)))
    assert [tile[2] for tile in used] == sorted((tile[2] for tile in used), reverse=True)


# ---- Planted bugs --------------------------------------------------------------------------------------------------------

# What is changed where, the first time it occurs; and what then is seen.
ONLY = ("block.h", r"if \(params.type == BF16\) .*\n.*", "return params.head_dim == 64 ? body(Kind<bf16, 64>()) : 1;")  # compiles in a third of the time
PLANTED = {
    "missing wait": ("block.h", r"wait_and_rotate<0, ROWS>", "wait_and_rotate<1, ROWS>", "before the copy to it was waited for"),
    "missing barrier": ("block.h", r"simt.barrier\(\);(  // this stage)", r"\1", "race: |before the copy"),
    "mask off by one": ("forward.cu", r"key > query", "key > query + 1", "out: "),
    "wrong fragment": ("block.h", r"columns\[0\], columns\[1\]", "columns[0], columns[2]", "out: "),
    "document boundary": ("block.h", r"p.v\) \+ place.start", "p.v) + 0", "out: "),
}
RARER = {
    "barrier of the backward": ("backward.cu", r"simt.barrier\(\);(  // this stage)", r"\1", "race: |before the copy"),
    "barrier before what was q's stage": ("backward.cu", r"simt.barrier\(\);\n( *keys.load)", r"\1", "race: |before the copy"),
    "copy into the stage in use": ("backward.cu", r"step % 2 \* STAGE", "0 * step * STAGE", "before the copy to it was waited for|race: "),
    "rows of the next document": ("backward.cu", r"\? BLOCK : tile.length - \(place.blocks - 1\) \* BLOCK", "? BLOCK : BLOCK", "grad_[kv]: "),
    "rows past the end are written": ("block.h", r"if \(row < rows\) simt.store16", "if (row <= rows) simt.store16", "written outside"),
    "first head's keys for all": ("block.h", r"kv_head = head / \(p.heads / p.kv_heads\)", "kv_head = head % p.kv_heads", "out: "),
    "no swizzle": ("block.h", r"\(lane / 16 \^ lane % 8\)", "(lane / 16)", "bank conflicts"),
    "banks": ("block.h", r"odd = row & 1", "odd = 0", "bank conflicts"),
    "sum not over the quad": ("forward.cu", r"sum\[half\] \+= simt.xor_lane\(sum\[half\], 2\);", "", "out: "),
    "largest score not over the quad": ("forward.cu", r"most = fmaxf\(most, simt.xor_lane\(most, 2\)\);", "", "out: "),
    "delta forgotten": ("backward.cu", r" - delta\[half\]", "", "grad_q: "),
    "lse of padded rows": ("forward.cu", r"row < rows \? (.*) : INFINITY", r"\1", "past the end"),
    "turned the wrong way back": ("block.h", r"x \* c.x \+ second\[0\]", "x * c.x - second[0]", "grad_q: "),
    "mask of the keys": ("backward.cu", r"(key > query);\n(.*\n){0,3}?(.*scores\[part\]\[n\]\[i\] = hidden)", r"key >= query;\n\2\3", "grad_[kv]: "),
    "a piece too few under the diagonal": ("forward.cu", r"0b1011", "0b0011", "out: "),
    "a piece too few of grad_q": ("backward.cu", r"column <= row", "column < row", "grad_q: "),
    "last rows of a second half": ("forward.cu", r"(half_empty = place.rows) <= warp \* KEYS \+ 16", r"\1 < warp * KEYS + 32", "out: "),
    "last keys of a second half": ("backward.cu", r"row \* 16 < place.rows && column", "row * 16 + 15 < place.rows && column", "grad_[kv]: "),
    "every other row turned": ("block.h", r"begin \+= AHEAD", "begin += 2 * AHEAD", "out: "),
    "last queries left out": ("backward.cu", r"column \* 16 < rows", "column * 16 + 15 < rows", "grad_[kv]: "),
    "a warp too many left out": ("backward.cu", r"(active = warp \* B::WARP_ROWS) <", r"\1 + 15 <", "grad_q: "),
    "barrier inside of a guard": ("backward.cu", r"(simt.barrier\(\);  // this stage)", r"if (!active) continue;\n\1", "nobody|never"),
    "uneven barrier": ("forward.cu", r"(simt.barrier\(\);\n *T \*out)", r"if (simt.thread() < 32) \1", "race: |different calls|never reach"),
}


def copied(tmp_path: Path, *changes: tuple[str, str, str]) -> Path:
    """The kernels' sources with changes."""
    sources = tmp_path / "kernels"
    shutil.copytree(SOURCES, sources)
    for name, before, after in (ONLY, *changes):
        text, times = re.subn(before, after, (sources / name).read_text(), count=1)
        assert times == 1, f"{name} has no {before!r} any more"
        (sources / name).write_text(text)
    return sources


@pytest.mark.parametrize("bug", [*PLANTED, *(pytest.param(name, marks=pytest.mark.faults) for name in RARER)])
def test_planted_bugs_are_seen(tmp_path, bug):
    *change, seen = (PLANTED | RARER)[bug]
    kernels = Emulator(copied(tmp_path, tuple(change)))
    with pytest.raises(AssertionError, match=seen):
        for lengths, rotary in (([130, 65], False), ([90, 140], True)):
            check(lengths, 4, 2, 64, BF16, rotary, kernels=kernels)


@pytest.mark.faults
def test_nothing_is_seen_where_nothing_is_planted(tmp_path):
    kernels = Emulator(copied(tmp_path))
    for lengths, rotary in (([130, 65], False), ([90, 140], True)):
        check(lengths, 4, 2, 64, BF16, rotary, kernels=kernels)
