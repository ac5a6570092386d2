"""Weights from disk, packing and activation checkpointing. That models compute what transformers does is in test_families."""

import ctypes
import json
import os

import pytest
import torch
from conftest import TINY, new_peak, peak_megabytes

from engine.attention import PackedAttention
from engine.errors import EngineError
from engine.models import weights

M_MMAP_THRESHOLD = -3  # of malloc.h

CPU = torch.device("cpu")


def reference(tmp_path):
    """The folder of a random Llama that transformers saved in shards."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    known = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**known, vocab_size=97)).save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    assert (tmp_path / "hf" / weights.INDEX).exists(), "the reference is meant to be sharded"
    return tmp_path / "hf"


def load(folder, **options):
    return weights.build(folder, "pretrained", 0, torch.float32, torch.float32, CPU, **options)


def test_shards_are_split_and_found_again(tmp_path, monkeypatch):
    folder = reference(tmp_path)
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    out = tmp_path / "out"
    out.mkdir()
    model = load(folder)
    weights.write_folder(out, weights.read_config(folder), weights.untied(model).items())
    assert len(list(out.glob("model-*.safetensors"))) > 2
    for name, tensor in load(out).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("path", ["sdpa", "cpu", "reference"])
def test_packed_logits_equal_each_document_alone(tiny, path):
    model = load(tiny)
    lengths = [1, 30, 7, 7, 19, 2, 40]
    ids = torch.randint(340, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = model.lm_head(model(ids, positions, PackedAttention(lengths, CPU, path)))
    for document, logits in zip(ids.split(lengths), packed.split(lengths), strict=True):
        alone = model.lm_head(model(document, torch.arange(len(document)), PackedAttention([len(document)], CPU)))
        assert (alone - logits).abs().max() <= 2e-6 * alone.abs().max()


@pytest.mark.parametrize("path", ["sdpa", "cpu", "reference"])
def test_a_change_in_one_document_never_reaches_another(tiny, path):
    """Exactly: in values and in gradients, with and without documents that share a call."""
    model = load(tiny)
    lengths = [9, 8, 10, 30, 9]
    ids = torch.randint(340, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    positions, attend = torch.cat([torch.arange(length) for length in lengths]), PackedAttention(lengths, CPU, path)
    for changed in range(len(lengths)):
        other = list(ids.split(lengths))
        other[changed] = (other[changed] + 1) % 340
        before, after = (model(tokens, positions, attend).split(lengths) for tokens in (ids, torch.cat(other)))
        for document in range(len(lengths)):
            assert torch.equal(before[document], after[document]) == (document != changed)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    model.model.embed_tokens.forward = lambda _: embedded
    model(ids, positions, attend).split(lengths)[2].square().sum().backward()
    touched = [bool(part.abs().sum() > 0) for part in embedded.grad.split(lengths)]
    assert touched == [False, False, True, False, False]


def test_attention_costs_no_square_of_the_pack():
    """Floating-point work of 16 documents in one pack is 16 times that of one, where a dense mask would cost 256 times."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(lengths: list[int]) -> int:
        q = torch.randn(sum(lengths), 4, 8)
        with FlopCounterMode(display=False) as counter:
            PackedAttention(lengths, CPU)(0, q, q[:, :2], q[:, :2])
        return counter.get_total_flops()

    assert flops([64] * 16) == 16 * flops([64])


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_gives_the_same_bits_and_uses_less_memory(tiny, every):
    from torch.autograd.graph import saved_tensors_hooks

    from engine.dropout import DropoutKeys

    def run(checkpoint_every: int) -> tuple[list[torch.Tensor], int]:
        keys, stored = DropoutKeys(5), {}
        model = load(tiny, checkpoint_every=checkpoint_every, dropout=0.3, keys=keys).train()
        keys.set(3, [4, 9], [20, 12])

        def note(tensor):
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(torch.arange(32), torch.cat([torch.arange(20), torch.arange(12)]), PackedAttention([20, 12], CPU)).square().sum()
        loss.backward()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return [parameter.grad for parameter in model.parameters()], sum(size for place, size in stored.items() if place not in own)

    (plain, most), (recomputed, less) = run(0), run(every)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert less < (0.4 if every == 1 else 0.75) * most, f"{less} bytes kept for the backward, {most} without checkpointing"


