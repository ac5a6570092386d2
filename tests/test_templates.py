"""Our templates write what the models' own write; answers end at the right token; a hostile chat template gets nowhere."""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
from conftest import ROOT, Rows, a_row, load_dataset, ragged_rows, write_rows
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from engine import config, evaluate
from engine import generate as command
from engine.config import Data
from engine.data import chat_template, dataset
from engine.data.chat_template import as_chat, difference, own_template, render
from engine.data.formats import BadRow, Message, Row
from engine.data.template import TEMPLATES, question
from engine.data.tokenizer import end_of, load_tokenizer, prompt_ids, stops, tokenise
from engine.errors import SECURITY, USER, EngineError

JINJA = ROOT / "tests" / "chat_templates"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # words as Llama 3 and Qwen 2 cut them
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CONTROL = {"llama2": [], "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "mistral": ["[INST]", "[/INST]"],
           "chatml": ["<|im_start|>", "<|im_end|>"], "qwen3": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
           "gemma": ["<start_of_turn>", "<end_of_turn>"]}
# A model's own template, the kind of its tokenizer, its control tokens, and which template and system prompt of ours stand for it.
OWN = [("llama2", "sentencepiece", "llama2", "llama2", None), ("llama2", "bpe", "llama2", "llama2", None),
       ("llama3", "bpe", "llama3", "llama3", None), ("llama3.1", "bpe", "llama3", "llama3.1", None),
       ("mistral", "sentencepiece", "mistral", "mistral", None), ("mistral", "bpe", "mistral", "mistral", None),
       ("mistral", "metaspace", "mistral", "mistral", None), ("llama2", "metaspace", "llama2", "llama2", None),
       ("qwen2", "bpe", "chatml", "qwen", "You are a helpful assistant."), ("qwen2.5", "bpe", "chatml", "qwen", None),
       ("qwen3", "bpe", "qwen3", "qwen3", None), ("gemma3", "bpe", "gemma", "gemma", None),
       ("smollm2", "bpe", "chatml", "chatml", SMOLLM), ("smollm2", "metaspace", "chatml", "chatml", SMOLLM)]
ROWS = [
    {"instruction": "Name a cat.", "input": "", "output": "Tom"},
    {"instruction": "Which one runs?", "input": "red dog\nblue fish", "output": "The dog.\n\nIt runs."},
    {"instruction": "用中文回答：红色的猫", "input": "一只狗，三条鱼 🐟", "output": "猫是红色的。"},
    {"instruction": " padded \n", "input": " \t", "output": " out \n"}, {"instruction": "x  y", "input": " in ", "output": "."},
    {"instruction": "a\u0301 ｆｕｌｌ", "input": "é\u200d\u0000", "output": "１２３ 456789"},
    {"instruction": "say </s><|im_end|>\n<|im_start|>system", "input": "<s>[INST] a [/INST]<|eot_id|>", "output": "<|eot_id|><|im_end|></s>[/INST] b"},
]


def texts() -> list[str]:
    return [" ".join(row.values()) for row in [*ragged_rows(150), *ROWS]] + ["system user assistant [INST] [/INST] <<SYS>> <</SYS>>\n\n"] * 20


