"""The fused kernels as the engine uses them, with the emulator in the place of a GPU: the operators, and every path of attention alike."""

import json
import sys
from itertools import count
from types import ModuleType, SimpleNamespace

import pytest
import torch
from emulation import operators
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from engine import attention, bench, fused_attention, precision, verify
from engine.attention import PackedAttention
from engine.errors import BUG, USER, EngineError
from engine.fused_attention import tile_list
from engine.loss import summed_cross_entropy
from engine.models import weights

CPU, BF16 = torch.device("cpu"), torch.bfloat16
HEADS = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=64, windows=(None,))
LENGTHS = [70, 1, 9, 50]
COUNT = count()


@pytest.fixture(autouse=True, scope="module")
def emulated():
    operators()


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    """Documents for the trial before a run; the emulator would take a minute for those that a GPU is tried on."""
    monkeypatch.setattr(attention, "TRIED", (1, 65, 3))


@pytest.fixture
def multiplies_bf16(monkeypatch):
    """As on a CPU that has the instructions; one without would compute in fp32, which the kernels refuse."""
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)


def inputs(tokens: int = sum(LENGTHS), dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, number, 64, generator=draw).to(dtype).requires_grad_() for number in (4, 2, 2)]


# ---- The operators -------------------------------------------------------------------------------------------------------


def test_operators_keep_torchs_rules():
    q, k, v = inputs()
    tiles, angles = tile_list(LENGTHS), torch.rand(len(q), 32)
    shared = (tiles, 0.125, angles.cos().to(BF16), angles.sin().to(BF16))
    torch.library.opcheck(torch.ops.engine.attention.default, (q, k, v, *shared))
    out, lse = torch.ops.engine.attention(q, k, v, *shared)
    assert out.requires_grad and not lse.requires_grad
    torch.library.opcheck(torch.ops.engine.attention_backward.default, (*(x.detach() for x in (out, q, k, v, out, lse)), *shared))


def test_gradients_are_slopes():
    """Along random directions, by central differences; in 16 bits torch.autograd.gradcheck would see roundings alone."""
    given, tiles, draw = [x.detach() for x in inputs(dtype=torch.float16)], tile_list(LENGTHS), torch.Generator().manual_seed(1)
    angles = torch.rand(len(given[0]), 32, generator=draw) * 6
    turned = angles.cos().half(), angles.sin().half()
    weight = torch.randn(given[0].shape, generator=draw)

    def value(*moved: torch.Tensor) -> torch.Tensor:
        return (fused_attention.fused_attention(*moved, tiles, None, *turned).float() * weight).sum()

    leaves = [x.clone().requires_grad_() for x in given]
    value(*leaves).backward()
    for number, leaf in enumerate(leaves):
        along = leaf.grad.float() / leaf.grad.float().abs().max() + 0.05 * torch.randn(leaf.shape, generator=draw)
        moved = [[x if i != number else (x + sign * 0.1 * along).half() for i, x in enumerate(given)] for sign in (1, -1)]
        step = moved[0][number].float() - moved[1][number].float()
        slope, expected = float(value(*moved[0]) - value(*moved[1])), float((leaf.grad.float() * step).sum())
        assert abs(slope - expected) <= 0.03 * abs(expected), (number, slope, expected)


