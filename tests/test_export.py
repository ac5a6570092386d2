"""Exports: read back and compared before they count, merged once, and as GGUF what other tools load."""

import json
import math
import shutil
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import TINY, like, load_dataset
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine import adapter, convert, export, gguf_in, gguf_out, hub, lora, train
from engine.attention import PackedAttention
from engine.dropout import DropoutKeys
from engine.errors import CHECKPOINT, USER, EngineError
from engine.models import FAMILIES, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blocks_of_32(tiny, tmp_path_factory) -> Path:
    """The tiny model with rows that Q8_0 takes."""
    return like(tiny, tmp_path_factory.mktemp("models") / "even", intermediate_size=64)


def logits(model) -> torch.Tensor:
    ids = torch.randint(340, (50,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.lm_head(model(ids, torch.arange(50), PackedAttention([50], CPU)))


def load(folder: Path, dtype=torch.float32):
    return weights.build(folder, "pretrained", 0, dtype, torch.float32, CPU)


@pytest.mark.parametrize(("override", "kind", "file"), [
    ("lora.rank=4", "adapter", "adapter/adapter_model.safetensors"), ("lora.rank=4", "model", "model/model.safetensors"),
    ("lora.rank=4", "gguf", "model.gguf"), ("lora.rank=0", "model", "model/model.safetensors")])
def test_a_tensor_damaged_after_it_was_written_fails_the_export_and_leaves_nothing(recipe, monkeypatch, tmp_path, override, kind, file):
    write, read = export.KINDS[kind]

    def damage_and_read(exporter, path):
        damaged = path / Path(file).name if path.is_dir() else path
        data = bytearray(damaged.read_bytes())
        data[-4096:-2048] = np.random.default_rng(0).normal(size=512).astype("float32").tobytes()
        damaged.write_bytes(data)
        return read(exporter, path)

    monkeypatch.setitem(export.KINDS, kind, (write, damage_and_read))
    with pytest.raises(EngineError, match="EXPORT-DIFFERS.*(mean KL divergence|cannot be read back)") as error:
        train.main(recipe(override, f"export.kinds=[{kind}]", "train.max_steps=2"))
    assert error.value.exit_code == CHECKPOINT
    assert list((tmp_path / "runs/run/export").iterdir()) == []
    monkeypatch.undo()
    train.main(recipe(override, f"export.kinds=[{kind}]", "train.max_steps=2"))
    assert (tmp_path / "runs/run/export" / file).exists()


@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
def test_all_kinds_of_one_run_agree_and_say_so(recipe, tiny, tmp_path, stored):
    train.main(recipe("lora.rank=4", f"model.dtype={stored}", "export.kinds=[adapter,model,gguf]", "export.gguf_type=fp32", "train.max_steps=3"))
    folder = tmp_path / "runs/run/export"
    base = load(tiny, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[stored])
    adapter.load(base, folder / "adapter")
    expected = {name: tensor for name, tensor in load_file(folder / "model/model.safetensors").items()}
    for name, module in lora.adapters(base).items():  # in fp32, from the base's stored numbers
        exact = module.weight.double() + module.scale * (module.lora_B.double() @ module.lora_A.double())
        assert (expected[f"{name}.weight"] - exact).abs().max() <= 1e-6
        assert not torch.equal(expected[f"{name}.weight"], module.weight.float())
    assert (logits(load(folder / "model")) - logits(base)).abs().max() <= 2e-5
    gguf_in.to_folder(folder / "model.gguf", tmp_path / "back", "fp32")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in expected)
    note = json.loads((folder / "model/engine.json").read_text())
    agreement = note["agreement_with_training"]
    assert note["template"] == "alpaca" and agreement["rows"] == 8 and agreement["tokens"] > 50
    assert 0 <= agreement["kl"] <= 1e-9 and agreement["top1"] == 1.0 and 0 < agreement["max_abs_logit"] <= 2e-5


def test_a_merged_weight_is_rounded_once(recipe, tiny, tmp_path):
    """A base in fp16 written as bf16: rounding by way of fp16 would give other numbers in places."""
    train.main(recipe("lora.rank=4", "model.dtype=fp16", "export.kinds=[adapter,model]", "export.dtype=bf16", "export.max_kl=0.1", "train.max_steps=3"))
    folder = tmp_path / "runs/run/export"
    base = load(tiny, torch.float16)
    adapter.load(base, folder / "adapter")
    written, twice = load_file(folder / "model/model.safetensors"), 0
    for name, module in lora.adapters(base).items():
        merged = module.merged_weight()
        assert torch.equal(written[f"{name}.weight"], merged.to(torch.bfloat16))
        twice += int((merged.to(torch.float16).to(torch.bfloat16) != merged.to(torch.bfloat16)).sum())
    assert twice > 0, "the test is meant to tell the two apart"


class OnDevice(TorchDispatchMode):
    """`most` is the largest number of bytes that what was made under it had on a GPU at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.most = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.device.type == "cuda" and out.untyped_storage()._cdata not in given:
            self.held += out.nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(out, self.let_go, out.nbytes)
        return out

    def let_go(self, nbytes: int) -> None:
        self.held -= nbytes


@pytest.fixture
def on_a_gpu():
    """A model with adapters on a GPU that needs none: tensors without numbers, which know their device."""
    changes = {"vocab_size": 340, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "tie_word_embeddings": False}
    config = FAMILIES["llama"].config({**TINY, **changes}, "")
    with torch.device("meta"):
        model = FAMILIES["llama"].model(config)
    with FakeTensorMode():
        for name, meta in list(model.named_parameters()):
            owner, _, part = name.rpartition(".")
            there = torch.empty(meta.shape, dtype=torch.bfloat16, device="cuda")
            setattr(model.get_submodule(owner), part, torch.nn.Parameter(there, requires_grad=False))
        lora.apply(model, lora.Settings(4, 8.0, ["all-linear"]), DropoutKeys(0), 1)
        yield model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging_brings_one_matrix_at_a_time_to_the_host(on_a_gpu, dtype):
    """Of a base in bf16 on a GPU that is full of it: what is merged, or only widened, never lies there as a whole."""
    largest = max(parameter.numel() for parameter in on_a_gpu.parameters()) * 4
    with OnDevice() as device:
        tensors = dict(export.merged(on_a_gpu, dtype))
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors.values()} == {("cpu", dtype)} and not any("lora" in name for name in tensors)
    assert largest <= device.most <= 4 * largest < sum(tensor.numel() * 4 for tensor in tensors.values()) / 5, "the parts of one sum in fp32"


@pytest.mark.parametrize(("dtype", "needed"), [("bf16", 2), ("fp32", 4)])
def test_what_is_read_back_goes_where_it_has_room_in_its_own_type(on_a_gpu, monkeypatch, dtype, needed):
    exporter = export.Exporter.__new__(export.Exporter)
    exporter.model, numbers = on_a_gpu, sum(parameter.numel() for parameter in on_a_gpu.parameters())
    for free, expected in ((1.25 * needed * numbers, "cuda"), (1.15 * needed * numbers, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 1 << 40))
        assert exporter._device(dtype).type == expected


def test_a_folder_is_written_shard_by_shard(tiny, tmp_path, monkeypatch):
    """Of tensors that are made one by one those of a shard are held, and the next."""
    model, alive, most = load(tiny), {}, 0
    sizes = [tensor.nbytes for tensor in weights.untied(model).values()]

    def made():
        nonlocal most
        for name, tensor in export.merged(model, torch.float32):
            yield name, (own := tensor.clone())
            alive[name] = own.nbytes
            most = max(most, sum(alive.values()))
            weakref.finalize(own, alive.pop, name)

    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    weights.write_folder(tmp_path, weights.read_config(tiny), made())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files == [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    assert 20_000 < most <= max(20_000, *sizes) + max(sizes) < sum(sizes) / 1.2
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in load(tmp_path).state_dict().items())


def test_agreement_is_measured_in_nats_and_shares(recipe, tiny, tmp_path):
    """Against figures computed by hand from both models' logits."""
    from engine import config, precision
    from engine.data.tokenizer import load_tokenizer

    cfg = config.load(recipe("export.verify_rows=3"))
    rows = load_dataset(Path(cfg.data.train), load_tokenizer(tiny), "alpaca", 64, "error", tmp_path / "cache")
    ours, other = load(tiny), load(tiny)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    found = export.Exporter(ours, cfg, rows, precision.choose("fp32", None, CPU), hub.resolve(str(tiny)), tiny).compare(other)
    kl, same, largest, tokens = 0.0, 0, 0.0, 0
    for start, end in zip(rows.offsets[:3], rows.offsets[1:4], strict=True):
        ids = torch.from_numpy(rows.tokens[start:end].astype("int64"))
        p, q = ((model.lm_head(model(ids, torch.arange(len(ids)), PackedAttention([len(ids)], CPU)))).detach() for model in (ours, other))
        largest, tokens = max(largest, float((p - q).abs().max())), tokens + len(ids)
        for a, b in zip(p, q, strict=True):
            pa, qb = torch.softmax(a.double(), 0).tolist(), torch.softmax(b.double(), 0).tolist()
            kl += sum(x * math.log(x / y) for x, y in zip(pa, qb, strict=True))
            same += int(a.argmax() == b.argmax())
    assert (found.rows, found.tokens) == (3, tokens) and 0 < same < tokens
    assert found.kl == pytest.approx(kl / tokens, rel=1e-5) and found.top1 == same / tokens and found.max_abs_logit == pytest.approx(largest, rel=1e-5)


def test_convert_merges_an_adapter_as_the_run_does(recipe, tiny, tmp_path):
    train.main(recipe("lora.rank=4", "export.kinds=[adapter,model]", "train.max_steps=3"))
    folder = tmp_path / "runs/run/export"
    convert.main([str(tiny), str(tmp_path / "merged"), "--adapter", str(folder / "adapter"), "--dtype", "fp32"])
    merged, exported = load_file(tmp_path / "merged/model.safetensors"), load_file(folder / "model/model.safetensors")
    assert merged.keys() == exported.keys() and all(torch.equal(merged[name], exported[name]) for name in merged)
    assert (tmp_path / "merged/tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()
    with pytest.raises(EngineError, match="exists already"):
        convert.main([str(tiny), str(tmp_path / "merged")])
    with pytest.raises(EngineError, match="got q8_0 for a folder, expected one of bf16, fp16, fp32"):
        convert.main([str(tiny), str(tmp_path / "other"), "--dtype", "q8_0"])


@pytest.mark.parametrize(("dtype", "step"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-11), ("q8_0", 1 / 127)])
def test_gguf_holds_the_weights_to_its_types_rounding(blocks_of_32, tmp_path, dtype, step):
    convert.main([str(blocks_of_32), str(tmp_path / "out.gguf"), "--dtype", dtype])
    gguf_in.to_folder(tmp_path / "out.gguf", tmp_path / "back", "fp32")
    before, after = load_file(blocks_of_32 / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if tensor.dim() == 1 or dtype == "fp32":
            assert torch.equal(after[name], tensor), name
        elif dtype == "q8_0":  # half a step of a block of 32; the scale is itself rounded to fp16
            scale = tensor.reshape(-1, 32).abs().amax(-1, keepdim=True)
            error = (after[name] - tensor).reshape(-1, 32).abs()
            assert (error <= scale * (0.5 * step + 2**-11)).all() and error.max() > 0, name
        else:
            assert torch.equal(after[name], tensor.to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]).float()), name
    assert (tmp_path / "back/tokenizer.model").exists()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