def test_activation_checkpointing_lowers_the_peak_of_a_process(tmp_path, ranks):
    """Resident memory of a real forward and backward, each in a process of its own."""
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}))

    def peak(every: int) -> int:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once; else the peak hangs on what the allocator reuses
        model = weights.build(folder, "random", 0, torch.float32, torch.float32, CPU, checkpoint_every=every).train()
        ids, start = torch.zeros(4096, dtype=torch.int64), new_peak()
        model(ids, torch.arange(128).repeat(32), PackedAttention([128] * 32, CPU)).sum().backward()
        (tmp_path / f"peak-{every}").write_text(str(peak_megabytes() - start))
        return 0

    for every in (1, 0):
        assert ranks(1, lambda every=every: peak(every)).wait() == [0]
    saved, plain = (float((tmp_path / f"peak-{every}").read_text()) for every in (1, 0))
    # It takes 240 to 560 MB less, as the allocator happens to reuse what was freed; two processes that do the same differ by 50.
    assert saved < plain - 150, f"peak {saved:.0f} MB with checkpointing, {plain:.0f} MB without"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("changes", "words"), [
    ({"intermediate_size": 64}, "misshapen  model.layers.0.mlp.gate_proj.weight"), ({"num_hidden_layers": 4}, "missing    model.layers.3"),
    ({"num_hidden_layers": 2}, "unexpected model.layers.2"),
])
def test_weights_that_do_not_fit_the_config_are_refused_by_name(tmp_path, changes, words):
    folder = reference(tmp_path)
    edit(folder, **changes)
    with pytest.raises(EngineError, match=words):
        load(folder)


def test_pickled_weights_are_refused(tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(EngineError, match="is a pickle") as caught:
        load(tmp_path)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_frozen_weights_under_fp32_arithmetic_equal_wide_ones(tiny, dtype):
    narrow = weights.build(tiny, "pretrained", 0, dtype, torch.float32, CPU).requires_grad_(False)
    wide = weights.build(tiny, "pretrained", 0, torch.float32, torch.float32, CPU).requires_grad_(False)
    for one, other in zip(wide.parameters(), narrow.parameters(), strict=True):
        one.copy_(other)
    results = []
    for model in (narrow, wide):
        model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))  # something to send a gradient to
        hidden = model(torch.arange(40), torch.arange(40), PackedAttention([40], CPU))
        hidden.square().sum().backward()
        results.append((hidden.detach(), model.model.layers[0].self_attn.q_proj.bias.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_four_ranks_load_with_no_memory_of_their_own_beside_a_piece_of_the_file(tiny, tmp_path, ranks, monkeypatch):
    """Of 192 MB in six shards, into fp32. `meta` stands for a GPU: what was read leaves the host. No file is mapped, so that none can be cut
    away under the rank; what it reads passes through a megabyte of its own."""
    shard, width = 32, 1024
    config = {**TINY, "hidden_size": width, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 4 * width, "num_hidden_layers": 6,
              "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(weights, "SHARD_BYTES", shard * 2**20)

    def write() -> int:
        model = weights.build(tmp_path, "random", 0, torch.float32, torch.float32, torch.device("meta"))
        weights.write_folder(tmp_path, config, ((name, torch.zeros(tensor.shape, dtype=torch.bfloat16)) for name, tensor in weights.untied(model).items()))
        return 0

    assert ranks(1, write).wait() == [0]  # in a process of its own: ranks would inherit what it leaves of memory
    files = list(tmp_path.glob("model-*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    assert len(files) >= 6 and total > 180e6

    def resident(kind: str) -> int:
        line = next(line for line in open("/proc/self/status") if line.startswith(kind))
        return int(line.split()[1]) * 1024

    def load() -> int:
        weights.build(tiny, "pretrained", 0, torch.bfloat16, torch.float32, torch.device("meta"))  # imports and the like
        read, peaks, before = weights.tensorfile.Reader._read, {"RssAnon": 0, "RssFile": 0}, {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
        bytes_read = 0

        def watched(self, into, place):
            nonlocal bytes_read
            read(self, into, place)
            bytes_read += len(into)
            for kind in peaks:
                peaks[kind] = max(peaks[kind], resident(kind) - before[kind])

        weights.tensorfile.Reader._read = watched
        weights.build(tmp_path, "pretrained", 0, torch.float32, torch.float32, torch.device("meta"))
        (tmp_path / f"peak-{os.getpid()}").write_text(json.dumps({**peaks, "read": bytes_read}))
        return 0

    assert ranks(4, load).wait() == [0] * 4
    found = [json.loads(path.read_text()) for path in tmp_path.glob("peak-*")]
    assert len(found) == 4
    for peaks in found:
        assert peaks["RssAnon"] <= 4 * 2**20, f"{peaks['RssAnon'] / 2**20:.0f} MB of its own"
        assert peaks["RssFile"] <= 4 * 2**20, f"{peaks['RssFile'] / 2**20:.0f} MB mapped"
        assert peaks["read"] > total
    print([{kind: f"{size / 2**20:.0f} MB" for kind, size in peaks.items()} for peaks in found], f"of {total / 2**20:.0f} MB")