def test_compiled_and_recomputed_is_the_same():
    tiles = tile_list(LENGTHS)

    def attend(q, k, v):
        return fused_attention.fused_attention(q * 2, k, v, tiles) + 1

    def run(attend) -> list[torch.Tensor]:
        leaves = inputs()
        out = attend(*leaves)
        out.square().sum().backward()
        return [out, *(x.grad for x in leaves)]

    plain = run(attend)
    for other in (torch.compile(attend, backend="aot_eager", fullgraph=True), lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        assert all(torch.equal(one, same) for one, same in zip(plain, run(other), strict=True))


def test_parts_of_one_projection_need_no_copies():
    whole = torch.randn(sum(LENGTHS), 8 * 64, dtype=BF16)
    parts = [x.unflatten(1, (-1, 64)) for x in whole.split([256, 128, 128], 1)]
    tiles = tile_list(LENGTHS)
    found = []
    for given in (parts, [x.contiguous() for x in parts]):
        leaves = [x.detach().requires_grad_() for x in given]
        out = fused_attention.fused_attention(*leaves, tiles)
        out.sum().backward()  # whose gradient is a single number, expanded
        found.append([out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)) and [x.is_contiguous() for x in parts] == [False] * 3


def astray(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that does not begin at a multiple of 16 bytes."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def test_a_gradient_may_begin_anywhere_and_what_is_kept_may_not():
    given, tiles = [x.detach() for x in inputs()], tile_list(LENGTHS)
    out, lse = torch.ops.engine.attention(*given, tiles, 0.125)
    found = [torch.ops.engine.attention_backward(grad, *given, out, lse, tiles, 0.125) for grad in (out, astray(out))]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with pytest.raises(RuntimeError, match="lse is Float.*from a multiple of 16 bytes"):
        torch.ops.engine.attention_backward(out, *given, out, astray(lse), tiles, 0.125)


def test_the_backward_is_one_operator_and_no_gradient_is_made_of_nothing():
    leaves, traced = inputs(), []

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, given=(), named=None):
            traced.append(str(operator))
            return operator(*given, **named or {})

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.sum()

        @staticmethod
        def backward(*_):
            return None

    out = fused_attention.fused_attention(*leaves, tile_list(LENGTHS))
    grad = torch.ones_like(out)
    with Trace():
        torch.autograd.grad(out, leaves, grad, retain_graph=True)
    assert [name for name in traced if "detach" not in name] == ["engine.attention_backward.default"]
    assert torch.autograd.grad(Nothing.apply(out), leaves, allow_unused=True) == (None, None, None)


def test_what_lies_beyond_two_to_the_31_is_reached():
    """The last document of many: of all the others, which no tile names, no page of memory is ever touched."""
    tokens, (tile, second) = 2**31 // (4 * 64), tile_list([70]).tolist()
    draw = torch.Generator().manual_seed(0)
    alone = [torch.randn(70, 4, 64, generator=draw).to(BF16) for _ in range(4)]
    whole = [torch.empty(tokens + 70, 4, 64, dtype=BF16) for _ in range(4)]
    for x, last in zip(whole, alone, strict=True):
        x[tokens:] = last
    found = []
    for start, (q, k, v, grad) in ((0, alone), (tokens, whole)):
        tiles = torch.tensor([[start, *tile[1:]], [start, *second[1:]]], dtype=torch.int32)
        out, lse = torch.ops.engine.attention(q, k, v, tiles, 0.125)
        found.append([x[start:] for x in (out, *torch.ops.engine.attention_backward(grad, q, k, v, out, lse, tiles, 0.125))])
    assert whole[0].numel() > 2**31 and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda q, k, v, tiles: (q.float(), k, v, tiles), "q is Float.*expected bfloat16 or float16"),
    (lambda q, k, v, tiles: (q[:, :, :32], k, v, tiles), "q is .*expected .* head_dim of 64 or 128"),
    (lambda q, k, v, tiles: (q, k.half(), v, tiles), "k is Half.*expected q's type and device"),
    (lambda q, k, v, tiles: (q, k[1:], v, tiles), "k is .*with as many tokens and head_dim as q"),
    (lambda q, k, v, tiles: (q, k.transpose(0, 1).contiguous().transpose(0, 1), v, tiles), r"k is .*heads end to end in memory; call contiguous\(\)"),
    (lambda q, k, v, tiles: (q, k, torch.zeros(len(v), 136, dtype=BF16)[:, 5:133].unflatten(1, (2, 64)), tiles), "v is .*multiples of 16 bytes"),
    (lambda q, k, v, tiles: (q, k, torch.zeros(len(v), 133, dtype=BF16)[:, :128].unflatten(1, (2, 64)), tiles), "v is .*multiples of 16 bytes"),
    (lambda q, k, v, tiles: (q[:, :3], k, v, tiles), "k is .*a divisor of q's"),
    (lambda q, k, v, tiles: (q, k, v, tiles.long()), r"tiles is Long.*expected Int\[4, 4\], contiguous"),
    (lambda q, k, v, tiles: (q, k, v, tiles, -1.0), "scale is -1, expected more than 0"),
    (lambda q, k, v, tiles: (q, k, v, tiles, None, q[:, 0, :32].contiguous()), "expected cosine and sine or neither"),
    (lambda q, k, v, tiles: (q, k, v, tiles, None, *2 * (astray(q[:, 0, :32]),)), r"cosine is .*\[130, 32\], contiguous, on cpu, from a multiple of 16"),
    (lambda q, k, v, tiles: (q, k, v, torch.zeros(65536, 4, dtype=torch.int32)), "65536 tiles, expected at most 65535; split the batch"),
])
def test_what_the_kernels_do_not_take_is_said(spoil, message):
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        fused_attention.fused_attention(*spoil(*(x.detach() for x in inputs()), tile_list([128, 1, 1])))


