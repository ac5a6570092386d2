"""Variants of LoRA against peft, in both directions: its adapters read here, ours read there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import adapter, lora, optim
from engine.attention import PackedAttention
from engine.config import Optim
from engine.distributed import World
from engine.dropout import DropoutKeys
from engine.errors import EngineError
from engine.loss import summed_cross_entropy
from engine.models import weights

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

create_loraplus_optimizer = pytest.importorskip("peft.optimizers").create_loraplus_optimizer
CPU = torch.device("cpu")
IDS = torch.arange(30)
# options of ours -> those of peft.LoraConfig
VARIANTS = {
    "plain": ({}, {}),
    "all-linear": ({"targets": ["all-linear"]}, {"target_modules": "all-linear"}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora, rslora": ({"dora": True, "rslora": True, "targets": ["all-linear"]}, {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3.0, "v_proj": 5.0}},
                 {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3.0, "v_proj": 5.0}}),
    "embedding and head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.fixture(scope="module", params=["tied", "untied with biases"])
def base(request, tmp_path_factory):
    """A folder that transformers saved: Llama tied, Qwen2 untied."""
    torch.manual_seed(0)
    kind, tied = ("llama", True) if request.param == "tied" else ("qwen2", False)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.15, tie_word_embeddings=tied))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    return folder


def ours(folder, **settings):
    model = weights.build(folder, "pretrained", 0, torch.float32, torch.float32, CPU)
    lora.apply(model, lora.Settings(**{"rank": 4, "alpha": 6.0, "targets": ["q_proj", "v_proj", "down_proj"], **settings}), DropoutKeys(0), 7)
    return model


def theirs(folder, **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}))


def randomise(model) -> None:
    """Moves every trained parameter, so that nothing is zero or one by chance."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.empty(parameter.shape).normal_(0, 0.1, generator=draw)


def logits(model) -> torch.Tensor:
    if isinstance(model, peft.PeftModel | transformers.PreTrainedModel):
        return model(IDS[None]).logits[0]
    return model.lm_head(model(IDS, IDS, PackedAttention([30], CPU)))


def difference(one, other) -> float:
    return float((logits(one) - logits(other)).abs().max())


