"""The attention kernels on a GPU: values, gradients, bits, and what compute-sanitizer says. Needs engine._C, see kernels/README.md."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import NO_GPU, ROOT
from packs import BF16, FP16, Case, judge, make

from engine import attention
from engine.fused_attention import BLOCK, fused_attention, refusal, tile_list

WHY_NOT = refusal(torch.device("cuda"), BF16, 64, ()) if torch.cuda.is_available() else NO_GPU
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


def launch(case: Case, grad: torch.Tensor) -> list[torch.Tensor]:
    # .cuda() would close the gaps between tokens
    leaves = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x).requires_grad_() for x in (case.q, case.k, case.v)]
    turned = [None if x is None else x.cuda() for x in (case.cosine, case.sine)]
    out = fused_attention(*leaves, case.tiles.cuda(), case.scale, *turned)
    out.backward(grad.cuda())
    return [x.cpu() for x in (out.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1), (32, 8)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("width", [64, 128])
def test_random_documents(width, dtype, heads, kv_heads, rotary, seed):
    lengths = torch.randint(1, 701, (5,), generator=torch.Generator().manual_seed(seed)).tolist() + [1, 64, 1]
    case, grad = make(lengths, heads, kv_heads, width, dtype, rotary, capacity=sum(-(-n // BLOCK) for n in lengths) + 7, gap=8 * seed)
    found = launch(case, grad)
    judge(found, case, lengths, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, launch(case, grad), strict=True)), "another run, other bits"


def test_on_a_stream_of_its_own_and_after_much_else():
    case, grad = make([300, 20], 4, 2, 64, BF16, False)
    expected = launch(case, grad)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        found = launch(case, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("width", [64, 128])
def test_the_run_takes_them(width):
    heads = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8, head_dim=width, windows=(None,))
    path, why = attention.choose("fused", torch.device("cuda"), BF16, heads)
    assert path == "fused", why


def test_more_blocks_than_the_gpu_takes_at_once():
    lengths = torch.randint(1, 101, (200,), generator=torch.Generator().manual_seed(5)).tolist()
    case, grad = make(lengths, 8, 2, 64, BF16, True)
    assert 8 * len(case.tiles) > 4 * torch.cuda.get_device_properties(0).multi_processor_count
    judge(launch(case, grad), case, lengths, grad)


def test_what_lies_beyond_two_to_the_31_is_reached():
    """Some 20 GB: the last document gets the bits that it gets alone."""
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of a GPU's memory")
    lengths, draw = [700] * 750, torch.Generator("cuda").manual_seed(0)
    whole = [torch.randn(sum(lengths), heads, 128, generator=draw, device="cuda", dtype=BF16) for heads in (32, 4, 4, 32)]
    found = []
    for *leaves, grad in (whole, [x[-700:] for x in whole]):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = fused_attention(*leaves, tile_list([700] * (len(grad) // 700)).cuda())
        found.append([x[-700:] for x in (out.detach(), *torch.autograd.grad(out, leaves, grad))])
    assert whole[0].numel() > 2**31 and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_sanitizer_finds_nothing(tool):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("needs compute-sanitizer")
    code = "import sys; sys.path[:0] = ['tests', '.']; import test_kernels_cuda as t; t.launch(*t.make([70, 1, 130], 4, 1, 128, t.BF16, True))"
    done = subprocess.run(["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--kernel-regex=kns=entry", sys.executable, "-c", code], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
