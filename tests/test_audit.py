"""What a recipe will train on: each planted defect is named with its row, and what is shown is what is trained."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import TINY, ragged_rows, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import decoders, models, pre_tokenizers, processors

from engine import audit, train
from engine.config import Data
from engine.data import checks, dataset, texts, view
from engine.data.reading import read_rows
from engine.data.template import TEMPLATES
from engine.data.tokenizer import load_tokenizer
from engine.errors import USER, EngineError


@pytest.fixture(scope="session")
def unmarked(tmp_path_factory) -> Path:
    """A folder whose tokenizer finds its <s> in text, as it is not marked as special, and has one merge over "]" and " !"."""
    folder = tmp_path_factory.mktemp("models") / "unmarked"
    folder.mkdir()
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "]Ġ!", "Ġ!"]
    model = tokenizers.Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [("Ġ", "!"), ("]", "Ġ!")]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    model.add_special_tokens(["</s>"])
    model.add_tokens([tokenizers.AddedToken("<s>", special=False)])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<s>"}))
    (folder / "config.json").write_text(json.dumps({**TINY, "vocab_size": len(pieces), "max_position_embeddings": 512}))
    return folder


def alpaca(instruction: str, output: str, **more) -> dict:
    return {"instruction": instruction, "output": output, **more}


def said(*turns: tuple, **more) -> dict:
    return {"messages": [{"role": role, "content": content, **({"train": train[0]} if train else {})} for role, content, *train in turns]}


CLEAN = [alpaca(f"Say {name}.", name) for name in ("red", "blue", "红色", "🙂", "<b>one</b>", "two")]
PLANTED = [
    CLEAN[0],
    CLEAN[1],
    CLEAN[0],  # 3
    alpaca("Say blue.", "green"),
    alpaca("Say </s>.", "an end"),
    alpaca("Say <s>.", "a beginning"),
    alpaca(3, "x"),  # 7
    alpaca("Say it often.", "dog " * 40),
    alpaca("Say cat.", "cat", wieght=2),
    alpaca("Shout.", "! now"),  # 10
    alpaca("Read this: " + "cat " * 40, "fish"),
    alpaca("Say blue.", "green"),  # 12
]
CHATS = [said(("user", "Say pear."), ("assistant", "pear")), said(("system", "Be kind.", True), ("user", "Hello."), ("assistant", "Hi.", False))]
WORDS = [{"text": "runs and eats"}, {"text": "<s>red cat"}]
HELD_OUT = [CLEAN[1], alpaca("Say red.", "RED"), CLEAN[5]]


@pytest.fixture
def arguments(unmarked, tmp_path):
    """Arguments of the audit and of training: `planted` rows, or the clean ones."""

    def made(planted: bool, *overrides: str, model: Path = unmarked) -> list[str]:
        files = {"rows": PLANTED, "chats": CHATS, "words": WORDS, "held_out": HELD_OUT} if planted else {"rows": CLEAN, "held_out": ragged_rows(3)}
        for name, rows in files.items():
            write_rows(tmp_path / f"{name}.jsonl", rows)
        formats = {"rows": "alpaca", "chats": "messages", "words": "text"}
        train = [{"path": str(tmp_path / f"{name}.jsonl"), "format": formats[name]} for name in files if name in formats]
        (tmp_path / "recipe.yaml").write_text("{}")
        options = {"run.folder": tmp_path / "runs", "run.name": "run", "data.cache": tmp_path / "cache", "model.path": model, "model.init": "random",
                   "data.train": json.dumps(train), "data.validation": tmp_path / "held_out.jsonl", "data.max_length": 120, "data.template": "llama2",
                   "evaluate.samples": 0, "train.device": "cpu", "export.kinds": "[]"}
        options |= dict(override.split("=", 1) for override in overrides)
        return [str(tmp_path / "recipe.yaml"), *(f"{key}={value}" for key, value in options.items())]

    return made


@pytest.fixture
def audited(arguments, capsys):
    """The audit's console, its errors, and its findings: {kind: (severity, [row, …])}."""

    def run(planted: bool, *overrides: str, extra: tuple = (), **options):
        error = None
        try:
            audit.main([*arguments(planted, *overrides, **options), *extra])
        except EngineError as caught:
            error = caught
        out = capsys.readouterr().out
        found: dict[str, tuple[str, list[str]]] = {}
        for line in out.splitlines():
            if headline := re.match(r"  (error|warning|note) +([A-Z-]+): ", line):
                found.setdefault(kind := headline[2], (headline[1], []))
            elif found and (row := re.match(r" {13}\S*/(\S+?:\d+)", line)):
                found[kind][1].append(row[1])
        return out, error, found

    return run


