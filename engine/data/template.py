"""A row -> the segments of text a model reads. Prompt and answer are tokenised apart, so training and generation meet the
same tokens at the boundary between them by construction.

The templates of chat models write what the model's own Jinja template writes for one question and its answer, up to the
token that ends the answer; `chat_template.py` compares the two.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine.data.formats import Row
from engine.errors import EngineError


@dataclass(frozen=True)
class Segment:
    """`supervised`: the model learns to write it. `special`: the name of a control token, not text."""

    text: str
    supervised: bool = False
    special: bool = False


@dataclass(frozen=True)
class Template:
    """How a row is written, all but the token that ends the answer.

    `end`: the control token that does; None: the tokenizer's end-of-sequence. `chat`: the segments are one text with a place
    for a system prompt, as chat models know it; else each is a text by itself.
    """

    write: Callable[..., list[Segment]]
    end: str | None = None
    chat: bool = True

    def __call__(self, row: Row, system: str | None = None) -> list[Segment]:
        if self.chat:
            return self.write(row, system)
        if system is not None:
            raise EngineError("TEMPLATE-SYSTEM", f"the template {self.write.__name__} has no place for a system prompt; leave it out or take a chat template")
        return self.write(row)


def alpaca(row: Row) -> list[Segment]:
    """### Instruction / ### Input / ### Response; the input's block is left out when the input is blank."""
    middle = f"### Input:\n{row.input}\n\n" if row.input.strip() else ""
    return [Segment(f"### Instruction:\n{row.instruction}\n\n{middle}### Response:\n"), Segment(row.output, supervised=True)]


def plain(row: Row) -> list[Segment]:
    """The instruction, a line break, the input if there is one, a line break, the answer."""
    return [Segment(f"{question(row)}\n"), Segment(row.output, supervised=True)]


def chatml(row: Row, system: str | None) -> list[Segment]:
    """<|im_start|>user … <|im_end|> <|im_start|>assistant …"""
    start, end = Segment("<|im_start|>", special=True), Segment("<|im_end|>", special=True)
    turns = [part for role, text in _asked(row, system) for part in (start, Segment(f"{role}\n{text}"), end, Segment("\n"))]
    return [*turns, start, Segment("assistant\n"), Segment(row.output, supervised=True)]


def qwen(row: Row, system: str | None) -> list[Segment]:
    """ChatML with the system prompt that Qwen 2.5 writes where it is given none."""
    return chatml(row, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." if system is None else system)


def qwen3(row: Row, system: str | None) -> list[Segment]:
    """ChatML whose answers begin with an empty thought, as Qwen 3 writes where it is told not to think."""
    *prompt, _ = chatml(row, system)
    thought = [Segment("<think>", special=True), Segment("\n\n"), Segment("</think>", special=True), Segment("\n\n")]
    return [*prompt, *thought, Segment(row.output.lstrip("\n"), supervised=True)]


def gemma(row: Row, system: str | None) -> list[Segment]:
    """<start_of_turn>user … <end_of_turn> <start_of_turn>model …; the system prompt begins the user's turn."""
    start, end = Segment("<start_of_turn>", special=True), Segment("<end_of_turn>", special=True)
    asked = question(row).strip() if system is None else f"{system}\n\n{question(row).strip()}"
    return [start, Segment(f"user\n{asked}"), end, Segment("\n"), start, Segment("model\n"), Segment(row.output.strip(), supervised=True)]


def llama2(row: Row, system: str | None) -> list[Segment]:
    """[INST] … [/INST], which are text and no control tokens; the system prompt stands between <<SYS>> and <</SYS>>."""
    asked = question(row) if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n{question(row)}"
    return [Segment(f"[INST] {asked.strip()} [/INST]"), Segment(f" {row.output.strip()} ", supervised=True)]


def llama3(row: Row, system: str | None) -> list[Segment]:
    """<|start_header_id|>user<|end_header_id|> … <|eot_id|>"""
    turns = [part for role, text in _asked(row, system)
             for part in (*_header(role), Segment(f"\n\n{text.strip()}"), Segment("<|eot_id|>", special=True))]
    return [*turns, *_header("assistant"), Segment("\n\n"), Segment(row.output.strip(), supervised=True)]


def llama31(row: Row, system: str | None) -> list[Segment]:
    """Llama 3's with the two dates that 3.1 to 3.3 write first: the day is the one their own template takes without a clock."""
    system = f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{(system or '').strip()}"
    dates = [*_header("system"), Segment(f"\n\n{system}"), Segment("<|eot_id|>", special=True)]
    return [*dates, *llama3(row, None)]


def mistral(row: Row, system: str | None) -> list[Segment]:
    """Mistral v0.3's [INST] … [/INST], which are control tokens; the system prompt begins the user's turn."""
    asked = question(row) if system is None else f"{system}\n\n{question(row)}"
    return [Segment("[INST]", special=True), Segment(f" {asked}"), Segment("[/INST]", special=True), Segment(f" {row.output.strip()}", supervised=True)]


def question(row: Row) -> str:
    """The user's turn: the instruction and, on a line of its own, the input if there is one."""
    return f"{row.instruction}\n{row.input}" if row.input.strip() else row.instruction


def _asked(row: Row, system: str | None) -> list[tuple[str, str]]:
    return [*([("system", system)] if system is not None else []), ("user", question(row))]


def _header(role: str) -> list[Segment]:
    return [Segment("<|start_header_id|>", special=True), Segment(role), Segment("<|end_header_id|>", special=True)]


TEMPLATES = {"alpaca": Template(alpaca, chat=False), "plain": Template(plain, chat=False), "chatml": Template(chatml, "<|im_end|>"),
             "llama2": Template(llama2), "llama3": Template(llama3, "<|eot_id|>"), "llama3.1": Template(llama31, "<|eot_id|>"),
             "mistral": Template(mistral), "qwen": Template(qwen, "<|im_end|>"),
             "qwen3": Template(qwen3, "<|im_end|>"), "gemma": Template(gemma, "<end_of_turn>")}