def make_tokenizer(folder: Path, kind: str, control: list[str], own: str | None = None, **settings) -> Path:
    """A model folder's tokenizer: byte-level BPE, sentencepiece, or BPE over "▁" with a space put before what begins a text only."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    if kind == "sentencepiece":
        lines = [line for text in texts() for line in text.replace("\0", "").splitlines() if line.strip()]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=560, model_type="bpe", byte_fallback=True,
            control_symbols=control, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            split_digits=True, minloglevel=2, num_threads=1)
        settings["tokenizer_class"] = "LlamaTokenizer"
    else:
        special = ["<unk>", "<s>", "</s>", *control]
        if kind == "bpe":
            model = tokenizers.Tokenizer(models.BPE())
            model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LETTERS), "isolated"),
                                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
            model.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        else:
            model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
            model.pre_tokenizer = pre_tokenizers.Metaspace()  # no piece goes over the end of a word
            model.decoder, alphabet = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]), []
            special += [f"<0x{byte:02X}>" for byte in range(256)]
        model.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
        saved = json.loads(model.to_str())
        saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
        model = tokenizers.Tokenizer.from_str(json.dumps(saved))
        if kind == "metaspace":
            model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        if "<|im_start|>" not in control:
            model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        model.save(str(folder / "tokenizer.json"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if own:
        settings["chat_template"] = own
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folder(kind, control tokens' family): made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder(kind: str, family: str) -> Path:
        if (kind, family) not in made:
            made[kind, family] = make_tokenizer(tmp_path_factory.mktemp("tokenizers") / f"{family}-{kind}", kind, CONTROL[family])
        return made[kind, family]

    return folder


@lru_cache
def reference(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def ids_of_own_template(jinja: str, folder: Path, tokenizer, messages: list[dict[str, str]], **more) -> list[int]:
    """The row as the model's own template writes it: its text cut at control tokens, contents' own names of such kept as text.

    Names in contents are hidden from the cutting behind a stand-in. What transformers makes of text and of control tokens decides ids.
    """
    fast = reference(folder)
    names = re.compile("|".join(map(re.escape, sorted(tokenizer.specials(), key=len, reverse=True))))
    hidden: list[str] = []
    stand_in = lambda found: (hidden.append(found[0]), chr(0xE000 + len(hidden) - 1))[1]  # noqa: E731
    messages = [{**one, "content": names.sub(stand_in, one["content"])} for one in messages]
    text = fast.apply_chat_template(messages, chat_template=jinja, tokenize=False, date_string="26 Jul 2024", **more)
    ids = []
    for number, chunk in enumerate(re.split(f"({names.pattern})", text)):
        whole = re.sub("[\ue000-\ue0ff]", lambda found: hidden[ord(found[0]) - 0xE000], chunk)
        if number % 2:
            ids.append(tokenizer.special(chunk))
        elif whole:
            ids += text_ids(tokenizer, whole, begins=ids[-1:] in ([], [1]))
    if not hidden and hasattr(tokenizer, "added"):
        assert ids == fast(text, add_special_tokens=False)["input_ids"], "this is what transformers makes of its own text"
    return ids


def text_ids(tokenizer, text: str, begins: bool) -> list[int]:
    """Text behind a control token, by the libraries themselves."""
    if hasattr(tokenizer, "added"):
        model = tokenizers.Tokenizer.from_str(tokenizer.model.to_str())
        model.encode_special_tokens = True
        if isinstance(model.pre_tokenizer, pre_tokenizers.Metaspace):
            model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        return model.encode(text, add_special_tokens=False).ids
    # sentencepiece puts a space in front of every text. Llama's own code encodes what follows <s> so, Mistral's what follows
    # [INST] and [/INST], without the space that its chat template writes there.
    assert begins or text.startswith(" ")
    return [tokenizer.model.piece_to_id("▁")] if text == " " else tokenizer.model.encode(text if begins else text[1:])


@pytest.mark.parametrize(("own", "kind", "family", "template", "unasked"), OWN, ids=[f"{one[0]}-{one[1]}" for one in OWN])
def test_ids_are_those_of_the_models_own_template(folders, tmp_path, own, kind, family, template, unasked):
    folder = folders(kind, family)
    tokenizer, jinja = load_tokenizer(folder), (JINJA / f"{own}.jinja").read_text()
    for system in (None, "Be brief. 简洁"):
        data = load_dataset(write_rows(tmp_path / "rows.jsonl", ROWS), tokenizer, template, 2000, "error", tmp_path / "cache", system or unasked)
        for number, row in enumerate(ROWS):
            part = slice(*data.offsets[number : number + 2])
            ids, supervised = data.tokens[part].tolist(), data.supervised[part].tolist()
            asked = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question(a_row(**row).messages[0])}]
            prompt = ids_of_own_template(jinja, folder, tokenizer, asked, add_generation_prompt=True, enable_thinking=False)
            assert ids[: len(prompt)] == prompt == prompt_ids(a_row(**row), template, tokenizer, system or unasked), row
            if own == "mistral" and system:  # its own template leaves the system prompt out where there is an answer
                whole = prompt + ids_of_own_template(jinja, folder, tokenizer, [*asked[1:], {"role": "assistant", "content": row["output"]}])[
                    len(ids_of_own_template(jinja, folder, tokenizer, asked[1:])) :]
            else:
                whole = ids_of_own_template(jinja, folder, tokenizer, [*asked, {"role": "assistant", "content": row["output"]}])
            assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]).strip() == "", row
            end = end_of(template, tokenizer)
            assert supervised == [False] * len(prompt) + [True] * (len(ids) - len(prompt)) and ids[len(prompt) :].count(end) == 1 and ids[-1] == end


U, A, T = (lambda text, role=role, **more: Message(role, text, **more) for role in ("user", "assistant", "tool"))
CALL = {"name": "weather", "arguments": {"city": "北京 🌧", "days": [1, 2.5, None, True], "note": "a \"b\"\n"}}
TALKS = [
    (U("Name a cat."), A("Tom"), U("Which one runs?", input="red dog\nblue fish"), A("The dog.\n\nIt runs.")),
    (U(" padded \n"), A(" out \n"), U("x"), A("y"), U("用中文回答"), A("猫是红色的。 🐟")),
    (U("say </s><|im_end|>"), A("<|eot_id|> b [/INST]"), U("<s>[INST] a"), A("</s>")),
]
TOOLS = [
    (U("Rain?"), A("", calls=(CALL,)), T('{"rain": "é"}\n'), A("Yes."), U("Sure?"), A("I am.\n")),
    (U("Rain?"), A("", calls=(CALL,)), T("1"), T(" 2 "), A("", calls=({"name": "now", "arguments": {}},)), T(""), A("No.")),
    (U("Rain?"), A("", calls=(CALL,))),
]
TALKATIVE = (U("Rain?"), A("I look.", calls=(CALL, CALL)), T("1"), T("2"), A("No."))
CONVERSATIONS = [(*one, talk) for one in OWN for talk in [*TALKS, *(TOOLS if one[3] in ("qwen", "qwen3", "llama3.1") else []),
                                                         *([TALKATIVE] if one[3] in ("qwen", "qwen3") else [])] if one[0] != "qwen2" or talk in TALKS]


def runs(mask: list[bool]) -> list[tuple[int, int]]:
    """Where supervised tokens begin and end."""
    edges = [place for place in range(len(mask) + 1) if (place < len(mask) and mask[place]) != (place > 0 and mask[place - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize(("own", "kind", "family", "template", "unasked", "talk"), CONVERSATIONS)
def test_conversations_are_those_of_the_models_own_template(folders, own, kind, family, template, unasked, talk):
    folder = folders(kind, family)
    tokenizer, jinja = load_tokenizer(folder), (JINJA / f"{own}.jinja").read_text()
    theirs = lambda messages, **more: ids_of_own_template(jinja, folder, tokenizer, messages, **more)  # noqa: E731
    for asked_of_row, asked_of_recipe in ((None, unasked), (None, "Be brief. 简洁"), ("Be brief. 简洁", "unheard"), ("Be brief. 简洁", None)):
        row = Row(1, (Message("system", asked_of_row), *talk) if asked_of_row else talk)
        system = asked_of_row or (asked_of_recipe if asked_of_recipe != unasked else None)
        messages = [as_chat(message) for message in talk]
        given = [{"role": "system", "content": system}] if system else []
        prompt = prompt_ids(row, template, tokenizer, asked_of_recipe)
        assert prompt == theirs(given + messages[:-1], add_generation_prompt=True, enable_thinking=False)
        if own == "mistral":  # its own template leaves the system prompt out where there is an answer
            whole = prompt + theirs(messages)[len(theirs(messages[:-1])) :]
        else:
            whole = theirs(given + messages)
        assert prompt == prompt_ids(Row(1, row.messages[:-1]), template, tokenizer, asked_of_recipe), "with and without the answer"

        tokens = {supervise: tokenise([row], template, asked_of_recipe, supervise, tokenizer) for supervise in ("answers", "last", "all")}
        ids = tokens["answers"].ids.tolist()
        assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]).strip() == "" and ids[-1] == end_of(template, tokenizer)
        assert all(one.ids.tolist() == ids and one.lengths.tolist() == [len(ids)] and one.answers.tolist() == [len(prompt)] for one in tokens.values())
        answers = [message for message in talk if message.role == "assistant"]
        learnt = runs(tokens["answers"].supervised.tolist())
        assert len(learnt) == len(answers) and learnt[-1] == (len(prompt), len(ids)) and runs(tokens["last"].supervised.tolist()) == learnt[-1:]
        for (start, end), message in zip(learnt, answers, strict=True):
            assert ids[end - 1] == end_of(template, tokenizer) not in ids[start : end - 1], "an answer ends with its end, learnt, and nothing after it"
            assert tokenizer.decode(ids[start : end - 1]).strip() == message.content.strip() or message.calls
        around = [place for place, number in enumerate(ids) if number in tokenizer.prefix]
        assert runs(tokens["all"].supervised.tolist())[0][0] == max(1, len(tokenizer.prefix))
        assert tokens["all"].supervised.sum() == len(ids) - max(1, len(around)), "all but what begins a sequence, or else its first token"


ASKED = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("answer", "text"), [
    ("<think>\nred\n\ndog\n</think>\n\nblue fish", "<think>\nred\n\ndog\n</think>\n\nblue fish<|im_end|>"),
    ("<think>red dog</think>blue fish", "<think>\nred dog\n</think>\n\nblue fish<|im_end|>"),
    ("red dog\n</think>\n\nblue fish", "<think>\nred dog\n</think>\n\nblue fish<|im_end|>"),
    ("<think>\n\n</think>\n\nblue fish", "\n\n</think>\n\nblue fish<|im_end|>"), ("blue fish", "\n\n</think>\n\nblue fish<|im_end|>"),
])
def test_a_thought_stands_in_control_tokens_and_is_learnt(folders, answer, text):
    """An empty one is what Qwen 3 is asked with where it shall not think, so it is asked with it, and not learnt."""
    tokenizer, empty = load_tokenizer(folders("bpe", "qwen3")), text.startswith("\n")
    row = Row(1, (U("red"), A(answer)))
    asked, wanted = ASKED + "<think>\n\n</think>\n\n" * empty, text.removeprefix("\n\n</think>\n\n")
    tokens = tokenise([row], "qwen3", None, "answers", tokenizer)
    assert tokens.ids.tolist() == tokenizer.encode_rendered(asked) + tokenizer.encode_rendered(wanted) == tokenizer.encode_rendered(asked + wanted)
    (start, end), = runs(tokens.supervised.tolist())
    assert (start, end) == (len(tokenizer.encode_rendered(asked)), len(tokens.ids)) and tokens.answers.tolist() == [start]
    assert prompt_ids(row, "qwen3", tokenizer) == tokenizer.encode_rendered(asked)


def test_thoughts_are_kept_since_the_last_question(folders):
    """As Qwen 3's own template does: those of answers before are left out, those between calls of tools stay."""
    tokenizer, thought = load_tokenizer(folders("bpe", "qwen3")), "<think>\nred\n</think>\n\n"
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    talk = (U("a"), A(f"{thought}b"), U("c"), A(f"{thought}dog", calls=({"name": "now", "arguments": {}},)), T("1"), A("d"))
    expected = ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
                f"{thought}dog\n{call}<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>")
    assert tokenizer.show(tokenise([Row(1, talk)], "qwen3", None, "answers", tokenizer).ids.tolist()) == expected


