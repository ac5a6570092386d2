"""Generation: the cache changes nothing, draws repeat, text comes out whole, and prompts are those of training."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from conftest import ROOT, a_row, load_dataset, ragged_rows, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from engine import evaluate, lora, sampling
from engine import generate as command
from engine.adapter import save
from engine.attention import PackedAttention
from engine.config import Data, Evaluate, Lora
from engine.data.template import TEMPLATES
from engine.data.tokenizer import end_of, load_tokenizer, prompt_ids, stops
from engine.distributed import World
from engine.dropout import DropoutKeys
from engine.errors import ENVIRONMENT, USER, EngineError
from engine.export import load_for_inference
from engine.precision import choose
from engine.sampling import Sampling, _choose, generate

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 200, 31], [7], list(range(40, 75)), [300, 3, 3, 8, 90, 14], [11] * 20]
NEVER = ()
CONTROL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<think>", "</think>",
           "<start_of_turn>", "<end_of_turn>"]
TEXTS = ["你好，世界！今天是2024年。", "🙂🤖 emoji 👩‍👩‍👧 done", " two  spaces\n\n  lines", "plain words, one two three", "é ß ½"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama that transformers wrote, with a sentencepiece tokenizer that has the control tokens of every template."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=160, rms_norm_eps=1e-5, initializer_range=0.2, eos_token_id=2, bos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    text = folder.parent / "text.txt"
    text.write_text("\n".join(" ".join(row.values()) for row in ragged_rows(300)) + "\n### Instruction:\n### Input:\n### Response:\nuser assistant\n" * 20)
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=385, byte_fallback=True, model_type="bpe",
                                             control_symbols=CONTROL, minloglevel=2, num_threads=1)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_for_inference(folder, None, torch.float32, CPU)


@torch.no_grad()
def recomputed(model, prompt: list[int], count: int) -> list[int]:
    """The greedy answer with nothing kept from one token to the next."""
    ids = list(prompt)
    for _ in range(count):
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), PackedAttention([len(ids)], CPU))
        ids.append(int(model.lm_head(hidden[-1]).argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_are_those_without_a_cache_and_those_of_transformers(folder, model):
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    together = generate(model, PROMPTS, NEVER, 64)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert len(answer) == 64 and len(set(answer)) > 5
        assert generate(model, [prompt], NEVER, 64) == [answer], "rows beside it change nothing"
        assert recomputed(model, prompt, 64) == answer
        ids = torch.tensor([prompt])
        assert theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist() == answer


def test_rows_end_at_their_own_end_of_sequence(model):
    whole = generate(model, PROMPTS, NEVER, 64)
    eos = next(token for token in whole[2][10:] if sum(token in answer for answer in whole) >= 2)  # ends some rows early, others never
    ended = [answer[: answer.index(eos)] if eos in answer else answer for answer in whole]
    assert len({len(answer) for answer in ended}) > 1
    assert generate(model, PROMPTS, {eos}, 64) == ended
    first = whole[1][0]
    assert generate(model, [PROMPTS[1]], {first}, 64) == [[]]


def test_answers_stop_at_the_last_position(model):
    near = [[5] * 150, [6] * 3, [7] * 159]
    answers = generate(model, near, NEVER, 30)
    assert [len(answer) for answer in answers] == [10, 30, 1]
    assert answers == [generate(model, [prompt], NEVER, 30)[0] for prompt in near]
    assert answers[0] == recomputed(model, near[0], 10)


def test_draws_repeat_with_their_seed(model):
    def draw(**settings) -> list[list[int]]:
        return generate(model, PROMPTS, NEVER, 24, Sampling(**settings))

    greedy = draw()
    assert draw(temperature=0.0, top_p=0.5, seed=9) == greedy
    assert draw(temperature=1.0, top_p=1e-9, seed=3) == draw(temperature=1.0, top_p=0.0) == greedy == draw(temperature=0.001)
    assert draw(temperature=1.5, seed=3) == draw(temperature=1.5, seed=3) != draw(temperature=1.5, seed=4)
    assert draw(temperature=1.5, top_p=0.9, seed=3) != greedy


def test_draws_have_the_probabilities_they_should():
    logits = torch.tensor([2.0, -1.0, 1.0, 0.0]).log_softmax(0).repeat(20000, 1)
    softmax = torch.softmax(torch.tensor([2.0, -1.0, 1.0, 0.0]) / 0.7, 0)
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.9, [0, 2]), (0.5, [0])):  # 0.77, 0.19, 0.04, 0.01
        drawn = _choose(logits, Sampling(0.7, top_p), torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
        expected = torch.zeros(4).index_copy(0, torch.tensor(kept), softmax[kept]) / softmax[kept].sum()
        torch.testing.assert_close(drawn, expected, rtol=0, atol=0.012)  # four deviations
        assert drawn[expected == 0].sum() == 0


def test_tokens_are_told_step_by_step(model):
    told: list[tuple[int, int]] = []
    answers = generate(model, PROMPTS, NEVER, 8, on_token=lambda row, token: told.append((row, token)))
    assert told == [(row, answers[row][step]) for step in range(8) for row in range(len(PROMPTS))]
    # with an end in between, each row's tokens are still its answer's
    eos, told[:] = answers[3][4], []
    ended = generate(model, PROMPTS, {eos}, 8, on_token=lambda row, token: told.append((row, token)))
    assert ended == [[token for row, token in told if row == number] for number in range(len(PROMPTS))] != answers


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_streamed_text_is_the_decoded_text(kind, folder):
    if kind == "sentencepiece":
        tokenizer = load_tokenizer(folder)
        encode, decode, size = tokenizer.encode, tokenizer.decode, tokenizer.size
    else:
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer, model.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
        model.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<end>"], show_progress=False,
                                                                         initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        encode, decode, size = lambda text: model.encode(text).ids, model.decode, model.get_vocab_size()
    for text in TEXTS:
        ids, stream = encode(text), command.Stream(decode)
        pieces = [stream.add(number) for number in ids]
        assert "".join(pieces) == decode(ids) and stream.rest() == "" and "\ufffd" not in "".join(pieces)
        assert sum(map(bool, pieces)) > 1
    draw = torch.Generator().manual_seed(0)
    for length in [1, 2, 3, 5, 40] * 60:  # bytes that are no text at all, control tokens, spaces in any place
        ids, stream = torch.randint(size, (length,), generator=draw).tolist(), command.Stream(decode)
        assert "".join(map(stream.add, ids)) + stream.rest() == decode(ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_what_stands_before_the_answer_in_training(template, folder, tmp_path):
    rows = [*ragged_rows(20), {"instruction": " 空格 \n", "input": " \t", "output": "</s> x"}, {"instruction": "<|im_end|>", "input": "a\nb ", "output": "y"}]
    tokenizer = load_tokenizer(folder)
    dataset = load_dataset(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, template, 256, "error", tmp_path / "cache")
    assert len(dataset) == len(rows)
    for number, row in enumerate(rows):
        part = slice(*dataset.offsets[number : number + 2])
        tokens, supervised = dataset.tokens[part].tolist(), dataset.supervised[part]
        prompt = tokens[: int(supervised.argmax())]
        assert prompt_ids(a_row(**row), template, tokenizer) == prompt
        assert tokens[-1] == end_of(template, tokenizer) and supervised[len(prompt) :].all()


def answer_of(model, folder: Path, instruction: str, about: str = "", template: str = "alpaca", count: int = 12, **settings) -> str:
    tokenizer = load_tokenizer(folder)
    prompt = prompt_ids(a_row(instruction, about), template, tokenizer)
    return tokenizer.decode(generate(model, [prompt], stops(template, tokenizer), count, Sampling(**settings))[0])


def test_one_prompt(folder, model, capsys):
    start = ["--model", str(folder), "--max-new-tokens", "12", "--device", "cpu", "--prompt", "red 猫"]
    command.main(start)
    output, notes = capsys.readouterr()
    assert output == answer_of(model, folder, "red 猫") + "\n"
    assert "template alpaca" in notes and "names none" in notes and "fp32 on cpu, greedy" in notes and "tokens/s" in notes
    command.main([*start, "--input", "two", "--template", "chatml", "--temperature", "1.5", "--top-p", "0.9", "--seed", "4"])
    assert capsys.readouterr().out == answer_of(model, folder, "red 猫", "two", "chatml", temperature=1.5, top_p=0.9, seed=4) + "\n"
    (folder / "engine.json").write_text('{"template": "plain"}')
    command.main([*start, "--dtype", "bf16"])
    (folder / "engine.json").unlink()
    output, notes = capsys.readouterr()
    assert output == answer_of(load_for_inference(folder, None, torch.bfloat16, CPU), folder, "red 猫", template="plain") + "\n"
    assert "template plain" in notes and "bf16" in notes


def test_a_file_of_rows(folder, model, tmp_path, capsys):
    rows = ragged_rows(7)
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "answers.jsonl"
    start = ["--model", str(folder), "--max-new-tokens", "12", "--device", "cpu", "--file", str(source), "--batch", "3"]
    command.main([*start, "--out", str(out)])
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert written == [{"instruction": row["instruction"], "input": row["input"], "answer": answer_of(model, folder, row["instruction"], row["input"])}
                       for row in rows]
    capsys.readouterr()
    command.main(start)
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")
    with pytest.raises(EngineError, match="exists already"):
        command.main([*start, "--out", str(out)])
    unanswered = write_rows(tmp_path / "unanswered.jsonl", [{key: row[key] for key in ("instruction", "input")} for row in rows])
    command.main([*start[: start.index("--file")], "--file", str(unanswered)])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == written
    same = write_rows(tmp_path / "same.jsonl", rows[:1] * 4)  # one row in four batches: each draws anew
    command.main([*start[:-4], "--file", str(same), "--batch", "1", "--temperature", "1.5"])
    assert len(set(capsys.readouterr().out.splitlines())) == 4


@pytest.mark.parametrize(("room", "at_once"), [(0, 1), (1.0, 1), (2.99, 2), (5.0, 5), (1e6, 7)])
def test_as_many_rows_are_answered_at_once_as_their_keys_and_values_have_room(room, at_once, folder, model, tmp_path, monkeypatch, capsys):
    """In an evaluation and for a file of rows; the answers are the same. `room`: of how many rows of the longest prompt."""
    rows = ragged_rows(7)
    source, tokenizer = write_rows(tmp_path / "rows.jsonl", rows), load_tokenizer(folder)
    asked = load_dataset(source, tokenizer, "alpaca", 256, "error", tmp_path / "cache")
    judge = evaluate.Evaluation(asked, tokenizer, Data(str(source)), Evaluate(max_new_tokens=12), "sdpa", choose("fp32", None, CPU), World(0, 1, 0, CPU))
    usual, whole = judge._answers(model, 7), asked.prompt_and_answer
    cache = model.cache(1, max(len(whole(row)[0]) for row in range(7)) + 12)  # what it takes is counted on the cache itself
    monkeypatch.setattr(sampling, "CACHE_BYTES", int(room * (cache.keys.nbytes + cache.values.nbytes)))
    seen: list[int] = []

    def count(model, prompts, *rest):
        seen.append(len(prompts))
        return generate(model, prompts, *rest)

    monkeypatch.setattr(evaluate, "generate", count)
    monkeypatch.setattr(sampling, "generate", count)
    assert judge._answers(model, 7) == usual and len({sample.answer for sample in usual}) > 3
    sizes = [at_once] * (7 // at_once) + [7 % at_once] * (7 % at_once > 0)
    assert seen == sizes
    seen.clear()
    command.main(["--model", str(folder), "--max-new-tokens", "12", "--device", "cpu", "--file", str(source), "--batch", "8"])
    assert [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()] == [sample.answer for sample in usual]
    assert seen == sizes


def test_rows_that_end_at_the_last_position_need_room_no_further(model):
    config, prompts = model.config, [[5] * 100, [6]]
    of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for new, tokens in ((10, 110), (60, 160), (5000, 160)):
        assert sampling.rows_at_once(model, prompts, new, 1 << 40) == sampling.CACHE_BYTES // (of_token * tokens)
    assert sampling.rows_at_once(model, prompts, 10, 3) == 3


def test_a_chat_over_a_pipe(folder, model, capsys, monkeypatch):
    for lines, questions in (("red cat\n你好\n\nnever asked\n", ["red cat", "你好"]), ("no line break at the end", ["no line break at the end"]), ("", [])):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        command.main(["--model", str(folder), "--max-new-tokens", "12", "--device", "cpu"])
        assert capsys.readouterr().out == "".join(answer_of(model, folder, question) + "\n" for question in questions)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(EngineError, match="standard input.*expected UTF-8"):
        command.main(["--model", str(folder), "--device", "cpu"])


def test_an_adapter_names_its_base(folder, model, tmp_path, capsys):
    adapted = load_for_inference(folder, None, torch.float32, CPU)
    lora.apply(adapted, lora.Settings(4, 8.0, Lora().targets), DropoutKeys(0), 1)
    for number, layer in enumerate(lora.adapters(adapted).values()):
        layer.lora_B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save(adapted, adapter, str(folder), 0.0)
    (adapter / "engine.json").write_text('{"template": "chatml"}')
    start = ["--adapter", str(adapter), "--max-new-tokens", "12", "--device", "cpu", "--prompt", "red"]
    command.main(start)
    expected = answer_of(adapted.eval(), folder, "red", template="chatml") + "\n"
    assert capsys.readouterr().out == expected != answer_of(model, folder, "red", template="chatml") + "\n"
    save(adapted, adapter, "/somewhere/else", 0.0)
    with pytest.raises(EngineError, match="somewhere/else.*--model"):
        command.main(start)
    command.main([*start, "--model", str(folder)])
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(("more", "says"), [
    (["--prompt", "red " * 200], "tokens, expected 1 to 159"),
    (["--prompt", "half \udce4"], "expected UTF-8"),
    (["--file", "rows.jsonl"], "rows.jsonl:2: the prompt has"),
    (["--file", "none.jsonl"], "none.jsonl: cannot be read"),
    (["--adapter", "none", "--prompt", "x"], "none: cannot be read as an adapter"),
    (["--prompt", "x", "--input", "y", "--file", "rows.jsonl"], "--prompt and --file exclude each other"),
    (["--input", "y"], "--input needs --prompt"),
    (["--out", "y"], "--out needs --file"),
    (["--temperature", "-1"], "expected a number of at least 0"),
    (["--temperature", "nan"], "expected a number of at least 0"),
    (["--top-p", "0"], "--top-p: got 0"),
    (["--top-p", "1.5"], "expected a number from 0 to 1"),
    (["--max-new-tokens", "1.5"], "expected a whole number of at least 1"),
    (["--template", "vicuna"], "vicuna"),
])
def test_mistakes_are_told_in_one_line(more, says, folder, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "input": "", "output": ""}, {"instruction": "red " * 200, "input": "", "output": ""}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError) as error:
        command.main(["--model", str(folder), "--device", "cpu", *more])
    assert says in error.value.text and "\n" not in error.value.text and error.value.exit_code == USER


def test_cuda_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError) as error:
        command.main(["--model", str(folder), "--device", "cuda"])
    assert error.value.exit_code == ENVIRONMENT


def test_as_a_command(folder):
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "engine.generate", *arguments], input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=60)

    wrong = run("--prompt", "x")
    assert wrong.returncode == USER and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("ERROR E-GENERATE-ARGUMENTS --model or --adapter")
    helped = run("--help")
    assert helped.returncode == 0 and "example: python -m engine.generate" in helped.stdout
    chat = run("--model", str(folder), "--device", "cpu", "--max-new-tokens", "3", stdin="red\n")
    assert chat.returncode == 0 and chat.stdout.endswith("\n") and chat.stderr.count("\n") == 1