# ---- The engine's paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_all_paths_give_the_same_loss_and_gradients(wide, dtype):
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(340, (sum(LENGTHS),), generator=draw)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])

    def run(path: str, narrow: bool = True) -> tuple[float, list[torch.Tensor]]:
        model = weights.build(wide, "pretrained", 0, torch.float32, torch.float32, CPU, checkpoint_every=2)
        path = attention.choose(path, CPU, dtype, model.config)[0] if narrow else path
        with torch.autocast("cpu", dtype, enabled=narrow):
            hidden = model.train()(ids, positions, PackedAttention(LENGTHS, CPU, path))
            loss = summed_cross_entropy(hidden[:-1], model.lm_head.weight, ids[1:])
        loss.backward()
        return float(loss.detach()), [parameter.grad.double() for parameter in model.parameters()]

    def off(found: list[torch.Tensor]) -> float:
        return float(sum((a - b).square().sum() for a, b in zip(found, exact, strict=True)) / sum(b.square().sum() for b in exact)) ** 0.5

    truth, exact = run("reference", narrow=False)
    loss, reference = run("reference")
    for path in ("auto", "fused", "sdpa"):
        other, found = run(path)
        assert abs(other - truth) <= max(2 * abs(loss - truth), 2e-4 * truth), path
        assert off(found) <= 1.3 * off(reference), (path, off(found), off(reference))


def test_the_kernels_turn_queries_and_keys(wide, monkeypatch):
    def refuse(*_):
        raise AssertionError("turned before the kernels")

    monkeypatch.setattr(attention, "rotate", refuse)
    model = weights.build(wide, "pretrained", 0, torch.float32, torch.float32, CPU)
    ids = torch.arange(sum(LENGTHS))
    with torch.autocast("cpu", BF16), torch.no_grad():
        model(ids, ids, PackedAttention(LENGTHS, CPU, "fused"))
        with pytest.raises(AssertionError, match="before the kernels"):
            model(ids, ids, PackedAttention(LENGTHS, CPU, "sdpa"))