def test_gguf_is_read_by_transformers_with_the_same_logits(blocks_of_32, tmp_path, dtype):
    """Those of the weights as their type holds them; how near that is to the model is the test above."""
    transformers = pytest.importorskip("transformers")
    convert.main([str(blocks_of_32), str(tmp_path / "out.gguf"), "--dtype", dtype])
    gguf_in.to_folder(tmp_path / "out.gguf", tmp_path / "back", "fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32).eval()
    ids = torch.randint(340, (50,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, exact = theirs(ids[None]).logits[0], logits(load(blocks_of_32))
        assert (expected - logits(load(tmp_path / "back"))).abs().max() <= 1e-5
        assert (expected - exact).abs().max() <= {"fp32": 1e-5, "fp16": 0.005, "bf16": 0.05, "q8_0": 0.1}[dtype] * exact.std()


def test_what_a_reader_that_was_killed_left_goes(blocks_of_32, tmp_path):
    convert.main([str(blocks_of_32), str(tmp_path / "out.gguf"), "--dtype", "fp32"])
    (left := tmp_path / "out.gguf-back").mkdir()
    (left / "model.safetensors").write_bytes(b"x")
    assert torch.equal(logits(export.read_model(tmp_path / "out.gguf", "fp32", torch.float32, CPU)), logits(load(blocks_of_32)))
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_what_gguf_cannot_say_is_refused_by_name(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    tensors = load_file(tiny / "model.safetensors")
    for changes, named in (({"model_type": "phi3"}, "model_type is 'phi3'"), ({"rope_scaling": {"rope_type": "yarn"}}, "rope type is 'yarn'"),
                           ({"attention_bias": True}, "attention_bias is true"),
                           ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
                                              "original_max_position_embeddings": 8192}}, "its positions are scaled by .*'high_freq_factor': 2.0")):
        with pytest.raises(EngineError, match=named):
            gguf_out.write(tmp_path / "out.gguf", {**config, **changes}, tensors.items(), tiny, "fp16")
    with pytest.raises(EngineError, match="has a tensor model.layers.0.self_attn.extra.weight"):
        gguf_out.write(tmp_path / "out.gguf", config, {**tensors, "model.layers.0.self_attn.extra.weight": torch.ones(4, 4)}.items(), tiny, "fp16")
    with pytest.raises(EngineError, match="has rows of 48 numbers, Q8_0 takes multiples of 32"):
        gguf_out.write(tmp_path / "out.gguf", config, tensors.items(), tiny, "q8_0")
    save_file({**tensors, "model.norm.weight": torch.full((32,), math.nan)}, tmp_path / "x.safetensors")
    with pytest.raises(EngineError, match="model.norm.weight is not finite"):
        gguf_out.write(tmp_path / "out.gguf", config, load_file(tmp_path / "x.safetensors").items(), tiny, "fp16")


def test_what_cannot_be_exported_is_told_before_training(recipe, tmp_path):
    with pytest.raises(EngineError, match=r"export.kinds=\[gguf\]: has rows of 48 numbers") as caught:
        train.main(recipe("export.kinds=[model,gguf]", "export.gguf_type=q8_0"))
    assert caught.value.exit_code == USER and not (tmp_path / "runs/run/metrics.jsonl").exists()


@pytest.mark.parametrize("fits", [True, False])
def test_a_sentencepiece_model_is_written_although_a_tokenizer_json_lies_beside_it(tiny, tmp_path, fits):
    """As beside Llama 2, TinyLlama and Mistral on the hub. What that file has added behind the pieces is written, too."""
    folder, pieces = tmp_path / "model", SentencePieceProcessor(str(tiny / "tokenizer.model"))
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    one = {"id": 341, "content": "<|im_end|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocabulary = {pieces.id_to_piece(number): number if fits else number + 1 for number in range(340)}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [one], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": None, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    config, path = {**json.loads((tiny / "config.json").read_text()), "vocab_size": 343}, tmp_path / "out.gguf"
    if not fits:
        with pytest.raises(EngineError, match="tokenizer.model has .* as 259, tokenizer.json as 260"):
            gguf_out.check(path, config, folder, "fp32")
        return
    gguf_out.write(path, config, [], folder, "fp32")
    read = {name.removeprefix("tokenizer."): field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert read["ggml.model"] == "llama" and read["ggml.tokens"][:340] == list(vocabulary) and read["chat_template"] == "{{ messages }}"
    assert read["ggml.tokens"][340:] == ["[PAD340]", "<|im_end|>", "[PAD342]"] and read["ggml.token_type"][340:] == [5, 3, 5]
    assert len(read["ggml.scores"]) == 343 and read["ggml.scores"][:340] == pytest.approx([pieces.get_score(number) for number in range(340)])
