"""LoRA: identity at start, merged equals unmerged, adapters alone learn, and peft agrees."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import adapter, lora, train
from engine.attention import PackedAttention
from engine.dropout import DropoutKeys, KeyedDropout
from engine.errors import EngineError
from engine.loss import summed_cross_entropy
from engine.models import weights

CPU = torch.device("cpu")
IDS, POSITIONS = torch.arange(30), torch.arange(30)


def build(folder: Path, targets=("q_proj", "v_proj", "down_proj"), dropout=0.0, dtype=torch.float32, randomise=False, **more):
    keys = DropoutKeys(1)
    keys.set(0, [0], [30])
    model = weights.build(folder, "pretrained", 0, dtype, torch.float32, CPU, keys=keys)
    lora.apply(model, lora.Settings(4, 8.0, list(targets), dropout, **more), keys, 7)
    if randomise:
        for module in lora.adapters(model).values():
            torch.nn.init.normal_(module.lora_B, std=0.2, generator=torch.Generator().manual_seed(module.out_features))
    return model


def logits(model) -> torch.Tensor:
    return model.lm_head(model(IDS, POSITIONS, PackedAttention([30], CPU)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_at_start(tiny, dtype):
    base = weights.build(tiny, "pretrained", 0, dtype, torch.float32, CPU)
    base.requires_grad_(False)
    assert torch.equal(logits(build(tiny, dtype=dtype)), logits(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_leaves_plain_layers_with_the_merged_weight_rounded_once(tiny, dtype):
    model, folded = (build(tiny, randomise=True, dtype=dtype) for _ in range(2))
    lora.fold(folded)
    assert not lora.adapters(folded) and list(folded.state_dict()) == [name for name in model.state_dict() if ".lora_" not in name]
    for name, module in lora.adapters(model).items():
        exact = module.weight.double() + module.scale * (module.lora_B.double() @ module.lora_A.double())
        merged, found = module.merged_weight(), folded.get_submodule(name).weight
        assert (merged - exact).abs().max() <= 1e-6 * exact.abs().max() and torch.equal(found, merged.to(dtype)) and not found.requires_grad, name
    expected = logits(model)
    assert (logits(folded) - expected).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype] * expected.abs().max()
    assert (logits(build(tiny, dtype=dtype)) - expected).abs().max() > 0.1 * expected.abs().max(), "the adapters are meant to matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_alone_get_gradients_and_are_fp32(tiny, dtype):
    model = build(tiny, dtype=dtype, randomise=True)
    summed_cross_entropy(model(IDS, POSITIONS, PackedAttention([30], CPU)), model.lm_head.weight, IDS).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert (parameter.grad is not None and float(parameter.grad.abs().sum()) > 0) == parameter.requires_grad, name
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype)


def test_dropout_is_off_in_evaluation_and_repeats_by_key(tiny):
    model = build(tiny, dropout=0.5, randomise=True)
    plain = logits(build(tiny, randomise=True))
    assert torch.equal(logits(model.eval()), plain)
    model.train()
    keys = model.model.layers[0].self_attn.q_proj.dropout.keys
    first, again = logits(model), logits(model)
    keys.set(1, [0], [30])
    other_step = logits(model)
    keys.set(0, [1], [30])
    other_place = logits(model)
    assert torch.equal(first, again)
    for one, other in ((first, plain), (first, other_step), (first, other_place), (other_step, other_place)):
        assert not torch.equal(one, other)


def test_dropout_keeps_the_right_share_and_the_mean():
    keys = DropoutKeys(0)
    keys.set(0, [0, 1], [500, 500])
    dropped = KeyedDropout(0.25, keys).train()(torch.ones(1000, 200))
    share = float((dropped == 0).float().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 200_000) ** 0.5 and dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert not torch.equal(dropped[:500], dropped[500:]), "two sequences share a mask"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_dropout_is_what_it_is_made_of_and_keeps_less(dtype):
    torch.manual_seed(0)
    keys = DropoutKeys(0)
    keys.set(3, [4, 9], [30, 20])
    one, other = (KeyedDropout(0.3, keys).train() for _ in range(2))
    weights, grad, found = torch.randn(2, 8, 64).to(dtype), torch.randn(50, 8).to(dtype), []
    for product in (KeyedDropout.product, lambda dropout, x, weight: torch.nn.functional.linear(dropout(x), weight)):
        kept = {}
        x, pair = torch.ones(50, 64, dtype=dtype).requires_grad_(), [weight.clone().requires_grad_() for weight in weights]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda t: t):
            total = product(one, x, pair[0]) + product(other, x, pair[1])
        found.append([total.detach(), *torch.autograd.grad(total, [x, *pair], grad), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())])
    *ours, bytes_kept = found[0]
    *plain, more = found[1]
    assert all(map(torch.equal, ours, plain)), "other bits"
    assert bytes_kept == (50 * 64 + 2 * 8 * 64) * dtype.itemsize + 2 * 50 * 64 < more
    assert torch.equal(one.eval().product(x, pair[0]), torch.nn.functional.linear(x, pair[0]))


@pytest.mark.parametrize("targets", [["q_proj", "v_prj"], ["lm_head"], ["proj"]])
def test_a_target_that_matches_nothing_is_an_error_even_one_of_several(tiny, targets):
    with pytest.raises(EngineError, match="there are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        build(tiny, targets=targets)


def test_peft_computes_the_same_from_the_saved_adapter(tiny, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = build(tiny, randomise=True)
    adapter.save(model, tmp_path, str(tiny), 0.0)
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(tiny), tmp_path).eval()
    assert (theirs(IDS[None]).logits[0] - logits(model)).abs().max() <= 1e-5
    again = weights.build(tiny, "pretrained", 0, torch.float32, torch.float32, CPU)
    adapter.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_gradients_equal_peft(tiny, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = build(tiny, randomise=True)
    adapter.save(model, tmp_path, str(tiny), 0.0)
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(tiny), tmp_path, is_trainable=True)
    targets = IDS.roll(-1)[:-1]
    ours = summed_cross_entropy(model(IDS, POSITIONS, PackedAttention([30], CPU))[:-1], model.lm_head.weight, targets)
    expected = torch.nn.functional.cross_entropy(theirs(IDS[None]).logits[0, :-1], targets, reduction="sum")
    ours.backward()
    expected.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    for name, module in lora.adapters(model).items():
        for part in "AB":
            wanted = grads[f"base_model.model.{name}.lora_{part}.default.weight"]
            assert (getattr(module, f"lora_{part}").grad - wanted).norm() / wanted.norm() <= 1e-4


def test_training_leaves_the_base_as_it_was_and_exports_the_adapter(recipe, trained, tiny, tmp_path):
    before = (tiny / "model.safetensors").read_bytes()
    trained(2, recipe("lora.rank=4", "model.dtype=bf16", "train.max_steps=3"))
    assert (tiny / "model.safetensors").read_bytes() == before
    run = tmp_path / "runs/run"
    assert set(load_file(run / "checkpoints/step-000000003/model.safetensors")) == {f"model.layers.{layer}.self_attn.{name}.lora_{part}"
                                                                                      for layer in range(3) for name in ("q_proj", "v_proj") for part in "AB"}
    text = (run / "export/adapter/adapter_config.json").read_text()
    assert json.loads(text)["r"] == 4 and '"lora_alpha": 16,' in text
    mask = os.umask(0)
    os.umask(mask)
    assert (run / "export/adapter/adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (run / "export/adapter/tokenizer.model").exists()
    assert sorted(path.name for path in (run / "export").iterdir()) == ["adapter"]


def test_lora_needs_a_pretrained_base(recipe):
    with pytest.raises(EngineError, match="needs a pretrained base"):
        train.main(recipe("lora.rank=4", "model.init=random"))


def test_training_goes_on_from_an_adapter(recipe, trained, ranks, tmp_path):
    """Its settings come from its file; the first loss is that of the adapter, the base is as before."""
    rows = f"data.validation={tmp_path / 'rows.jsonl'}"
    trained(1, recipe("lora.rank=4", "lora.rslora=true", "lora.dora=true", "lora.targets=[all-linear]", "train.max_steps=3", rows, name="first"))
    start = f"lora.start={tmp_path / 'runs/first/export/adapter'}"
    trained(2, recipe(start, "lora.dropout=0.1", "train.max_steps=2", rows, name="second"))
    lines = [[json.loads(line) for line in (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()] for name in ("first", "second")]
    before, after, going_on = (line["validation/loss"] for line in (lines[0][0], lines[0][-1], lines[1][0]))
    assert after < before and going_on == pytest.approx(after, rel=1e-6)
    configs = [json.loads((tmp_path / f"runs/{name}/export/adapter/adapter_config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == {**configs[1], "lora_dropout": 0.0} and configs[1]["use_dora"] and configs[1]["lora_dropout"] == 0.1
    with pytest.raises(EngineError, match="lora.alpha is decided by lora.start"):
        train.main(recipe(start, "lora.alpha=3"))
    with pytest.raises(EngineError, match="expected a folder with adapter_config.json"):
        train.main(recipe("lora.start=nowhere"))
