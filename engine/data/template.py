"""A row -> the segments of text a model reads. What is asked and what is answered are tokenised apart, so training and generation
meet the same tokens at the boundary between them by construction.

The templates of chat models write what the model's own Jinja template writes for a conversation, up to the token that ends its
last answer; `chat_template.py` compares the two.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from engine.data.formats import BadRow, Message, Row
from engine.errors import EngineError

# What a special segment may name besides a control token: the tokenizer's own end of a sequence, and what it begins one with.
EOS, BOS = "\0eos", "\0bos"


class Segment(NamedTuple):
    """`special`: the name of a control token, EOS or BOS, not text. `turn`: index in row.messages of the message whose text this is,
    the token that ends an answer included; None: what stands around it."""

    text: str
    special: bool = False
    turn: int | None = None


Turns = list[tuple[int | None, Message]]  # messages and their index in the row: None for a system prompt that is not the row's


@dataclass(frozen=True)
class Template:
    """How a row is written, from behind the tokenizer's prefix to the token that ends the last answer.

    `end`: the control token that ends answers; EOS: the tokenizer's own. `chat`: the segments are one text with a place for a
    system prompt, as chat models know it; else each is a text by itself. `tools`: calls of tools and their results have a form.
    `reads`: what in the text of an answer becomes a control token.
    """

    name: str
    write: Callable[[Turns], list[Segment]]
    end: str = EOS
    chat: bool = True
    tools: bool = False
    reads: frozenset[str] = frozenset()

    def __call__(self, row: Row, system: str | None = None) -> list[Segment]:
        """The segments of a row that ends with an answer.

        Args:
            system: a system prompt for rows that have none of their own.

        Raises:
            BadRow: the template has no place for one of the row's messages.
        """
        if row.messages[0].role == "text":
            return [Segment(row.messages[0].content, turn=0), Segment(EOS, special=True, turn=0)]
        if system is not None and not self.chat:
            raise EngineError("TEMPLATE-SYSTEM", f"the template {self.name} has no place for a system prompt; leave it out or take a chat template")
        self.check(row)
        turns: Turns = list(enumerate(row.messages))
        if system is not None and row.messages[0].role != "system":
            turns = [(None, Message("system", system)), *turns]
        return self.write(turns)

    def check(self, row: Row) -> None:
        """Raises BadRow if the template has no place for one of the row's messages."""
        for message in row.messages:
            if message.role == "system" and not self.chat:
                raise BadRow(f"row {row.line} has a system message; the template {self.name} has no place for one: take a chat template")
            if not self.tools and (message.role == "tool" or message.calls):
                forms = ", ".join(name for name, template in TEMPLATES.items() if template.tools)
                raise BadRow(f"row {row.line} uses tools; the template {self.name} has no form for them, these have: {forms}")
            if self.write is qwen3 and message.role == "assistant" and re.search("</?think>", THOUGHT.sub(r"\1", message.content, count=1)):
                raise BadRow(f"row {row.line} has an answer with text before its thought, or a second thought; the template {self.name} writes "
                             "<think> once, at its beginning")
            if self.write is llama31 and message.calls and (len(message.calls) > 1 or message.content.strip()):
                raise BadRow(f"row {row.line} has an answer with {'text and ' * bool(message.content.strip())}{len(message.calls)} calls of tools; "
                             f"the template {self.name} writes one call and nothing besides")


@lru_cache
def control_tokens(name: str) -> frozenset[str]:
    """Names of all control tokens that a template may write."""
    template, call = TEMPLATES[name], ({"name": "f", "arguments": {}},)
    tools = [Message("assistant", "", calls=call), Message("tool", "b")] if template.tools else []
    talk = [*[Message("system", "a")] * template.chat, Message("user", "a"), Message("assistant", "b"), Message("user", "a"), *tools, Message("assistant", "b")]
    return frozenset(text for text, special, _ in template.write(list(enumerate(talk))) if special) - {EOS, BOS}


