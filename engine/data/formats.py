"""A record -> a row of messages. A format is one function; what it rejects, it rejects with the reason. Knows no files."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from engine.data.strict import BadRow, parse, shown

__all__ = ["FORMATS", "BadRow", "Format", "Message", "Row"]


@dataclass(frozen=True)
class Message:
    """What one says in a conversation.

    role   system, user, assistant, tool (what a tool gave back), or text: no conversation, plain text
    input  alpaca's second part of a question; templates for chats write it on a line of its own
    train  the row's own word on whether this is learnt; None: as data.supervise says
    calls  an assistant's calls of tools, after its content: {"name": str, "arguments": dict}
    """

    role: str
    content: str
    input: str = ""
    train: bool | None = None
    calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Row:
    """One record. `line` counts from 1; `task` groups rows in the table of exact matches.

    `messages`: perhaps a system message, then user and assistant in turn, with tool messages between two of the assistant's;
    the last is the assistant's, unless rows need no answer. Or one message of text.
    """

    line: int
    messages: tuple[Message, ...]
    task: str = ""


@dataclass(frozen=True)
class Format:
    """`needs`: fields that a record of this format cannot be without, by which it is known. `answer`: the field of the answer, where
    that is one. `knows`: fields that are read besides; `parts`: those of each message."""

    read: Callable[[dict[str, Any], bool], Iterable[Message]]
    needs: tuple[str, ...]
    answer: tuple[str, ...] = ()
    knows: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()

    def __call__(self, record: dict[str, Any], line: int = 0, answered: bool = True) -> Row:
        """The row of a record.

        Args:
            answered: it must end with an answer, as in training.

        Raises:
            BadRow: it has none, or is no record of this format.
        """
        for key in self.needs:
            if key not in record and (other := _other(record, self)):
                raise BadRow(f'"{key}": got no such field; the record looks like format {other}; a source has records of one format')
        messages = tuple(self.read(record, answered))
        _check(messages, answered, lambda number: (self.needs[0], number) if self.parts else (*self.needs, *self.answer)[number : number + 1])
        return Row(line, messages, _text(record, "task", "") if "task" in record else "")

    def ignored(self, record: dict[str, Any]) -> set[str]:
        """Names of the fields that nobody reads; a message's as messages.weight."""
        found = record.keys() - self.knows - {*self.needs, *self.answer, "task"}
        if self.parts:
            found |= {f"{self.needs[0]}.{key}" for message in record[self.needs[0]] for key in message if key not in self.parts}
        return found


def alpaca(record: dict[str, Any], answered: bool) -> Iterable[Message]:
    """{"instruction", "input", "output"}; `input` may be absent or blank."""
    yield Message("user", _text(record, "instruction"), _text(record, "input", ""))
    if answered or _text(record, "output", ""):
        yield Message("assistant", _text(record, "output"))


def completion(record: dict[str, Any], answered: bool) -> Iterable[Message]:
    """{"prompt", "completion"}"""
    yield Message("user", _text(record, "prompt"))
    if answered or _text(record, "completion", ""):
        yield Message("assistant", _text(record, "completion"))


def sharegpt(record: dict[str, Any], answered: bool) -> Iterable[Message]:
    """{"conversations": [{"from": human, gpt, system or tool, "value"}, …]}"""
    _no_tools(record)
    for at, turn in _turns(record, "conversations"):
        yield Message(_role(turn, "from", SPEAKERS, at), _text(turn, "value", at=at))


def chat(record: dict[str, Any], answered: bool) -> Iterable[Message]:
    """{"messages": [{"role", "content"}, …]}, an assistant's perhaps with "tool_calls" as OpenAI writes them, and with "train"."""
    _no_tools(record)
    for at, turn in _turns(record, "messages"):
        role, train = _role(turn, "role", ROLES, at), turn.get("train")
        if train is not None and not isinstance(train, bool):
            raise _bad((*at, "train"), f"got {shown(train)}, expected true or false")
        calls = _calls(turn.get("tool_calls"), (*at, "tool_calls"))
        if calls and role != "assistant":
            raise _bad((*at, "tool_calls"), f"got a call of the {role}'s; only the assistant calls tools")
        content = "" if calls and turn.get("content") is None else _text(turn, "content", at=at)
        yield Message(role, content, train=train, calls=calls)


def text(record: dict[str, Any], answered: bool) -> Iterable[Message]:
    """{"text"}: learnt as it stands, whatever the template."""
    yield Message("text", _text(record, "text"))


ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
            "tool": "tool", "function": "tool", "observation": "tool"}