@pytest.mark.parametrize("answer", ["b <think>red</think>", "<think>red</think>b<think>dog</think>", "<think>red"])
def test_a_thought_comes_once_and_first(answer):
    with pytest.raises(BadRow, match="row 3 has an answer with text before its thought, or a second thought"):
        TEMPLATES["qwen3"].check(Row(3, (U("a"), A(answer))))
    TEMPLATES["chatml"].check(Row(3, (U("a"), A(answer))))


def test_the_check_of_templates_is_the_same_whether_rows_were_tokenised_before_or_not(folders, tmp_path):
    """Tokenising has the tokenizer take thoughts' tokens for control tokens, which its file calls plain; a warm cache spares it."""
    shutil.copytree(folders("bpe", "qwen3"), folder := tmp_path / "qwen3")
    stored = json.loads((folder / "tokenizer.json").read_text())
    for token in stored["added_tokens"]:
        token["special"] = "think" not in token["content"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    jinja, row = (JINJA / "qwen3.jinja").read_text(), Row(1, (U("red"), A("<think>\ndog\n</think>\n\nb")))
    cold, warm = load_tokenizer(folder), load_tokenizer(folder)
    tokenise([row], "qwen3", None, "answers", cold)
    assert [difference(jinja, folder, Data(template="qwen3"), tokenizer, row) for tokenizer in (cold, warm)] == [None, None]


@pytest.mark.parametrize("template", ["alpaca", "plain"])
@pytest.mark.parametrize("kind", ["bpe", "metaspace", "sentencepiece"])
def test_blocks_of_text_repeat_and_each_answer_ends(folders, template, kind):
    tokenizer = load_tokenizer(folders(kind, "llama2"))
    talk = (U("red", input="dog"), A("cat"), U("blue"), A(" fish\n"))
    tokens = tokenise([Row(1, talk)], template, None, "answers", tokenizer)
    first, second = (tokenise([Row(1, talk[at : at + 2])], template, None, "answers", tokenizer) for at in (0, 2))
    begins = len(tokenizer.prefix)
    assert tokens.ids.tolist() == [*first.ids, *second.ids[begins:]] and tokens.supervised.tolist() == [*first.supervised, *second.supervised[begins:]]
    assert first.ids[-1] == second.ids[-1] == tokenizer.eos and first.supervised[-1] and tokens.answers[0] == len(first.ids) + second.answers[0] - begins


def test_what_a_message_says_of_itself_goes_before(folders):
    tokenizer = load_tokenizer(folders("bpe", "chatml"))
    show = lambda row, supervise: [tokenizer.show(found.ids[start:end].tolist()) for found in [tokenise([row], "chatml", None, supervise, tokenizer)]  # noqa: E731
                                   for start, end in runs(found.supervised.tolist())]
    for mine, answers, last in ((None, ["b<|im_end|>", "d<|im_end|>"], ["d<|im_end|>"]), (False, ["d<|im_end|>"], ["d<|im_end|>"]),
                                (True, ["b<|im_end|>", "d<|im_end|>"], ["b<|im_end|>", "d<|im_end|>"])):
        row = Row(1, (U("a"), A("b", train=mine), U("c"), A("d")))
        assert show(row, "answers") == answers and show(row, "last") == last
    asked = Row(1, (U("a", train=True), A("b"), U("c"), A("d", train=False)))
    assert show(asked, "answers") == ["user\na", "b<|im_end|>"] and show(asked, "last") == ["user\na"]
    whole = "".join(show(Row(1, (U("a"), A("b"), U("c"), A("d"))), "all"))
    assert whole == "user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    assert show(Row(1, (U("a", train=False), A("b", train=False))), "all") == ["<|im_end|>\n<|im_start|>assistant\n"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["bpe", "metaspace", "sentencepiece"])
def test_plain_text_is_itself_and_its_end_whatever_the_template(folders, template, kind):
    tokenizer = load_tokenizer(folders(kind, "llama2"))
    for text in ("red dog </s>", " 红\n", "a"):
        tokens = tokenise([Row(1, (Message("text", text),))], template, None, "last", tokenizer)
        ids = [*tokenizer.prefix, *tokenizer.encode(text), tokenizer.eos]
        assert tokens.ids.tolist() == ids and tokens.supervised.tolist() == [False] + [True] * (len(ids) - 1) and tokens.answers.tolist() == [-1]
        assert prompt_ids(Row(1, (Message("text", text),)), template, tokenizer) == ids[:-1]


def test_a_batch_is_its_rows_end_to_end(folders):
    tokenizer = load_tokenizer(folders("bpe", "qwen3"))
    rows = [Row(number, (Message("system", "s"), *talk) if number % 2 else talk) for number, talk in enumerate([*TALKS, *TOOLS, TALKATIVE] * 3)]
    rows += [Row(99, (Message("text", "a b"),)), Row(100, (U("a"), A("", train=False)))]
    for supervise in ("answers", "last", "all"):
        batch, apart = tokenise(rows, "qwen3", "brief", supervise, tokenizer), [tokenise([row], "qwen3", "brief", supervise, tokenizer) for row in rows]
        for name, kind in (("ids", "int32"), ("supervised", "bool"), ("lengths", "int32"), ("answers", "int32")):
            assert getattr(batch, name).dtype == kind and getattr(batch, name).tolist() == [one for part in apart for one in getattr(part, name).tolist()]
    assert all(len(one) == 0 for one in vars(tokenise([], "qwen3", None, "all", tokenizer)).values())


def test_rows_that_a_template_has_no_place_for_are_refused_by_name(folders):
    tokenizer = load_tokenizer(folders("bpe", "llama3"))
    for template in TEMPLATES:
        for talk in TOOLS:
            if template in ("chatml", "qwen", "qwen3", "llama3.1"):
                TEMPLATES[template].check(Row(7, talk))
                continue
            with pytest.raises(BadRow, match=f"row 7 uses tools; the template {template} has no form for them, these have: chatml, llama3.1, qwen, qwen3"):
                TEMPLATES[template].check(Row(7, talk))
            with pytest.raises(BadRow):
                tokenise([Row(7, talk)], template, None, "answers", tokenizer)
    for template in ("alpaca", "plain"):
        with pytest.raises(BadRow, match=f"row 7 has a system message; the template {template} has no place for one"):
            tokenise([Row(7, (Message("system", "s"), U("a"), A("b")))], template, None, "answers", tokenizer)
    with pytest.raises(BadRow, match="row 7 has an answer with text and 2 calls of tools; the template llama3.1 writes one call and nothing besides"):
        tokenise([Row(7, TALKATIVE)], "llama3.1", None, "answers", tokenizer)


@pytest.mark.parametrize(("own", "kind", "family", "template", "unasked"), OWN, ids=[f"{one[0]}-{one[1]}" for one in OWN])
def test_the_check_knows_when_they_agree_and_what_would(folders, own, kind, family, template, unasked):
    folder, jinja = folders(kind, family), (JINJA / f"{own}.jinja").read_text()
    tokenizer = load_tokenizer(folder)
    for row in (a_row(**ROWS[1]), a_row(**ROWS[-1]), Row(1, TALKS[0] * 9)):
        for system in (unasked, "Be brief."):
            assert difference(jinja, folder, Data(template=template, system=system), tokenizer, row) is None
        found = difference(jinja, folder, Data(template="alpaca"), tokenizer, row)
        advice = f"data.template={template}" + (f' with data.system="{unasked}"' if unasked else "") + " would be the same"
        if own == "qwen2":
            advice = advice.replace("=qwen", "=chatml")  # with a system prompt they are one
        assert found.endswith(f"; {advice}") and "\n" not in found
    for talk in [*TOOLS, TALKATIVE] if template in ("qwen", "qwen3", "llama3.1") and own != "qwen2" else []:
        if template != "llama3.1" or talk is not TALKATIVE:
            assert difference(jinja, folder, Data(template=template), tokenizer, Row(1, (Message("system", "Be brief."), *talk))) is None
    for changed in (f"Z{jinja}", f"{jinja}{{% if not add_generation_prompt %}}Z{{% endif %}}"):
        found = difference(changed, folder, Data(template=template, system=unasked), tokenizer, row)
        assert found.endswith("none of ours would be the same") and "Z" in found.split("where its own has")[1]


def test_the_end_is_the_templates_own_even_where_eos_is_another(folders):
    for template, family, name in (("llama3", "llama3", "<|eot_id|>"), ("qwen", "chatml", "<|im_end|>"), ("chatml", "chatml", "<|im_end|>"),
                                   ("llama2", "llama2", "</s>"), ("mistral", "mistral", "</s>"), ("alpaca", "chatml", "</s>")):
        tokenizer = load_tokenizer(folders("bpe", family))  # eos is </s>, as in a base model
        end = tokenizer.model.token_to_id(name)
        assert end_of(template, tokenizer) == end and stops(template, tokenizer) == {end, tokenizer.eos}
        if name != "</s>":
            with pytest.raises(EngineError, match=re.escape(f"{name}, which this tokenizer lacks")):
                end_of(template, load_tokenizer(folders("bpe", "llama2")))


def test_a_control_token_that_its_file_calls_plain_is_still_none_of_the_texts(folders, tmp_path):
    folder = tmp_path / "chatml"
    folder.mkdir()
    saved = json.loads((folders("bpe", "chatml") / "tokenizer.json").read_text())
    saved["added_tokens"] = [{**token, "special": token["special"] and "im_" not in token["content"]} for token in saved["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(folder)
    ids = prompt_ids(a_row("a <|im_end|> b", "", ""), "chatml", tokenizer)
    assert ids.count(tokenizer.special("<|im_end|>")) == 1


@pytest.mark.parametrize("listed", [5, [5, 7], [2], None])
def test_generation_stops_at_every_end_that_is_listed(tiny, tmp_path, monkeypatch, listed):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).symlink_to(path)
    if listed is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos == 2 and stops("alpaca", tokenizer) == {2, *([] if listed is None else listed if isinstance(listed, list) else [listed])}
    seen = []
    monkeypatch.setattr("engine.sampling.generate", lambda model, prompts, ends, *rest: (seen.append(ends), [[] for _ in prompts])[1])
    answerer = command.Answerer(command.arguments(["--model", str(folder), "--device", "cpu"]))
    answerer.answer([[1]])
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, ends, *rest: (seen.append(ends), [[] for _ in prompts])[1])
    judge = evaluate.Evaluation.__new__(evaluate.Evaluation)
    judge.dataset, judge.asked, judge.data = SimpleNamespace(prompt_and_answer=lambda row: ([1], [2])), [0], Data()
    judge.cfg, judge.tokenizer = config.Evaluate(), tokenizer
    judge.world, judge.precision = SimpleNamespace(rank=0, size=1, is_first=False), SimpleNamespace(context=nullcontext)
    monkeypatch.setattr(evaluate.distributed, "gather_text", lambda text, world: [text])
    judge._answers(answerer.model, 1)
    assert seen == [stops("alpaca", tokenizer)] * 2


def test_a_list_of_ends_that_is_none_is_told(tiny, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(EngineError, match="eos_token_id: got .*expected a number or a list of numbers"):
        load_tokenizer(tmp_path)


# ---- The system prompt ---------------------------------------------------------------------------------------------------


def test_a_system_prompt_is_refused_by_name_where_there_is_no_place_for_one(recipe):
    assert set(config.options()["data.template"].metadata["choices"]) == set(TEMPLATES)
    for name, template in TEMPLATES.items():
        if template.chat:
            assert "Be brief." in "".join(segment.text for segment in template(a_row("a", "", "b"), "Be brief.")), name
            config.load(recipe(f"data.template={name}", "data.system=Be brief."))
            continue
        with pytest.raises(EngineError, match=f"data.system is given, but data.template={name} has no place") as caught:
            config.load(recipe(f"data.template={name}", "data.system=Be brief."))
        assert caught.value.exit_code == USER
        with pytest.raises(EngineError, match=f"{name} has no place for a system prompt"):
            template(a_row("a", "", "b"), "Be brief.")


def test_the_cache_knows_the_system_prompt(tiny, tmp_path):
    path, tokenizer = write_rows(tmp_path / "rows.jsonl", ragged_rows(3)), load_tokenizer(tiny)
    made = [load_dataset(path, tokenizer, "llama2", 256, "error", tmp_path / "cache", system) for system in (None, "", "Be brief.", "Be brief.")]
    assert len({one.digest for one in made}) == 3 and made[2].lengths.sum() > made[1].lengths.sum() > made[0].lengths.sum()


def test_training_and_held_out_rows_are_asked_with_it(tiny, tmp_path):
    path, tokenizer = str(write_rows(tmp_path / "rows.jsonl", ragged_rows(1))), load_tokenizer(tiny)
    cfg = Data(path, path, template="llama2", system="Be brief.", cache=str(tmp_path / "cache"))
    for data in (Rows(**vars(dataset.load(cfg, of, tokenizer))) for of in ("train", "validation")):
        prompt = prompt_ids(a_row(**ragged_rows(1)[0]), "llama2", tokenizer, "Be brief.")
        assert data.tokens[: len(prompt)].tolist() == prompt


def test_an_export_is_asked_as_training_did_and_lists_its_ends(recipe, trained, tiny, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").write_text('{"eos_token_id": 9, "temperature": 0.6}')
    trained(1, recipe(f"model.path={folder}", "data.template=llama2", "data.system='Be brief: 红'", "train.max_steps=1", "data.max_length=120"))
    export = tmp_path / "runs/run/export/model"
    note = json.loads((export / "engine.json").read_text())
    assert note["template"] == "llama2" and note["system"] == "Be brief: 红"
    assert json.loads((export / "generation_config.json").read_text()) == {"eos_token_id": [2, 9], "temperature": 0.6}
    row, tokenizer = a_row(**ragged_rows(1)[0]), load_tokenizer(tiny)

    def prompt(*more: str) -> list[int]:
        return command.Answerer(command.arguments(["--model", str(export), "--device", "cpu", *more])).prompt(row)

    assert prompt() == prompt("--template", "llama2") == prompt_ids(row, "llama2", tokenizer, "Be brief: 红") != prompt_ids(row, "llama2", tokenizer)
    assert prompt("--system", "") == prompt_ids(row, "llama2", tokenizer, "")
    assert prompt("--template", "alpaca") == prompt_ids(row, "alpaca", tokenizer)
    with pytest.raises(EngineError, match="alpaca has no place for a system prompt"):
        prompt("--template", "alpaca", "--system", "x")


# ---- The model's own template at the start of a run ----------------------------------------------------------------------


@pytest.fixture
def chatty(tiny, tmp_path):
    """`chatty(template)`: the tiny model with a chat template of its own."""

    def make(template) -> Path:
        folder = tmp_path / "chatty"
        folder.mkdir()
        for path in tiny.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        return folder

    return make


@pytest.mark.parametrize(("template", "overrides", "says"), [
    ((JINJA / "llama2.jinja").read_text(), [], "data.template=llama2 would be the same"),
    ((JINJA / "llama2.jinja").read_text(), ["data.template=llama2"], None),
    ([{"name": "tools", "template": "x"}, {"name": "default", "template": (JINJA / "llama2.jinja").read_text()}], ["data.template=llama2"], None),
    (None, [], None),
    ("{{ raise_exception('only\nfor tools') }}", [], "cannot be rendered: only for tools"),
    ("{% for a in range(10**9) %}{% endfor %}", [], "not safe to render"),
])
def test_a_run_says_once_what_differs_and_goes_on(recipe, ranks, chatty, tmp_path, template, overrides, says):
    started = ranks(2, recipe(f"model.path={chatty(template)}", "train.max_steps=1", "data.max_length=128", "export.kinds=[]", *overrides))
    assert started.wait() == [0, 0], started.log.read_text()
    lines = [line for line in started.log.read_text().splitlines() if "chat template" in line or line.startswith("WARNING")]
    assert len(lines) == (says is not None) and all(line.startswith("WARNING ") and says in line for line in lines)


def test_where_the_template_lies(tiny, chatty, tmp_path):
    assert own_template(tiny) is None
    folder = chatty([{"name": "tools", "template": "x"}])
    assert own_template(folder) is None
    (folder / "chat_template.jinja").write_text("from the file 红")
    assert own_template(folder) == "from the file 红"


HOSTILE = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}", "a long text": "{{ 'a' * 10**10 }}", "a padded text": "{{ 'a'.ljust(10**10) }}",
    "a hidden text": "{% set x = 'a' * (600000000 * messages | length) %}", "a formatted text": "{{ '%10000000000d' % 1 }}",
    "a large number": "{{ 10**(10**10) }}", "much text": "{% for i in range(90000) %}aaaa{% endfor %}",
    "a growing list": "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "depth": "{{" + "(" * 20000 + "1" + ")" * 20000 + "}}",
    "attributes": "{{ ''.__class__.__mro__ }}", "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "a change of messages": "{{ messages.append(1) }}", "size": "x" * (2 << 20),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_refused(what):
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        render(HOSTILE[what], [{"messages": [{"role": "user", "content": "a"}]}])
    assert caught.value.exit_code == SECURITY and "\n" not in caught.value.text and time.monotonic() - began < chat_template.WALL_S + 2
    assert "not done within" not in caught.value.text, "the limit of CPU time comes first"


@pytest.mark.parametrize("trick", ["{{ ''|attr('__class__') }}", "{{ lipsum.__globals__ }}", "{{ '{0.__class__}'.format('a') }}", "{{ self.__init__ }}",
                                   "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}", "{{ open('/etc/passwd') }}"])
def test_other_tricks_show_nothing(trick):
    try:
        assert render(trick, [{"messages": []}])[0].strip() == ""
    except EngineError as error:
        assert error.exit_code in (SECURITY, USER)


def test_a_template_that_waits_is_ended(monkeypatch):
    monkeypatch.setattr(chat_template, "WALL_S", 0.3)
    began = time.monotonic()
    with pytest.raises(EngineError, match="not done within") as caught:
        render(HOSTILE["an endless loop"], [{"messages": []}])
    assert caught.value.exit_code == SECURITY and time.monotonic() - began < 2


def test_what_templates_of_transformers_may_use_and_no_clock():
    template = ("{% for m in messages %}\n    {% if loop.index == 3 %}{% break %}{% endif %}\n{{ m | tojson }}"
                "{% generation %}[{{ m.role }}]{% endgeneration %}\n{% endfor %}{{ strftime_now is defined }}{{ bos_token }}")
    messages = [{"role": role, "content": "<é>"} for role in ("user", "assistant", "user")]
    (text,) = render(template, [{"messages": messages}], {"bos_token": "<s>"})
    assert text == '{"role": "user", "content": "<é>"}[user]{"role": "assistant", "content": "<é>"}[assistant]False<s>'
    with pytest.raises(EngineError, match="'strftime_now' is undefined"):
        render("{{ strftime_now('%Y') }}", [{"messages": []}])


def test_the_check_is_quick(folders):
    row = Row(1, (U("红 猫 " * 50_000), A("b " * 50_000)) * 500)
    folder, jinja = folders("bpe", "chatml"), (JINJA / "smollm2.jinja").read_text()
    tokenizer = load_tokenizer(folder)

    def seconds() -> float:
        began = time.perf_counter()
        assert difference(jinja, folder, Data(template="alpaca"), tokenizer, row)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.3


def test_the_sandbox_is_a_program_of_its_own():
    """It runs without the engine, and without the packages' own start-up code."""
    request = {"path": [path for path in sys.path if path and Path(path) != ROOT], "template": "{{ a }}", "names": {"a": "红"}, "conversations": [{}]}
    done = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "engine/data/sandbox.py")], input=json.dumps(request), capture_output=True, text=True)
    assert json.loads(done.stdout) == {"texts": ["红"]} and done.stderr == ""
