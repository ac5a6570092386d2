"""Control tokens that a recipe adds: to the tokenizer, to embedding and head, and in what a run leaves."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_templates import make_tokenizer

from engine import convert, generate, train
from engine.attention import PackedAttention
from engine.data.added_tokens import extend
from engine.data.tokenizer import load_tokenizer
from engine.errors import EngineError
from engine.export import load_for_inference
from engine.models import weights

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
NAMES = ["<|im_start|>", "<|im_end|>"]
TEXTS = ["red cat", "<|im_start|>user <|im_end|>", "红 dog\n", "", "a<|im_end|>b"]


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def folder(request, tiny, tmp_path):
    if request.param == "tokenizer.model":
        return tiny
    return make_tokenizer(tmp_path / "json", "bpe", ["<|endoftext|>"])


def test_new_ids_follow_the_old_and_text_stays_text(folder, tmp_path):
    before, path = load_tokenizer(folder), extend(folder, NAMES, tmp_path / "cache")
    after = load_tokenizer(path)
    assert [after.special(name) for name in NAMES] == [before.size, before.size + 1] and after.size == before.size + 2
    assert after.digest != before.digest and (after.eos, after.prefix) == (before.eos, before.prefix)
    for text in TEXTS:
        assert after.encode(text) == before.encode(text) and not set(range(before.size, after.size)) & set(after.encode(text)), text
        assert after.decode([before.size, *after.encode(text), before.size + 1]) == before.decode(before.encode(text))
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert theirs.convert_tokens_to_ids(NAMES) == [before.size, before.size + 1]
    assert theirs("<|im_start|>", add_special_tokens=False).input_ids == [before.size]
    assert extend(folder, [], tmp_path / "cache") == folder and extend(folder, NAMES, tmp_path / "cache") == path
    with pytest.raises(EngineError, match="which tokenizer.* has already"):
        extend(path, NAMES[:1], tmp_path / "cache")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 5])
def test_rows_are_the_mean_of_those_before(tiny, tmp_path, tied, spare):
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    model = weights.build(tmp_path / "model", "random", 1, torch.float32, torch.float32, CPU)
    ids, positions, attend = torch.arange(30), torch.arange(30), PackedAttention([30], CPU)
    before, old = model.lm_head(model(ids, positions, attend)), [layer.weight.clone() for layer in (model.model.embed_tokens, model.lm_head)]
    known = 340 - spare
    weights.add_rows(model, known, known + 3)
    rows = max(340, known + 3)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied and model.config.vocab_size == rows
    for layer, was in zip((model.model.embed_tokens, model.lm_head), old, strict=True):
        assert layer.weight.shape == (rows, 32) and torch.equal(layer.weight[:known], was[:known]) and torch.equal(layer.weight[known + 3 :], was[known + 3 :])
        assert torch.allclose(layer.weight[known : known + 3], was[:known].mean(0).expand(3, -1), atol=1e-7)
    assert torch.equal(model.lm_head(model(ids, positions, attend))[:, :known], before[:, :known])


def test_ids_before_those_added_that_had_no_row_get_one(tiny):
    """The tokenizer of a text model may have a control token behind the vocabulary's end, which no row or template writes."""
    model = weights.build(tiny, "random", 1, torch.float32, torch.float32, CPU)
    old = model.model.embed_tokens.weight.clone()
    weights.add_rows(model, 342, 345)
    assert torch.allclose(model.model.embed_tokens.weight[340:], old.mean(0).expand(5, -1), atol=1e-7)


