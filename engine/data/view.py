"""Documents as a model meets them, token by token: what is learnt is told apart from what is only read.

A *span* is what is shown as one: a token, or the few among which the bytes of a character are spread.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.dataset import SPLIT, TRUNCATED, Dataset
from engine.data.tokenizer import Tokenizer

BYTES = 4  # of a character at most, so tokens of a span
LONGEST = 2048  # tokens of a document on pages
MARKS = {" ": "·", "\t": "→", "\n": "↵\n", "\r": "␍"}


@dataclass(frozen=True)
class Span:
    text: str
    ids: tuple[int, ...]
    supervised: bool
    control: bool


@dataclass(frozen=True)
class View:
    """A document's spans, and what there is to say of it."""

    title: str
    spans: list[Span]


def views(dataset: Dataset, tokenizer: Tokenizer, count: int, longest: int | None = None) -> Iterator[View]:
    """The first `count` documents of each source, of each at most the first `longest` tokens."""
    for number in range(len(dataset.sources)):
        for document in np.flatnonzero(dataset.source == number)[:count].tolist():
            row = int(dataset.row[document])
            fate = {TRUNCATED: ", cut off", SPLIT: f", from token {dataset.start[document]} of {dataset.rows['length'][row]}"}.get(int(dataset.fates[row]), "")
            ids, supervised = dataset.read(document)
            shown = f"; the first {longest} are shown" if longest and len(ids) > longest else ""
            title = f"{dataset.where(row)}: {len(ids)} tokens, {dataset.targets[document]} learnt{fate}{shown}"
            yield View(title, spans(ids[:longest], supervised[:longest], tokenizer))


def spans(ids: Sequence[int], supervised: Sequence[bool], tokenizer: Tokenizer) -> list[Span]:
    """What stands for each token. A document's first is never predicted, so it is not learnt whatever its mask says."""
    ids, learnt = [int(number) for number in ids], [False, *map(bool, supervised[1:])]
    control = {tokenizer.eos, *tokenizer.prefix, *map(tokenizer.special, tokenizer.specials())}
    anchor = tokenizer.encode("a")  # text before text: at a beginning a space would be left out
    before = len(tokenizer.show(anchor))
    found, at = [], 0
    while at < len(ids):
        if ids[at] in control:
            found.append(Span(tokenizer.name(ids[at]), (ids[at],), learnt[at], True))
            at += 1
            continue
        alone = tokenizer.show([*anchor, ids[at]])[before:]
        end, text = at + 1, alone
        while text.endswith("\ufffd") and end < min(at + BYTES, len(ids)) and ids[end] not in control and learnt[end] == learnt[at]:
            end += 1
            text = tokenizer.show([*anchor, *ids[at:end]])[before:]
        if text.endswith("\ufffd"):  # bytes that are no character, or the replacement character itself
            end, text = at + 1, alone
        found.append(Span(text, tuple(ids[at:end]), learnt[at], False))
        at = end
    return found


def visible(text: str) -> list[tuple[str, bool]]:
    """A text in parts, and which stand for what cannot be seen: spaces, ends of lines, control characters and those that turn text around."""
    parts: list[tuple[str, bool]] = []
    for letter in text:
        mark = MARKS.get(letter) or (chr(0x2400 + ord(letter)) if letter < " " else "" if letter.isprintable() else f"⟨{ord(letter):04X}⟩")
        if parts and parts[-1][1] == bool(mark):
            parts[-1] = (parts[-1][0] + (mark or letter), bool(mark))
        else:
            parts.append((mark or letter, bool(mark)))
    return parts


def as_text(view: View, colour: bool) -> str:
    """For a terminal; without colour what is learnt stands between « and »."""
    parts, learning = [], False
    for span in view.spans:
        shown = visible(span.text)
        if colour:
            style = "\033[0;1;32m" if span.supervised else "\033[0;35m" if span.control else "\033[0m"
            parts.append("\033[0;2m│" + style + "".join(f"\033[2m{part}{style}" if faint else part for part, faint in shown))
        else:
            parts.append("│" if span.supervised == learning else "«" if span.supervised else "»")
            parts += [part for part, _ in shown]
        learning = span.supervised
    parts.append("\033[0m" if colour else "»" if learning else "│")
    return f"{view.title}\n" + "\n".join(f"  {line}" for line in "".join(parts).split("\n"))


def as_html(view: View) -> str:
    """A figure; classes s, c and f: supervised, control token, faint."""
    parts = []
    for number, span in enumerate(view.spans):
        text = "".join(f"<i>{html.escape(part)}</i>" if faint else html.escape(part) for part, faint in visible(span.text))
        kind = " ".join(name for name, holds in (("s", span.supervised), ("c", span.control), ("o", number % 2)) if holds)
        several = f"<sup>{len(span.ids)}</sup>" if len(span.ids) > 1 else ""
        parts.append(f'<span class="{kind}" title="{" ".join(map(str, span.ids))}">{text}{several}</span>')
    return f"<figure><figcaption>{html.escape(view.title)}</figcaption><p>{''.join(parts)}</p></figure>"


def as_markdown(dataset: Dataset, tokenizer: Tokenizer, count: int) -> str:
    """For TensorBoard's page of texts, which knows no colours: what is learnt is bold."""
    parts = ["Tokens stand apart; **bold** ones are learnt."]
    for view in views(dataset, tokenizer, count, LONGEST):
        tokens = []
        for span in view.spans:
            shown = html.escape("".join(part for part, _ in visible(span.text))).replace("\n", "<br>")
            text = f"<code>{shown.removesuffix('<br>')}</code>"
            tokens.append((f"<strong>{text}</strong>" if span.supervised else text) + "<br>" * shown.endswith("<br>"))
        parts.append(f"<p><em>{html.escape(view.title)}</em><br>{' '.join(tokens).replace('<br> ', '<br>')}</p>")
    return "\n\n".join(parts)