def alpaca(turns: Turns) -> list[Segment]:
    """### Instruction / ### Input / ### Response; the input's block is left out when the input is blank."""
    segments = []
    for turn, message in turns:
        if message.role == "assistant":
            segments += [Segment(message.content, turn=turn), Segment(EOS, True, turn)]
        else:
            middle = f"### Input:\n{message.input}\n\n" if message.input.strip() else ""
            segments.append(Segment(f"### Instruction:\n{message.content}\n\n{middle}### Response:\n", turn=turn))
    return segments


def plain(turns: Turns) -> list[Segment]:
    """The question, a line break, the answer."""
    segments = []
    for turn, message in turns:
        if message.role == "assistant":
            segments += [Segment(message.content, turn=turn), Segment(EOS, True, turn)]
        else:
            segments.append(Segment(f"{question(message)}\n", turn=turn))
    return segments


def chatml(turns: Turns) -> list[Segment]:
    """<|im_start|>user … <|im_end|> <|im_start|>assistant …; tools as in Hermes, whose form Qwen 2.5 and Qwen 3 share."""
    return _chatml(_hermes(turns))


def qwen(turns: Turns) -> list[Segment]:
    """ChatML with the system prompt that Qwen 2.5 writes where it is given none."""
    default = Message("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
    return chatml(turns if turns[0][1].role == "system" else [(None, default), *turns])


THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\n*", re.DOTALL)  # the beginning may have been part of the question, as with DeepSeek-R1


def qwen3(turns: Turns) -> list[Segment]:
    """ChatML in which an answer to the last question begins with its thought, in control tokens and learnt as the answer is; the last one, where it has
    none, with an empty one, which is no part of the answer, as Qwen 3 writes where it is told not to think. Thoughts of answers before are left out."""
    asked = max((place for place, (_, message) in enumerate(turns) if message.role == "user"), default=-1)
    begins, end, said = {}, Segment("</think>", True), []
    for place, (turn, message) in enumerate(turns):
        if message.role == "assistant":
            found, is_last = THOUGHT.match(message.content), place == len(turns) - 1
            thought, content = (found[1].strip("\n"), message.content[found.end() :]) if found else ("", message.content.lstrip("\n" * is_last))
            if place > asked and thought:
                begins[turn] = [Segment("<think>", True, turn), Segment(f"\n{thought}\n", turn=turn), end._replace(turn=turn), Segment("\n\n", turn=turn)]
            elif is_last:
                begins[turn] = [Segment("<think>", True), Segment("\n\n"), end, Segment("\n\n")]
            message = replace(message, content=content)
        said.append((turn, message))
    return _chatml(_hermes(said), begins)


def gemma(turns: Turns) -> list[Segment]:
    """<start_of_turn>user … <end_of_turn> <start_of_turn>model …; the system prompt begins the first question."""
    start, end = Segment("<start_of_turn>", True), Segment("<end_of_turn>", True)
    segments, (system, said) = [], _apart(turns)
    for place, (turn, role, text) in enumerate(said):
        if role == "assistant":
            segments += [start, Segment("model\n"), Segment(text.strip(), turn=turn), end._replace(turn=turn), BREAK]
        else:
            given = f"{system}\n\n" if place == 0 and system is not None else ""
            segments += [start, Segment(f"user\n{given}{text.strip()}", turn=turn), end, BREAK]
    return segments[:-1]


def llama2(turns: Turns) -> list[Segment]:
    """[INST] … [/INST], which are text and no control tokens; the system prompt stands between <<SYS>> and <</SYS>>.

    Every question begins as a sequence does.
    """
    segments, (system, said) = [], _apart(turns)
    for place, (turn, role, text) in enumerate(said):
        if role == "assistant":
            segments += [Segment(f" {text.strip()} ", turn=turn), Segment(EOS, True, turn)]
        else:
            asked = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}" if place == 0 and system is not None else text
            segments += [*([Segment(BOS, True)] if place else []), Segment(f"[INST] {asked.strip()} [/INST]", turn=turn)]
    return segments


def llama3(turns: Turns) -> list[Segment]:
    """<|start_header_id|>user<|end_header_id|> … <|eot_id|>"""
    return [part for turn, message in turns for part in _headed(turn, message.role, question(message).strip())]