@pytest.mark.parametrize("options", [(), ("lora.rank=4", "lora.modules_to_save=[embed_tokens,lm_head]", "model.dtype=bf16")], ids=["full", "lora"])
def test_a_run_with_added_tokens_leaves_what_others_load(recipe, trained, tiny, tmp_path, options, capsys):
    added = [f"model.add_tokens={NAMES}".replace("'", '"'), "data.template=chatml", *options]
    trained(2, recipe(*added, "train.max_steps=4", "export.kinds=[model,adapter]" if options else "export.kinds=[model]"))
    out = tmp_path / "runs/run/export"
    config = json.loads((out / "model/config.json").read_text())
    assert config["vocab_size"] == 342 and json.loads((out / "model/generation_config.json").read_text())["eos_token_id"] == [341, 2]
    model = weights.build(out / "model", "pretrained", 0, torch.float32, torch.float32, CPU)
    ids = torch.tensor([1, 340, 20, 30, 341, 40, 340])
    logits = model.lm_head(model(ids, torch.arange(7), PackedAttention([7], CPU)))
    with torch.no_grad():
        assert (transformers.AutoModelForCausalLM.from_pretrained(out / "model")(ids[None]).logits[0] - logits).abs().max() <= 1e-5
    assert not torch.equal(model.lm_head.weight[340], model.lm_head.weight[341]), "the new rows are trained"
    generate.main(["--model", str(out / "model"), "--prompt", "red cat", "--max-new-tokens", "5"])
    answer = capsys.readouterr().out
    if options:
        import peft

        base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        base.resize_token_embeddings(342, mean_resizing=False)
        with torch.no_grad():
            for parameter in base.parameters():  # the adapter belongs to a base in bf16
                parameter.copy_(parameter.bfloat16())
            theirs = peft.PeftModel.from_pretrained(base, out / "adapter")(ids[None]).logits[0]
        assert (theirs - logits).abs().max() <= 1e-5
        generate.main(["--adapter", str(out / "adapter"), "--prompt", "red cat", "--max-new-tokens", "5"])
        assert capsys.readouterr().out == answer
        trained(1, recipe(*added[:2], "model.dtype=bf16", f"lora.start={out / 'adapter'}", "optim.lr=0", "train.max_steps=1", name="again"))
        for name in ("adapter_model.safetensors", "tokenizer.model"):
            assert (tmp_path / "runs/again/export/adapter" / name).read_bytes() == (out / "adapter" / name).read_bytes()


def test_convert_takes_them_over_with_an_adapter_as_the_run_does(folder, recipe, tiny, tmp_path, capsys):
    """Vocabulary, tokenizer, what ends an answer, how to ask: every file of the folder that the run itself exported."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    if folder != tiny:
        (base / "tokenizer.model").unlink()
        shutil.copy(folder / "tokenizer.json", base)
        config = {**json.loads((base / "config.json").read_text()), "vocab_size": load_tokenizer(folder).size, "eos_token_id": 2}
        (base / "config.json").write_text(json.dumps(config))
        weights.write_folder(base, config, weights.untied(weights.build(base, "random", 1, torch.float32, torch.float32, CPU)).items())
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "temperature": 0.6}))
    added = ("lora.rank=4", "lora.modules_to_save=[embed_tokens,lm_head]", f"model.add_tokens={NAMES}".replace("'", '"'), "data.template=chatml")
    train.main(recipe(*added, f"model.path={base}", "data.system=Short.", "export.kinds=[adapter,model]", "train.max_steps=2"))
    run = tmp_path / "runs/run/export"
    asked = load_for_inference(base, run / "adapter", torch.bfloat16, CPU)
    assert {parameter.dtype for parameter in asked.parameters()} == {torch.bfloat16}, "a whole head would be narrowed for every token"
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert (asked.lm_head.weight is asked.model.embed_tokens.weight) == tied
    convert.main([str(base), str(tmp_path / "merged"), "--adapter", str(run / "adapter"), "--dtype", "fp32"])
    note = json.loads((run / "model/engine.json").read_text())
    del note["agreement_with_training"]
    assert json.loads((tmp_path / "merged/engine.json").read_text()) == note and note["system"] == "Short."
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in (run / "model").iterdir()}
    for path in (run / "model").iterdir():
        assert path.name == "engine.json" or path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes(), path.name
    ends = json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"]
    assert ends == [load_tokenizer(run / "adapter", base).special("<|im_end|>"), *sorted({load_tokenizer(base).eos, 9})]
    answers = []
    for model in (run / "model", tmp_path / "merged"):
        capsys.readouterr()
        generate.main(["--model", str(model), "--prompt", "red cat", "--max-new-tokens", "5"])
        told = capsys.readouterr()
        answers.append(told.out)
        assert "template chatml" in told.err and "with a system prompt" in told.err
    assert answers[0] == answers[1]
    if folder == tiny:  # GGUF has no name for how the other splits text
        convert.main([str(base), str(tmp_path / "merged.gguf"), "--adapter", str(run / "adapter"), "--dtype", "fp32"])
        convert.main([str(tmp_path / "merged.gguf"), str(tmp_path / "back"), "--dtype", "fp32"])
        ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "back", run / "model"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert load_tokenizer(tmp_path / "back").special("<|im_end|>") == load_tokenizer(run / "model").special("<|im_end|>") == 341


def test_new_rows_that_would_not_be_trained_are_refused(recipe, tmp_path):
    with pytest.raises(EngineError, match="model.add_tokens with LoRA needs embedding and head"):
        train.main(recipe("model.add_tokens=[a]", "lora.rank=4"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(EngineError, match="model.add_tokens with LoRA needs embedding and head"):
        train.main(recipe("model.add_tokens=[a]", f"lora.start={tmp_path}"))
    with pytest.raises(EngineError, match="expected names that differ"):
        train.main(recipe("model.add_tokens=[a, a]"))
