"""A row -> the segments of text a model reads. Each segment is tokenised by itself, so training and generation meet the
same tokens at the boundary between prompt and answer by construction."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.data.formats import Row


@dataclass(frozen=True)
class Segment:
    """`supervised`: the model learns to write it. `special`: the name of a control token, not text."""

    text: str
    supervised: bool = False
    special: bool = False


def alpaca(row: Row) -> list[Segment]:
    """### Instruction / ### Input / ### Response; the input's block is left out when the input is blank."""
    middle = f"### Input:\n{row.input}\n\n" if row.input.strip() else ""
    return [Segment(f"### Instruction:\n{row.instruction}\n\n{middle}### Response:\n"), Segment(row.output, supervised=True)]


def chatml(row: Row) -> list[Segment]:
    """<|im_start|>user … <|im_end|> <|im_start|>assistant …; the answer's end is the end-of-sequence that every template gets."""
    question = f"{row.instruction}\n{row.input}" if row.input.strip() else row.instruction
    return [Segment("<|im_start|>", special=True), Segment(f"user\n{question}"), Segment("<|im_end|>", special=True), Segment("\n"),
            Segment("<|im_start|>", special=True), Segment("assistant\n"), Segment(row.output, supervised=True)]


def plain(row: Row) -> list[Segment]:
    """The instruction, a line break, the input if there is one, a line break, the answer."""
    question = f"{row.instruction}\n{row.input}\n" if row.input.strip() else f"{row.instruction}\n"
    return [Segment(question), Segment(row.output, supervised=True)]


TEMPLATES: dict[str, Callable[[Row], list[Segment]]] = {"alpaca": alpaca, "chatml": chatml, "plain": plain}
