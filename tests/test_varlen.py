"""torch's FlashAttention over packed documents: taken on GPUs where it is right, by heads, windows and types, and not taken where it is wrong."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_device import everywhere, simulated

from engine import attention, varlen_attention
from engine.attention import PackedAttention
from engine.errors import EngineError

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16

ON_A_GPU = """
import torch
from types import SimpleNamespace
from engine import attention, varlen_attention
torch.use_deterministic_algorithms(True)
known, shared = torch.nn.functional.scaled_dot_product_attention, set()


def noted(q, k, v, **options):
    shared.add((q.dtype, q.shape[1] != k.shape[1]))
    assert "attn_mask" not in options or q.shape[1] == k.shape[1]
    return known(q, k, v, **options)


torch.nn.functional.scaled_dot_product_attention = noted
right = varlen_attention.varlen_attention


def taken(spoilt=right, heads=4, kv_heads=2, width=64, windows=(None,), dtype=torch.bfloat16):
    varlen_attention.varlen_attention = spoilt
    given = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, windows=windows)
    path, why = attention.choose("auto", torch.device("cuda"), dtype, given)
    print(path, why)
    return path == "varlen"


def shorter(q, k, v, ends, longest, window):
    out = right(q[:ends[-1]], k[:ends[-1]], v[:ends[-1]], ends, longest, window)
    return torch.cat([out[1:], out[:1]])


for heads, kv_heads, width, windows in ((4, 2, 64, (None,)), (4, 4, 40, (None, 30)), (4, 1, 256, (100,)), (8, 2, 128, (None, 1024))):
    for dtype in (torch.bfloat16, torch.float16):
        assert taken(right, heads, kv_heads, width, windows, dtype), (heads, kv_heads, width, windows, dtype)
assert not taken(dtype=torch.float32) and not taken(width=264) and not taken(width=36)
counts = iter(range(100))
for spoilt in (lambda *given: right(*given) * 1.02, lambda *given: right(*given) + 1e-3 * next(counts), shorter,
               lambda q, k, v, ends, longest, window: right(q, k, v, ends[[0, -1]], len(q), window),
               lambda q, k, v, ends, longest, window: right(q, k, v, ends, longest, window and window + 1),
               lambda q, k, v, ends, longest, window: right(q, k, v, ends, longest, window and window - 1),
               lambda q, k, v, ends, longest, window: right(q, k, v, ends, longest, None),
               lambda q, k, v, ends, longest, window: right(q, k, v, ends.long(), longest, window)):  # which torch refuses
    assert not taken(spoilt, windows=(None, 30)) and not taken(spoilt, windows=(None, 4096))
assert not taken(lambda q, *given: right(q, *given) * (1 if len(q) > 1 else 1.1))  # a lone token
# torch's kernel for single documents is asked to share keys only where FlashAttention will do it: others would write down all scores
assert shared == {(torch.float64, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float16, False)}
shared.clear()
capability, torch.cuda.get_device_capability = torch.cuda.get_device_capability, lambda *_: (7, 5)
packed = attention.PackedAttention([5, 9], torch.device("cuda"))
packed(0, *(torch.randn(14, count, 16, device="cuda", dtype=torch.float16) for count in (4, 2, 2)))
assert shared == {(torch.float16, False)}
print("done")
"""


@pytest.mark.parametrize("device", everywhere((), often=((),)))
def test_it_is_taken_where_it_is_right_and_only_there(device):
    environment = simulated() if device == "simulated" else dict(os.environ)
    environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)])),
                   "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # as distributed.py sets it
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(("heads", "dtype", "capability", "reason"), [
    ({"head_dim": 264}, BF16, (9, 0), "made for heads of multiples of 8 up to 256, not 264"),
    ({}, torch.float32, (9, 0), "made for bf16 and fp16, not float32"), ({}, torch.float16, (7, 5), "made for GPUs of capability 8.0 and newer, not 7.5")])
def test_what_it_does_not_do_goes_by_single_documents(monkeypatch, heads, dtype, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    heads = SimpleNamespace(**{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "windows": (None,), **heads})
    path, why = attention.choose("auto", CUDA, dtype, heads)
    assert path == "sdpa" and why.endswith(f"; not varlen: {reason}")
    with pytest.raises(EngineError, match=f"train.attention=varlen: {reason}; set train.attention=auto"):
        attention.choose("varlen", CUDA, dtype, heads)
    with pytest.raises(EngineError, match="train.attention=varlen: made for CUDA devices, not cpu; set"):
        attention.choose("varlen", CPU, dtype, heads)


def test_a_plan_takes_the_path_that_a_run_will_take_or_refuses_it():
    def heads(width: int = 64, window: int | None = None) -> SimpleNamespace:
        return SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=width, windows=(window,))

    taken = [attention.expected(*given) for given in (("auto", BF16, heads(window=9)), ("auto", torch.float32, heads()), ("auto", BF16, heads(36)),
                                                      ("fused", BF16, heads()), ("sdpa", BF16, heads()), ("reference", BF16, heads()))]
    assert taken == ["varlen", "sdpa", "sdpa", "fused", "sdpa", "reference"]
    for path, dtype, given, reason in (("fused", BF16, heads(window=9), "not made for sliding windows"),
                                       ("cpu", BF16, heads(), "got device cuda, expected cpu"),
                                       ("varlen", torch.float32, heads(), "made for bf16 and fp16, not float32")):
        with pytest.raises(EngineError, match=f"train.attention={path}: {reason}; set train.attention=auto"):
            attention.expected(path, dtype, given)


def test_equal_bits_are_asked_of_it_only_where_the_run_does(monkeypatch):
    """FlashAttention's backward adds in any order unless torch is told otherwise, as train.deterministic=false leaves it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_trial", lambda *_: (1.0, False))
    heads = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=64, windows=(None,))
    assert attention.choose("auto", CUDA, BF16, heads)[0] == "varlen"
    torch.use_deterministic_algorithms(True)
    try:
        path, why = attention.choose("auto", CUDA, BF16, heads)
        assert path == "sdpa" and why.endswith("not varlen: torch's FlashAttention: other bits when run again, expected the same")
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_not_in_16_bits_goes_by_single_documents():
    q, k, v = (torch.randn(30, count, 16) for count in (4, 2, 2))
    found, expected = (PackedAttention([13, 17], CPU, path)(0, q, k, v, 5) for path in ("varlen", "sdpa"))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="varlen attention: 30 tokens and window 5, expected 31$"):
        PackedAttention([31], CPU, "varlen")(0, q.bfloat16(), k.bfloat16(), v.bfloat16(), 5)
    assert varlen_attention.document_ends([13, 17]).tolist() == [0, 13, 30]