def test_every_planted_defect_is_named_with_its_row(audited):
    out, error, found = audited(True)
    assert found == {
        "UNREADABLE": ("error", ["rows.jsonl:7"]), "TOO-LONG": ("error", ["rows.jsonl:8", "rows.jsonl:11"]), "NO-TARGET": ("error", ["chats.jsonl:2"]),
        "DOUBLE-BOS": ("error", ["words.jsonl:2"]), "CONTROL-TOKEN": ("error", ["rows.jsonl:6"]),
        "DUPLICATE": ("warning", ["rows.jsonl:3", "rows.jsonl:12"]), "OVERLAP": ("warning", ["held_out.jsonl:1"]),
        "OTHER-ANSWER": ("note", ["rows.jsonl:4"]), "SAME-QUESTION": ("note", ["held_out.jsonl:2"]), "CONTROL-NAME": ("note", ["rows.jsonl:5"]),
        "UNREAD-FIELD": ("note", []), "BOUNDARY": ("note", ["rows.jsonl:10"])}
    assert "rows.jsonl:1 again" in out and "is also" in out and "wieght (1)" in out
    assert error.exit_code == USER
    lines = str(error).splitlines()
    assert [re.match(r"ERROR E-AUDIT-(\S+) \S*/(\S+?:\d+)", line).groups() for line in lines] == [
        (kind, row) for kind, (severity, rows) in found.items() if severity == "error" for row in rows]


def test_a_clean_set_has_nothing_to_remark_and_is_trained(audited, arguments, tmp_path):
    out, error, found = audited(False)
    assert error is None and not found and "training will take this data: nothing to remark" in out
    assert (tmp_path / "runs/run/audit/audit.html").is_file() and not (tmp_path / "runs/run/checkpoints").exists()
    train.main(arguments(False, "train.max_steps=1"))
    assert (tmp_path / "runs/run/finished.json").is_file() and not (tmp_path / "runs/run-2").exists(), "the page lies with the run"


def test_what_the_recipe_asks_for_is_no_error(audited):
    _, error, found = audited(True, "data.on_bad_row=skip", "data.too_long=truncate")
    assert {kind for kind, (severity, _) in found.items() if severity == "error"} == {"NO-TARGET", "DOUBLE-BOS", "CONTROL-TOKEN"}
    assert found["SKIPPED"] == ("note", ["rows.jsonl:7"]) and found["END-LOST"] == ("warning", ["rows.jsonl:8"])
    assert found["NO-TARGET-LEFT"] == ("warning", ["rows.jsonl:11"])
    assert audited(True, "data.too_long=drop")[2]["DROPPED"] == ("note", ["rows.jsonl:8", "rows.jsonl:11"])
    assert "END-LOST" not in audited(True, "data.too_long=split")[2]


def test_strict_makes_errors_of_warnings(audited, tmp_path):
    write = {"data.train": tmp_path / "rows.jsonl", "data.validation": tmp_path / "rows.jsonl"}
    overrides = [f"{key}={value}" for key, value in write.items()]
    assert audited(False, *overrides)[1] is None
    error = audited(False, *overrides, extra=("--strict",))[1]
    assert error.exit_code == USER and error.name == "AUDIT-OVERLAP" and "rows.jsonl:1: is also" in error.text


