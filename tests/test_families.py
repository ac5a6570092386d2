"""Every family against transformers' own: a random model saved by it and loaded here, weights never touched by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import CASES

from engine import train
from engine.attention import PackedAttention
from engine.errors import EngineError
from engine.models import FAMILIES, weights
from engine.sampling import generate

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 256, "initializer_range": 0.1, "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None,
         "eos_token_id": None}
@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """Transformers' model, and the folder it was saved to."""
    kind, changes = CASES[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **changes}, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in theirs.named_parameters():  # norms of one and biases of zero would hide what is not applied
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
            parameter.data -= int(kind == "gemma3_text")  # stored less one
    theirs.save_pretrained(tmp_path / "hf")
    return theirs, tmp_path / "hf"


def load(folder: Path, dtype=torch.float32):
    return weights.build(folder, "pretrained", 0, dtype, dtype, CPU)


def logits(model, ids, lengths=None):
    lengths = lengths or [len(ids)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model.lm_head(model(ids, positions, PackedAttention(lengths, CPU)))


IDS = torch.randint(97, (80,), generator=torch.Generator().manual_seed(1))


def test_logits_and_every_gradient_equal_transformers(pair):
    theirs, folder = pair
    ours = load(folder)
    lengths = [50, 30]
    found, expected = logits(ours, IDS, lengths), torch.cat([theirs(part[None]).logits[0] for part in IDS.split(lengths)])
    assert expected.std() > 0.1 and (found - expected).abs().max() <= 1e-5
    for out in (found, expected):
        F.cross_entropy(out[:-1], IDS[1:]).backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_bf16_is_as_close_to_fp32_as_transformers(pair):
    """The yardstick is the reference's own error in bf16, not a number of ours."""
    theirs, folder = pair
    with torch.no_grad():
        exact, low = theirs(IDS[None]).logits[0], transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        error = (logits(load(folder, torch.bfloat16), IDS).float() - exact).norm()
        assert error <= 1.5 * (low(IDS[None]).logits[0].float() - exact).norm()


def test_greedy_generation_is_the_same_token_by_token(pair):
    theirs, folder = pair
    prompts = [IDS[:11], IDS[20:23]]
    ours = generate(load(folder).eval(), [prompt.tolist() for prompt in prompts], (), 64)
    for prompt, answer in zip(prompts, ours, strict=True):
        expected = theirs.generate(prompt[None], max_new_tokens=64, do_sample=False)[0, len(prompt) :]
        assert answer == expected.tolist() and len(answer) == 64


def test_what_is_written_is_read_by_transformers_with_the_same_logits(pair, tmp_path):
    theirs, folder = pair
    (tmp_path / "out").mkdir()
    weights.write_folder(tmp_path / "out", weights.read_config(folder), weights.untied(load(folder)).items())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(again(IDS[None]).logits, theirs(IDS[None]).logits)


@pytest.mark.parametrize("case", ["llama 3.2, tied", "mistral, window", "qwen2", "qwen3", "phi 3, window", "gemma 3"])
def test_a_run_leaves_what_transformers_and_peft_load(case, recipe, tiny, tmp_path):
    """Adapters on every linear layer under the names that the family has in other tools, and the model with them merged."""
    peft = pytest.importorskip("peft")
    kind, changes = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **changes, "vocab_size": 340}, attn_implementation="eager")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    shutil.copy(tiny / "tokenizer.model", tmp_path / "base")
    train.main(recipe(f"model.path={tmp_path / 'base'}", "lora.rank=4", "lora.targets=[all-linear]", "data.packing=true", "train.max_steps=3",
                      "export.kinds=[adapter,model]"))
    out, ids = tmp_path / "runs/run/export", torch.arange(60)[None]
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(out / "model", attn_implementation="eager")(ids).logits
    assert (adapted - before).abs().max() > 1e-3 and (adapted - merged).abs().max() <= 1e-5