FORMATS: dict[str, Format] = {
    "alpaca": Format(alpaca, ("instruction",), ("output",), frozenset({"input"})),
    "completion": Format(completion, ("prompt",), ("completion",)),
    "sharegpt": Format(sharegpt, ("conversations",), parts=frozenset({"from", "value"})),
    "messages": Format(chat, ("messages",), parts=frozenset({"role", "content", "train", "tool_calls", "tool_call_id", "name"})),
    "text": Format(text, ("text",)),
}


def _other(record: dict[str, Any], own: Format) -> str | None:
    return next((name for name, other in FORMATS.items() if other is not own and all(key in record for key in other.needs)), None)


def _bad(path: tuple[str | int, ...], what: str) -> BadRow:
    """A fault of the value at `path`, which the text names as "messages" 2: "content"; messages count from 1 there."""
    names = "".join(f'"{part}": ' if isinstance(part, str) else f"{part + 1}: " for part in path)
    return BadRow(re.sub(r'": (\d+: )', r'" \1', names, count=1) + what, path=path)


def _text(record: dict[str, Any], key: str, default: str | None = None, at: tuple[str | int, ...] = ()) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise _bad((*at, key), f"got {shown(value) if key in record else 'no such field'}, expected text")
    return value


def _turns(record: dict[str, Any], key: str) -> Iterable[tuple[tuple[str | int, ...], dict[str, Any]]]:
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _bad((key,), f"got {shown(turns) if key in record else 'no such field'}, expected a list of objects")
    return (((key, number), turn) for number, turn in enumerate(turns))


def _role(turn: dict[str, Any], key: str, roles: dict[str, str], at: tuple[str | int, ...]) -> str:
    if (role := _text(turn, key, at=at)) not in roles:
        raise _bad((*at, key), f"got {shown(role)}, expected one of {', '.join(roles)}")
    return roles[role]


def _no_tools(record: dict[str, Any]) -> None:
    if record.get("tools"):
        raise _bad(("tools",), "got definitions of tools, which no template writes; put them into the system message")


def _calls(calls: Any, at: tuple[str | int, ...]) -> tuple[dict[str, Any], ...]:
    """[{"type": "function", "function": {"name", "arguments"}}, …], or without the shell; arguments are an object, or text of one."""
    if calls is None:
        return ()
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _bad(at, f"got {shown(calls)}, expected a list of objects")
    found = []
    for call in calls:
        call = call.get("function", call)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"].strip():
            raise _bad(at, f"got {shown(call)}, expected a function with its name and arguments")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = parse(arguments, "an object") if arguments.strip() else {}
            except BadRow as error:
                raise _bad(at, f"the arguments of {shown(call['name'])}, character {error.column}: {error.reason}") from None
        if not isinstance(arguments, dict):
            raise _bad(at, f"the arguments of {shown(call['name'])}: got {shown(arguments)}, expected an object")
        try:
            json.dumps(arguments, allow_nan=False)
        except (TypeError, ValueError) as error:  # what columns of other files than JSON may hold
            raise _bad(at, f"the arguments of {shown(call['name'])} cannot be written as JSON: {error}") from None
        found.append({"name": call["name"], "arguments": arguments})
    return tuple(found)


def _check(messages: tuple[Message, ...], answered: bool, path: Callable[[int], tuple[str | int, ...]]) -> None:
    """Raises BadRow where turns are out of order, or where there is nothing to learn. `path`: where the n-th message is, from 0."""
    if messages and messages[0].role == "text":
        if not messages[0].content.strip():
            raise _bad(("text",), "got only white space; there is nothing to learn")
        return
    before = None
    for number, message in enumerate(messages, 1):
        if before not in FOLLOWS[message.role]:
            raise BadRow(f"message {number} of {len(messages)} has the role {message.role}, {_after(before)}; expected a conversation: "
                         "perhaps a system message, then user and assistant in turn, tools' results between two of the assistant's", path=path(number - 1))
        if message.role == "assistant" and not (message.content.strip() or message.calls or message.train is False):
            raise BadRow(f"the answer (message {number} of {len(messages)}) is empty or white space; there is nothing to learn",
                         path=path(number - 1))
        before = message.role
    if before not in (("assistant",) if answered else ("assistant", "user", "tool")):
        raise BadRow(f"the conversation ends {_after(before)}; expected {'an answer of the assistant' if answered else 'a question'}",
                     path=path(max(len(messages) - 1, 0)))


def _after(role: str | None) -> str:
    return f"after the role {role}" if role else "with nothing before"


FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