def test_ids_without_an_embedding_and_padding_that_ends_answers(audited, unmarked, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    (small / "tokenizer.json").write_bytes((unmarked / "tokenizer.json").read_bytes())
    (small / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": {"content": "</s>"}}))
    config = json.loads((unmarked / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    _, error, found = audited(True, "data.on_bad_row=skip", model=small)
    assert found["VOCABULARY"] == ("error", ["rows.jsonl:10"]) and "E-AUDIT-VOCABULARY" in str(error) and found["PAD-IS-END"][0] == "note"
    assert audited(True, "data.max_length=600")[2]["POSITIONS"] == ("error", [])


@pytest.mark.parametrize(("keep", "kind", "row"), [(PLANTED[5:6], "CONTROL-TOKEN", 3), (CHATS[1:], "NO-TARGET", 3), (WORDS[1:], "DOUBLE-BOS", 3),
                                                   (PLANTED[6:7], "ROW", 3), (PLANTED[7:8], "LENGTH", 3)])
def test_training_stops_at_a_hard_fault_with_its_row(arguments, tmp_path, keep, kind, row):
    good, form = {"instruction": (CLEAN, "alpaca"), "messages": (CHATS[:1] * 2, "messages"), "text": (WORDS[:1] * 2, "text")}[next(iter(keep[0]))]
    path = write_rows(tmp_path / "bad.jsonl", [*good[:2], *keep])
    with pytest.raises(EngineError) as caught:
        train.main(arguments(False, f"data.train={path}", f"data.format={form}", "data.validation=null"))
    assert caught.value.exit_code == USER and caught.value.name == f"DATA-{kind}" and caught.value.text.startswith((f"{path}:{row}: ", f"{path}:{row}:17: "))
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_training_warns_in_a_line_and_shows_its_rows(arguments, tmp_path, capsys):
    write_rows(tmp_path / "twice.jsonl", [*CLEAN, CLEAN[0], alpaca("Say red.", "a note is not told")])
    train.main(arguments(False, f"data.train={tmp_path / 'twice.jsonl'}", f"data.validation={tmp_path / 'rows.jsonl'}", "train.max_steps=1"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 2 and "twice.jsonl:7: is" in warnings[0] and "rows.jsonl:1: is also" in warnings[1]
    events = EventAccumulator(str(tmp_path / "runs/run/tensorboard")).Reload()
    shown = events.Tensors("rows/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "<strong><code>红</code></strong>" in shown and " <code>红</code>" in shown


# ---- The view ------------------------------------------------------------------------------------------------------------


@given(words=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=2, max_size=8), max_length=st.integers(8, 60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["unmarked", "tiny"])
def test_the_view_has_all_tokens_and_those_learnt(request, tmp_path, kind, words, max_length):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    rows = [alpaca(f"a{one}", f"b{two}") for one, two in zip(words, words[1:], strict=False)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = Data(train=str(path), template="plain", max_length=max_length, too_long="split", cache=str(tmp_path / "cache"))
    found = dataset.load(cfg, "train", tokenizer)
    for document, one in enumerate(view.views(found, tokenizer, len(found))):
        ids, _ = found.read(document)
        assert [number for span in one.spans for number in span.ids] == ids.tolist()
        assert sum(len(span.ids) for span in one.spans if span.supervised) == found.targets[document]
        whole = found.fates[found.row[document]] == dataset.WHOLE
        if whole and "\ufffd" not in "".join(words):
            assert "\ufffd" not in "".join(span.text for span in one.spans), "a character of several tokens is shown as one"
        assert "\x1b" not in view.as_text(one, colour=False), "a row's text must not steer the terminal"
        assert view.as_text(one, colour=True).count("\033[0;1;32m") >= sum(span.supervised for span in one.spans)


def test_characters_are_whole_and_what_cannot_be_seen_is(unmarked):
    tokenizer = load_tokenizer(unmarked)
    ids = [0, *tokenizer.encode("红 a"), *tokenizer.encode("🙂\n")[:-1], *tokenizer.encode("红")[:2], 1]
    shown = view.spans(ids, [False] + [True] * (len(ids) - 1), tokenizer)
    assert [(span.text, len(span.ids), span.control) for span in shown] == [
        ("<s>", 1, True), ("红", 3, False), (" ", 1, False), ("a", 1, False), ("🙂", 4, False), ("\ufffd", 1, False), ("\ufffd", 1, False), ("</s>", 1, True)]
    assert view.visible("a b\n\t\x1b\u202e") == [("a", False), ("·", True), ("b", False), ("↵\n→␛⟨202E⟩", True)]
    text = view.as_text(view.View("row", [view.Span("a", (1,), False, False), view.Span("b\n", (2,), True, False), view.Span("c", (3,), True, False)]), False)
    assert text == "row\n  │a«b↵\n  │c»"


class Page(HTMLParser):
    """Fails at a tag that is not closed in its turn; keeps the text, and that of what is learnt."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.text, self.learnt = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "img", "iframe") and not any(name.startswith("on") or name in ("src", "href") for name, _ in attributes)
        if tag != "meta":
            self.stack.append((tag, dict(attributes).get("class") or ""))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)
        if any(tag == "span" and "s" in kind.split() for tag, kind in self.stack) and any(tag == "figure" for tag, _ in self.stack):
            if not any(tag == "sup" for tag, _ in self.stack):
                self.learnt.append(data)


def test_the_page_is_one_well_formed_file_that_escapes_rows(audited, tmp_path):
    nasty = alpaca("Say <script>alert(1)</script> & \"'.", "<img src=x onerror=alert(1)>")
    path = write_rows(tmp_path / "nasty<b>.jsonl", [nasty, alpaca(3, "</main>")])
    out, error, _ = audited(False, f"data.train={path}", extra=("--html", str(tmp_path / "page.html"), "--show", "1"))
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert written == (tmp_path / "runs/run/audit/audit.html").read_text(encoding="utf-8") and str(tmp_path / "page.html") in out
    assert "http" not in written and "//" not in written.replace(str(tmp_path), "") and "url(" not in written and "prefers-color-scheme: dark" in written
    page = Page(written)
    assert "".join(page.learnt) == "·<img·src=x·onerror=alert(1)>·</s>" and "nasty<b>.jsonl:2" in "".join(page.text) and error.name == "AUDIT-UNREADABLE"
    events = EventAccumulator(str(tmp_path / "runs/run/audit/tensorboard")).Reload()
    assert events.Tags()["tensors"] == ["rows/text_summary"]


# ---- Figures -------------------------------------------------------------------------------------------------------------


def test_figures_add_up(audited, tmp_path):
    out, _, _ = audited(True, "data.on_bad_row=skip", "data.too_long=split", "data.validation=null")
    table = [re.split(r" {2,}", line.strip()) for line in out.split("rows by source and fate\n")[1].split("\n\n")[0].splitlines()]
    records = dict(zip(table[0], zip(*table[1:], strict=True), strict=True))
    assert records["source"] == ("train: rows", "train: chats", "train: words") and records["records"] == ("12", "2", "2")
    assert records["unreadable"] == ("1", "0", "0") and records["kept"] == ("11", "2", "2") and records["split"] == ("2", "0", "0")
    lines = out.split("documents by length\n")[1].split("\n  median")[0].splitlines()[1:]
    counted = [int(re.fullmatch(r"  [\d–,]+ +[█▏▎▍▌▋▊▉]* +(\d+) +[\d.]+ % +[\d.]+ %", line)[1]) for line in lines]
    assert sum(counted) == sum(map(int, records["documents"])) == 16


def test_the_share_of_ends_that_are_learnt(audited, tmp_path):
    rows = [said(("user", "Say a."), ("assistant", "a", True), ("user", "Say b."), ("assistant", "b", wanted)) for wanted in (True, False, False, True)]
    path = write_rows(tmp_path / "ends.jsonl", [*rows, said(("user", "Say long."), ("assistant", "dog " * 40))])
    out, _, _ = audited(False, f"data.train={path}", "data.format=messages", "data.validation=null", "data.too_long=truncate")
    assert "the end of the last answer in 2 of 5 rows (40.0 %)" in out


def test_shares_of_scripts(unmarked, tmp_path):
    rows = [alpaca("红色的", "猫 12"), alpaca("Привет", "мир!"), alpaca("かな カナ", "漢"), alpaca("red", "नमस्ते"), alpaca("12", "!")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = Data(train=str(path), cache=str(tmp_path / "cache"), template="plain", max_length=200)
    tokenizer = load_tokenizer(unmarked)
    found = texts.read(dataset.load(cfg, "train", tokenizer), cfg, tokenizer)
    characters = {name: int(count) for name, count in zip(texts.KINDS, found.characters, strict=True) if count}
    assert characters == {"Han": 5, "white space": 2, "digits": 4, "Cyrillic": 9, "punctuation and symbols": 2, "Kana": 4, "Latin": 3, "Devanagari": 6}
    assert {name: int(count) for name, count in zip(texts.KINDS, found.mainly, strict=True) if count} == {
        "Han": 1, "Cyrillic": 1, "Kana": 1, "Devanagari": 1, "other": 1} and found.rows == 5 and found.merged == 0


@pytest.mark.parametrize(("kind", "template"), [("tiny", "llama2"), ("unmarked", "llama2"), ("tiny", "plain"), ("unmarked", "plain")])
def test_merges_are_those_of_question_and_answer_as_one_text(request, tmp_path, kind, template):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    path = write_rows(tmp_path / "rows.jsonl", [*ragged_rows(30), *(alpaca(f"Shout {mark}.", f"{mark} now") for mark in "!?!a!!!!")])
    cfg = Data(train=str(path), cache=str(tmp_path / "cache"), template=template, max_length=500)
    rows = dataset.load(cfg, "train", tokenizer)
    merged = []
    for row, record in enumerate(read_rows(path)):
        whole = "".join(segment.text for segment in TEMPLATES[template](record) if not segment.special)
        apart = rows.read(row)[0][len(tokenizer.prefix) : -1].tolist()
        merged += [f"{path}:{record.line}"] * (tokenizer.encode(whole) != apart)
    found = texts.read(rows, cfg, tokenizer)
    assert found.merged == len(merged) and [name.rpartition(": '")[0].partition(": ")[0] for name in found.named] == merged[:5]
    assert len(merged) == 6 * (kind == "unmarked" and template == "llama2")


def test_a_duplicate_is_told_by_the_first_of_its_kind(unmarked, tmp_path):
    draw = np.random.default_rng(0)
    names = [str(number) for number in draw.integers(0, 40, 300)]
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(f"Say {name}.", name) for name in names])
    cfg = Data(train=str(path), cache=str(tmp_path / "cache"), template="plain", max_length=200)
    found = next(one for one in checks.doubts(dataset.load(cfg, "train", load_tokenizer(unmarked)), None) if one.kind == "DUPLICATE")
    again = [(line, names.index(name) + 1) for line, name in enumerate(names, 1) if names.index(name) + 1 < line]
    assert found.count == len(again) and found.of == 300 and found.severity == "warning"
    assert [tuple(map(int, re.findall(r"jsonl:(\d+)", row))) for row in found.rows] == again[: len(found.rows)]