def test_training_with_the_fused_path(multiplies_bf16, trained, recipe, wide, tmp_path):
    """Two ranks, gradient exchange, recomputation; against the same run by the reference."""
    losses = {}
    for path in ("fused", "reference"):
        trained(2, recipe(f"model.path={wide}", f"train.attention={path}", "train.precision=bf16", "train.activation_checkpointing=1", "data.packing=true",
                          "train.max_steps=2", "optim.lr=1e-3", name=path))
        run = tmp_path / "runs" / path
        losses[path] = [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "fused: our kernels: " in (tmp_path / "runs/fused/run.json").read_text()
    assert losses["fused"] == pytest.approx(losses["reference"], rel=2e-3) and losses["fused"] != losses["reference"]


@pytest.mark.faults
def test_verify_holds_on_the_fused_path(multiplies_bf16, ranks, recipe, wide):
    packed = ("data.packing=true", "data.max_length=128", "train.global_batch=4")
    arguments = recipe(f"model.path={wide}", "train.attention=fused", "train.precision=bf16", *packed)
    started = ranks(1, lambda: verify.main(arguments))
    assert started.wait(600) == [0], started.log.read_text()
    said = started.log.read_text()
    assert "attention fused = reference, bfloat16" in said and "All 9 checks hold" in said, said


def test_the_choice_tries_the_kernels_and_says_why(monkeypatch):
    path, why = attention.choose("fused", CPU, BF16, HEADS)
    assert path == "fused" and "× the error of torch's sdpa on 4/2 heads of 64; asked for" in why
    assert attention.choose("auto", CPU, BF16, HEADS)[0] == "cpu"


@pytest.mark.faults
def test_the_trial_holds_on_all_its_lengths(monkeypatch):
    monkeypatch.undo()
    assert {1, 64, 65, 700} <= set(attention.TRIED) and len(attention.TRIED) > 40
    ratio, same = attention._trial("fused", CPU, BF16, SimpleNamespace(**{**vars(HEADS), "num_attention_heads": 2, "num_key_value_heads": 1}))
    assert ratio <= 1.5 and same


@pytest.fixture
def gpu(monkeypatch):
    """A device of capability 9.0 as far as the choice asks, with the extension built; our kernels are tried here, torch's are taken as right."""
    monkeypatch.setitem(sys.modules, "engine._C", ModuleType("engine._C"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    trial = attention._trial
    monkeypatch.setattr(attention, "_trial", lambda path, device, dtype, heads: trial(path, CPU, dtype, heads) if path == "fused" else (1.0, True))
    return torch.device("cuda")


def test_auto_takes_the_kernels_where_they_were_timed(gpu, monkeypatch):
    path, why = attention.choose("auto", gpu, BF16, HEADS)
    assert path == "varlen" and why.endswith("not fused: not timed on GPUs of capability 9.0 yet; train.attention=fused takes them")
    assert attention.choose("fused", gpu, BF16, HEADS)[0] == "fused"
    monkeypatch.setattr(attention, "FASTER", {(9, 0)})
    path, why = attention.choose("auto", gpu, BF16, HEADS)
    assert path == "fused" and why.endswith("heads of 64; one launch for all documents")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(EngineError, match="made for GPUs of capability 8.0 and newer, not 7.5"):
        attention.choose("fused", gpu, BF16, HEADS)


def test_a_fault_of_the_kernels_ends_the_run(gpu, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "_trial", full)
    with pytest.raises(torch.OutOfMemoryError):  # nor may what is left of memory make the choice
        attention._try("fused", gpu, BF16, HEADS, True)

    def fault(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(attention, "_trial", fault)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)  # a launch failed, and the device works on
    assert attention._try("fused", gpu, BF16, HEADS, True) == (False, "CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(EngineError, match=r"our kernels faulted on cuda \(CUDA error: an illegal.* set train.attention=sdpa") as caught:
        attention.choose("fused", gpu, BF16, HEADS)
    assert caught.value.exit_code == BUG


@pytest.mark.parametrize(("heads", "dtype", "reason"), [
    ({"head_dim": 48}, BF16, "made for heads of 64 or 128, not 48"), ({"windows": (None, 128)}, BF16, "not made for sliding windows"),
    ({}, torch.float32, "made for bf16 and fp16, not float32"), ({}, BF16, r"the extension is not there \(.*\); kernels/README.md")])
def test_what_the_kernels_do_not_do_goes_another_way(gpu, monkeypatch, heads, dtype, reason):
    monkeypatch.setitem(sys.modules, "engine._C", None)  # as where it is not built
    heads = SimpleNamespace(**{**vars(HEADS), **heads})
    path, why = attention.choose("auto", gpu, dtype, heads)
    assert path == ("varlen" if dtype == BF16 else "sdpa")
    with pytest.raises(EngineError, match=rf"train.attention=fused: {reason}.*; set train.attention=auto") as caught:
        attention.choose("fused", gpu, dtype, heads)
    assert caught.value.exit_code == USER and str(caught.value).split("fused: ")[1].split("; set")[0] in why


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda x, q, *angles: x * 1.02, "expected at most 2 ×"), (lambda x, q, *angles: x * float("nan"), "expected at most 2 ×"),
    (lambda x, q, *angles: x * (1 if angles else 1.02), "expected at most 2 ×"), (lambda x, q, *angles: x * (1.02 if angles else 1), "expected at most 2 ×"),
    (lambda x, q, *angles: x * (1 if q.is_contiguous() else 1.02), "expected at most 2 ×"),
    (lambda x, q, *angles: x + 1e-4 * next(COUNT), "other bits when run again, expected the same"),
    (lambda x, q, *angles: (_ for _ in ()).throw(RuntimeError("no kernel image")), "no kernel image")])
def test_kernels_that_are_wrong_are_not_used(monkeypatch, spoil, reason):
    right = fused_attention.fused_attention
    monkeypatch.setattr(fused_attention, "fused_attention", lambda *given: spoil(right(*given), given[0], *given[5:]))
    used, why = attention._try("fused", CPU, BF16, HEADS, True)
    assert not used and reason in why
    with pytest.raises(EngineError, match="set train.attention=auto"):
        attention.choose("fused", CPU, BF16, HEADS)


def test_a_batch_that_is_not_the_announced_one_is_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="130 tokens and window None, expected 129 and none"):
        PackedAttention([129], CPU, "fused")(0, q, k, v)
    with pytest.raises(ValueError, match="window 5"):
        PackedAttention([130], CPU, "fused")(0, q, k, v, 5)
    assert PackedAttention([100, 30], CPU, "fused")(0, q.float(), k.float(), v.float()).dtype == torch.float32


def test_the_benchmark_runs(capsys, monkeypatch):
    monkeypatch.setattr(bench, "WIDTH", 256)
    command = ["attention", "--device", "cpu", "--mean", "30", "--head-dim", "64", "--group", "4", "--tokens", "70", "--rounds", "1"]
    bench.main([*command, "--rotary"])  # whose figures mean something: all sides computed the same
    assert "rotary embeddings included" in capsys.readouterr().out
    bench.main(command)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 30 | 64 | 4/1 | ")]
    assert [row[3] for row in rows] == [name for name, _ in bench.KERNELS.values()]
    assert [row[4].startswith("not possible: ") for row in rows] == [False, False, True, True, False]
    assert all(float(row[5]) >= 0 and row[4].endswith(" ms") for row in rows if "not possible" not in row[4])
    right = fused_attention.fused_attention
    monkeypatch.setattr(fused_attention, "fused_attention", lambda *given: right(*given) * 1.1)
    with pytest.raises(EngineError, match="fused is off by 1.0e-01"):
        bench.main(command)
    assert sum(bench.documents(5000, 150, torch.Generator().manual_seed(0))) == 5000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu():
    with pytest.raises(EngineError, match="E-BENCH-DEVICE"):
        bench.main(["attention"])