def loaded(base, folder):
    model = weights.build(base, "pretrained", 0, torch.float32, torch.float32, CPU)
    adapter.load(model, folder)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_saved_is_computed_the_same_and_merged_the_same(base, variant, tmp_path):
    reference = theirs(base, **VARIANTS[variant][1]).eval()
    if reference.base_model.model.config.tie_word_embeddings and "modules_to_save" in VARIANTS[variant][1]:
        reference.base_model.model.lm_head.modules_to_save["default"].weight = reference.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    randomise(reference)
    reference.save_pretrained(tmp_path)
    model = loaded(base, tmp_path)
    assert difference(reference, theirs(base)) > 0.01 and difference(model, reference) <= 1e-5
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} - {"weight"} == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if "dora" in variant else set())
    lora.fold(model)
    assert difference(model, reference.merge_and_unload()) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_saved_is_computed_the_same_by_peft_and_read_back_bit_for_bit(base, variant, tmp_path):
    model = ours(base, **VARIANTS[variant][0])
    plain = weights.build(base, "pretrained", 0, torch.float32, torch.float32, CPU)
    assert difference(model, plain) == 0, "training starts from the base"
    randomise(model)
    adapter.save(model, tmp_path, str(base), 0.0)
    reference = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert difference(model, plain) > 0.01 and difference(model, reference) <= 1e-5
    again = loaded(base, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "second").mkdir()
    adapter.save(again, tmp_path / "second", str(base), 0.0)
    for name in (adapter.WEIGHTS, adapter.CONFIG):
        assert (tmp_path / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    lora.fold(again)
    assert difference(again, model) <= 1e-5 and not lora.adapters(again)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_peft(base, variant, tmp_path):
    model = ours(base, **VARIANTS[variant][0])
    randomise(model)
    adapter.save(model, tmp_path, str(base), 0.0)
    reference = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path, is_trainable=True)
    targets = IDS.roll(-1)[:-1]
    summed_cross_entropy(model(IDS, IDS, PackedAttention([30], CPU))[:-1], model.lm_head.weight, targets).backward()
    torch.nn.functional.cross_entropy(logits(reference)[:-1], targets, reduction="sum").backward()
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    for name, module in lora.adapters(model).items():
        for ours_name, theirs_name in (("lora_A", "lora_A.default.weight"), ("lora_B", "lora_B.default.weight"),
                                       ("lora_magnitude_vector", "lora_magnitude_vector.default.weight")):
            if (parameter := getattr(module, ours_name)) is not None:
                grad = wanted[f"base_model.model.{name}.{theirs_name}"]
                assert (parameter.grad - grad).norm() <= 1e-4 * grad.norm(), f"{name}.{ours_name}"
    if "modules_to_save" in VARIANTS[variant][0]:
        parts = [wanted[f"base_model.model.{place}.modules_to_save.default.weight"] for place in ("model.embed_tokens", "lm_head")]
        found = [model.model.embed_tokens.weight.grad, model.lm_head.weight.grad]
        for grad, other in zip(found, [sum(parts)] * 2 if model.config.tie_word_embeddings else parts, strict=True):
            assert (grad - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_pefts_and_leaves_the_base_alone(base, rslora, tmp_path):
    model = ours(base, init="pissa", rslora=rslora, rank_pattern={"v_proj": 2})
    plain = weights.build(base, "pretrained", 0, torch.float32, torch.float32, CPU)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert difference(model, plain) <= 2e-6
    reference = theirs(base, init_lora_weights="pissa", use_rslora=rslora, rank_pattern={"v_proj": 2}).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in lora.adapters(model).items():
            other = reference.base_model.model.get_submodule(name)
            start = (module.scale * module.lora_B @ module.lora_A, other.scaling["default"] * other.lora_B["default"].weight @ other.lora_A["default"].weight)
            assert start[0].norm() > 0.3 * module.weight.norm() and (start[0] - start[1]).norm() <= 1e-5 * start[1].norm()
            module.lora_A.copy_(other.lora_A["default"].weight)  # the signs of singular vectors are the library's choice
            module.lora_B.copy_(other.lora_B["default"].weight)
            for parameter, twin in ((module.lora_A, other.lora_A["default"].weight), (module.lora_B, other.lora_B["default"].weight)):
                moved = torch.empty(parameter.shape).normal_(0, 0.1, generator=draw)
                parameter += moved
                twin += moved
    assert difference(model, plain) > 0.01 and difference(model, reference) <= 1e-5
    adapter.save(model, tmp_path, str(base), 0.0)
    on_base = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert difference(model, on_base) <= 1e-5, "on the base as it is on disk"
    assert difference(loaded(base, tmp_path), model) <= 1e-5
    lora.fold(model)
    assert difference(model, reference) <= 1e-5


@pytest.mark.parametrize(("weight_decay", "rate"), [(0.0, 0.01), (0.1, 0.003)])
def test_lora_plus_takes_pefts_steps(base, tmp_path, weight_decay, rate):
    model = ours(base)
    randomise(model)
    adapter.save(model, tmp_path, str(base), 0.0)
    reference = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path, is_trainable=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, _ = optim.build(trained, Optim(lr=0.5, weight_decay=weight_decay, lora_plus=8.0), 0, World(0, 1, 0, CPU))
    other = create_loraplus_optimizer(reference, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=8.0, loraplus_weight_decay=weight_decay)
    targets = IDS.roll(-1)[:-1]
    for _ in range(3):
        optim.set_learning_rate(optimizer, rate)
        summed_cross_entropy(model(IDS, IDS, PackedAttention([30], CPU))[:-1], model.lm_head.weight, targets).backward()
        torch.nn.functional.cross_entropy(logits(reference)[:-1], targets, reduction="sum").backward()
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    for name, module in lora.adapters(model).items():
        twin = reference.base_model.model.get_submodule(name)
        for part in ("lora_A", "lora_B"):
            assert (getattr(module, part) - getattr(twin, part)["default"].weight).abs().max() <= 2e-5, f"{name}.{part}"


@pytest.mark.parametrize("init", ["random", "pissa"])
def test_doras_lengths_are_those_of_the_rows(base, init):
    model = ours(base, dora=True, init=init)
    randomise(model)
    for module in lora.adapters(model).values():
        a, b = module.pair()
        expected = (module.weight + module.scale * b @ a).norm(dim=1)
        assert torch.allclose(module.lengths(), expected, rtol=1e-5)
        assert torch.allclose(module.merged_weight().norm(dim=1), module.lora_magnitude_vector, rtol=1e-5)


@pytest.mark.parametrize(("settings", "words"), [
    ({"rank_pattern": {"k_proj": 2}}, "rank_pattern: k_proj matches no linear layer with an adapter"),
    ({"alpha_pattern": {"q_prj": 2.0}}, "alpha_pattern: q_prj matches no linear layer with an adapter"),
    ({"rank": 17, "init": "pissa"}, "v_proj has 16 singular values, got rank 17"),
    ({"targets": ["all-linear", "q_prj"]}, "targets: q_prj matches no linear layer; there are: down_proj"),
])
def test_patterns_that_match_nothing_are_refused(base, settings, words):
    with pytest.raises(EngineError, match=words):
        ours(base, **settings)


@pytest.mark.parametrize(("changes", "words"), [
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"), ({"bias": "all"}, "bias='all'"), ({"peft_type": "VERA"}, "peft_type='VERA'"),
    ({"lora_bias": True}, "lora_bias=True"), ({"modules_to_save": ["score"]}, "modules_to_save='score'"), ({"new_idea": 3}, "new_idea=3"),
    ({"use_dora": True}, "lora_magnitude_vector: file has nothing"), ({"use_dora": False, "trainable_token_indices": [1]}, "trainable_token_indices"),
])
def test_adapters_of_other_kinds_are_refused_by_name(base, changes, words, tmp_path):
    adapter.save(ours(base), tmp_path, str(base), 0.0)
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    (tmp_path / adapter.CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(EngineError, match=words):
        loaded(base, tmp_path)


def test_adapters_that_do_not_fit_are_refused_by_name(base, tmp_path):
    adapter.save(ours(base), tmp_path, str(base), 0.0)
    tensors = load_file(tmp_path / adapter.WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    odd = {name: torch.zeros(31, 4), "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}
    save_file({**tensors, **odd}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(EngineError) as caught:
        loaded(base, tmp_path)
    for words in ("model.layers.9.mlp.up_proj: the base has no such linear layer", "file has [31, 4], the base wants [32, 4]"):
        assert words in caught.value.text
    (tmp_path / adapter.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(EngineError, match="is a pickle") as caught:
        loaded(base, tmp_path)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(("change", "words"), [
    (lambda tensors: tensors.update(embed=tensors["embed"][:90].clone()), "embed_tokens: file has [90, 32], the base wants [97, 32]"),
    (lambda tensors: tensors.update(embed=torch.ones(97, 32)), "with the adapter they would differ"),
    (lambda tensors: tensors.update(embed=torch.ones(99, 32)), "differ"),
    (lambda tensors: tensors.update(embed=torch.ones(97)), "embed_tokens: file has [97]"),
    (lambda tensors: tensors.pop("head"), "with the adapter they would differ"),
])
def test_an_embedding_that_does_not_fit_is_refused_by_name(base, change, words, tmp_path):
    model = ours(base, modules_to_save=["embed_tokens", "lm_head"])
    adapter.save(model, tmp_path, str(base), 0.0)
    names = {"embed": "base_model.model.model.embed_tokens.weight", "head": "base_model.model.lm_head.weight"}
    stored = load_file(tmp_path / adapter.WEIGHTS)
    tensors = {short: stored.pop(name) for short, name in names.items()}
    change(tensors)
    save_file({**stored, **{names[short]: tensor for short, tensor in tensors.items()}}, tmp_path / adapter.WEIGHTS)
    if words == "with the adapter they would differ" and not model.config.tie_word_embeddings:
        loaded(base, tmp_path)
        return
    with pytest.raises(EngineError) as caught:
        loaded(base, tmp_path)
    assert words in caught.value.text


@pytest.mark.parametrize("changes", [{"lora_alpha": "16"}, {"lora_alpha": None}, {"alpha_pattern": {"q_proj": "x"}}, {"alpha_pattern": [1]}])
def test_settings_of_odd_types_are_one_line(base, changes, tmp_path):
    adapter.save(ours(base), tmp_path, str(base), 0.0)
    (tmp_path / adapter.CONFIG).write_text(json.dumps({**json.loads((tmp_path / adapter.CONFIG).read_text()), **changes}))
    with pytest.raises(EngineError, match="cannot be read as an adapter"):
        loaded(base, tmp_path)