def llama31(turns: Turns) -> list[Segment]:
    """Llama 3's with the two dates that 3.1 to 3.3 write first: the day is the one their own template takes without a clock.

    A call of a tool is an answer of JSON; results are ipython's, as JSON.
    """
    turn, system = (turns[0][0], turns[0][1].content.strip()) if turns[0][1].role == "system" else (None, "")
    segments = _headed(turn, "system", f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{system}")
    for turn, message in turns:
        if message.role == "tool":
            segments += _headed(turn, "ipython", _json(message.content))
        elif message.calls:
            call = message.calls[0]
            segments += _headed(turn, "assistant", f'{{"name": "{call["name"]}", "parameters": {_json(call["arguments"])}}}')
        elif message.role != "system":
            segments += _headed(turn, message.role, question(message).strip())
    return segments


def mistral(turns: Turns) -> list[Segment]:
    """Mistral v0.3's [INST] … [/INST], which are control tokens; the system prompt begins the last question."""
    segments, (system, said) = [], _apart(turns)
    last = max(place for place, (_, role, _) in enumerate(said) if role == "user")
    for place, (turn, role, text) in enumerate(said):
        if role == "assistant":
            segments += [Segment(f" {text.strip()}", turn=turn), Segment(EOS, True, turn)]
        else:
            given = f"{system}\n\n" if place == last and system is not None else ""
            segments += [Segment("[INST]", True), Segment(f" {given}{text}", turn=turn), Segment("[/INST]", True)]
    return segments


def question(message: Message) -> str:
    """A message's text: its content and, on a line of its own, the input if there is one."""
    return f"{message.content}\n{message.input}" if message.input.strip() else message.content


BREAK = Segment("\n")


def _apart(turns: Turns) -> tuple[str | None, list[tuple[int | None, str, str]]]:
    """The system prompt, and of every other message index, role and text."""
    system = turns[0][1].content if turns[0][1].role == "system" else None
    return system, [(turn, message.role, question(message)) for turn, message in turns if message.role != "system"]


def _chatml(turns: Turns, begins: dict[int | None, list[Segment]] | None = None) -> list[Segment]:
    start, end, segments = Segment("<|im_start|>", True), Segment("<|im_end|>", True), []
    for turn, message in turns:
        if message.role == "assistant":
            segments += [start, Segment("assistant\n"), *(begins or {}).get(turn, ()), Segment(message.content, turn=turn), end._replace(turn=turn), BREAK]
        else:
            segments += [start, Segment(f"{message.role}\n{question(message)}", turn=turn), end, BREAK]
    return segments[:-1]


def _hermes(turns: Turns) -> Turns:
    """Calls of tools as text of the answers, results of tools as the user's; those that follow each other as one."""
    written: Turns = []
    before = None
    for turn, message in turns:
        if message.calls:
            calls = [f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {_json(call["arguments"])}}}\n</tool_call>' for call in message.calls]
            written.append((turn, replace(message, content="\n".join([message.content, *calls] if message.content else calls))))
        elif message.role != "tool":
            written.append((turn, message))
        else:
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if before == "tool":
                turn, first = written.pop()
                result = f"{first.content}\n{result}"
            written.append((turn, Message("user", result)))
        before = message.role
    return written


def _headed(turn: int | None, role: str, text: str) -> list[Segment]:
    header = [Segment("<|start_header_id|>", True), Segment(role), Segment("<|end_header_id|>", True)]
    if role == "assistant":
        return [*header, Segment("\n\n"), Segment(text, turn=turn), Segment("<|eot_id|>", True, turn)]
    return [*header, Segment(f"\n\n{text}", turn=turn), Segment("<|eot_id|>", True)]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


TEMPLATES = {template.name: template for template in (
    Template("alpaca", alpaca, chat=False), Template("plain", plain, chat=False), Template("chatml", chatml, "<|im_end|>", tools=True),
    Template("llama2", llama2), Template("llama3", llama3, "<|eot_id|>"), Template("llama3.1", llama31, "<|eot_id|>", tools=True),
    Template("mistral", mistral), Template("qwen", qwen, "<|im_end|>", tools=True),
    Template("qwen3", qwen3, "<|im_end|>", tools=True, reads=frozenset({"<think>", "</think>"})),
    Template("gemma", gemma, "<end_of_turn>"))}