@pytest.mark.parametrize("path", ["sdpa", "cpu", "reference"])
@pytest.mark.parametrize("window", [1, 7, 300, 1000])
def test_windows_on_every_path_and_in_the_cache(window, path):
    """Against a mask written out, in values and gradients, with documents shorter and longer than the window."""
    lengths = [700, 3, 650, 20]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, generator=draw, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    place, document = torch.arange(sum(lengths)), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    back = place[:, None] - place
    mask = (document[:, None] == document) & (back >= 0) & (back < window)
    scores = torch.einsum("thc,shc->hts", q, k.repeat_interleave(2, 1)) / 8**0.5
    expected = torch.einsum("hts,shc->thc", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.repeat_interleave(2, 1))
    found = PackedAttention(lengths, CPU, path)(0, q, k, v, window)
    assert (found - expected).abs().max() <= 1e-12
    weight = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for one, other in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        assert (one - other).abs().max() <= 1e-11


def test_a_window_costs_no_square_of_the_document():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(tokens: int) -> int:
        q = torch.randn(tokens, 4, 8)
        with FlopCounterMode(display=False) as counter:
            PackedAttention([tokens], CPU)(0, q, q[:, :2], q[:, :2], 128)
        return counter.get_total_flops()

    assert flops(4096) <= 4.5 * flops(1024)


def refused(tmp_path, raw) -> str:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(EngineError) as caught:
        weights.build(tmp_path, "random", 0, torch.float32, torch.float32, CPU)
    assert caught.value.exit_code == 2 and str(tmp_path / "config.json") in caught.value.text
    return caught.value.text


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"mlp_bias": True}, "mlp_bias is True"), ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "['beta', 'factor']"), ({"rope_scaling": {"rope_type": "llama3"}}, "'factor', "),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"), ({"logit_scale": 2.0}, "logit_scale is 2.0"),
    ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"), ({"hidden_size": None}, "hidden_size is missing"),
])
def test_a_field_that_changes_the_arithmetic_is_refused_by_name(tmp_path, kind, changes, words):
    raw = {"model_type": kind, **{key: value for key, value in SMALL.items() if value is not None}, **changes}
    assert words in refused(tmp_path, {key: value for key, value in raw.items() if value is not None})


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "gemma3", None])
def test_another_family_is_refused_by_name(tmp_path, kind):
    assert f"model_type is {kind!r}, expected one of llama, mistral, qwen2, qwen3, phi3, gemma3_text" in refused(tmp_path, {**SMALL, "model_type": kind})


PUBLISHED = {  # config.json as on the hub, names of fields and values that matter
    "Llama-3.2-1B-Instruct": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
                              "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
                              "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
                              "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
                              "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                                               "rope_type": "llama3"},
                              "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256},
    "Mistral-7B-v0.1": {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
                        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
                        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
                        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000},
    "Qwen2.5-0.5B": {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
                     "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
                     "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
                     "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
                     "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936},
    "Qwen2-7B with its windows on": {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
                                     "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
                                     "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 28,
                                     "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
                                     "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
                                     "use_sliding_window": True, "vocab_size": 152064},
    "Phi-3-mini-4k": {"_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
                      "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000,
                      "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
                      "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
                      "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
                      "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
                      "attention_bias": False, "vocab_size": 32064},
    "gemma-3-1b-it": {"architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
                      "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
                      "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912,
                      "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
                      "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
                      "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
                      "use_cache": True, "vocab_size": 262144},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_what_transformers_reads_in_them(name, tmp_path):
    raw = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), FAMILIES[raw["model_type"]].config(raw, name)
    for field in ("vocab_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    far, near = (theirs.rope_parameters.get(kind, theirs.rope_parameters) for kind in ("full_attention", "sliding_attention"))
    assert (far["rope_theta"], near["rope_theta"]) == tuple(rope.theta for rope in ours.ropes)
    assert (far["rope_type"], near["rope_type"]) == tuple(rope.kind for rope in ours.ropes)
    window = theirs.sliding_window if hasattr(theirs, "sliding_window") else None
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.num_hidden_layers
    assert ours.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
