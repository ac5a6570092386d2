"""Every format reads what it should, and says of what it rejects which field, which message, and what was expected."""

import json

import pytest
from conftest import write_rows

from engine.data.formats import FORMATS, BadRow, Message, Row
from engine.data.reading import read_rows
from engine.errors import EngineError

SYSTEM, USER, ASSISTANT, TOOL = (lambda text, role=role, **more: Message(role, text, **more) for role in ("system", "user", "assistant", "tool"))
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 1, "b": [2.5, "红"]}'}}
READ = {"name": "add", "arguments": {"a": 1, "b": [2.5, "红"]}}


def said(*roles: str, key: str = "messages", names: tuple[str, str] = ("role", "content"), **more) -> dict:
    """A conversation: r and the first letter of each role decide what is said."""
    return {key: [{names[0]: role, names[1]: f"{role} {number}", **more} for number, role in enumerate(roles)]}


@pytest.mark.parametrize(("name", "record", "messages"), [
    ("alpaca", {"instruction": "a", "input": "b", "output": "c"}, [USER("a", input="b"), ASSISTANT("c")]),
    ("alpaca", {"instruction": "", "output": " c\n"}, [USER(""), ASSISTANT(" c\n")]),
    ("completion", {"prompt": "a", "completion": "b"}, [USER("a"), ASSISTANT("b")]),
    ("text", {"text": " a\n"}, [Message("text", " a\n")]),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                    {"from": "user", "value": "c"}, {"from": "model", "value": "d"}]},
     [SYSTEM("s"), USER("a"), ASSISTANT("b"), USER("c"), ASSISTANT("d")]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "assistant", "value": "b"}, {"from": "tool", "value": "1"},
                                    {"from": "function", "value": "2"}, {"from": "observation", "value": "3"}, {"from": "gpt", "value": "c"}]},
     [USER("a"), ASSISTANT("b"), TOOL("1"), TOOL("2"), TOOL("3"), ASSISTANT("c")]),
    ("messages", {"messages": [{"role": "user", "content": "a", "train": False}, {"role": "assistant", "content": " ", "train": False},
                               {"role": "user", "content": ""}, {"role": "assistant", "content": "b", "train": True, "tool_calls": None}]},
     [USER("a", train=False), ASSISTANT(" ", train=False), USER(""), ASSISTANT("b", train=True)]),
    ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL["function"]]},
                               {"role": "tool", "content": "3", "tool_call_id": "1", "name": "add"}, {"role": "assistant", "content": "3"}]},
     [USER("a"), ASSISTANT("", calls=(READ, READ)), TOOL("3"), ASSISTANT("3")]),
    ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "now", "arguments": ""}, {"name": "n"}]}],
                  "tools": []},
     [USER("a"), ASSISTANT("", calls=({"name": "now", "arguments": {}}, {"name": "n", "arguments": {}}))]),
])
def test_records_become_messages(name, record, messages):
    assert FORMATS[name]({**record, "task": "t"}, 7) == Row(7, tuple(messages), "t") and FORMATS[name](record) == Row(0, tuple(messages))


def chat(*turns: dict) -> dict:
    return {"messages": [{"role": "user", "content": "a"}, *turns]}


def answer(**fields) -> dict:
    return chat({"role": "assistant", **fields})


@pytest.mark.parametrize(("name", "record", "words"), [
    ("alpaca", {"output": "b"}, '"instruction": got no such field, expected text'), ("alpaca", {"instruction": None, "output": "b"}, '"instruction": got null'),
    ("alpaca", {"instruction": "a"}, '"output": got no such field'), ("alpaca", {"instruction": "a", "output": 5}, '"output": got 5, expected text'),
    ("alpaca", {"instruction": "a", "input": ["x" * 99], "output": "b"}, '"input": got ["…"]'),
    ("alpaca", {"instruction": "a", "output": "b", "task": 1}, '"task": got 1'),
    ("alpaca", {"instruction": "a", "output": ""}, "the answer (message 2 of 2) is empty or white space; there is nothing to learn"),
    ("alpaca", {"instruction": "a", "output": " \n\u3000"}, "is empty or white space"),
    ("completion", {"prompt": "a", "completion": "\t"}, "is empty or white space"),
    ("text", {"text": " \n"}, '"text": got only white space'), ("text", {"text": None}, '"text": got null'),
    ("alpaca", {"messages": []}, '"instruction": got no such field; the record looks like format messages; a source has records of one format'),
    ("messages", {"instruction": "a", "output": "b"}, '"messages": got no such field; the record looks like format alpaca'),
    ("sharegpt", {"prompt": "a", "completion": "b"}, "looks like format completion"), ("completion", {"text": "a"}, "looks like format text"),
    ("text", {"conversations": []}, "looks like format sharegpt"),
    ("messages", {"messages": "a"}, '"messages": got "a", expected a list of objects'), ("messages", {"messages": ["a"]}, '"messages": got ["a"]'),
    ("messages", {}, '"messages": got no such field, expected a list'), ("messages", {"messages": []}, "ends with nothing before; expected an answer"),
    ("messages", chat({"role": "gpt", "content": "b"}), '"messages" 2: "role": got "gpt", expected one of system, user, assistant, tool'),
    ("sharegpt", {"conversations": [{"from": "x", "value": "b"}]}, '"conversations" 1: "from": got "x", expected one of human, user, gpt'),
    ("messages", answer(content=None), '"messages" 2: "content": got null, expected text'), ("messages", answer(content=[{"type": "text"}]), "expected text"),
    ("messages", answer(), '"messages" 2: "content": got no such field'), ("messages", answer(content="b", train=1), '"train": got 1, expected true or false'),
    ("messages", answer(content="", train=True), "is empty or white space"), ("messages", answer(content="b", tool_calls="x"), '"tool_calls": got "x"'),
    ("messages", answer(content="b", tool_calls=[{}]), "expected a function with its name and arguments"),
    ("messages", answer(tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]),
     '"messages" 2: "tool_calls": the arguments of "f", character 10: the key "a" is given twice'),
    ("messages", answer(tool_calls=[{"name": "f", "arguments": "[1]"}]), 'the arguments of "f": got [1], expected an object'),
    ("messages", answer(tool_calls=[{"name": "f", "arguments": {"a": float("nan")}}]), 'the arguments of "f" cannot be written as JSON'),
    ("messages", chat({"role": "assistant", "content": "b"}, {"role": "user", "content": "c", "tool_calls": [CALL]}), "only the assistant calls tools"),
    ("messages", {**answer(content="b"), "tools": [{"type": "function"}]}, "which no template writes; put them into the system message"),
    ("messages", said("user"), "the conversation ends after the role user; expected an answer of the assistant"),
    ("messages", said("user", "assistant", "tool"), "ends after the role tool"), ("messages", said("system"), "ends after the role system"),
    ("messages", said("assistant"), "message 1 of 1 has the role assistant, with nothing before"),
    ("messages", said("user", "user", "assistant"), "message 2 of 3 has the role user, after the role user"),
    ("messages", said("user", "assistant", "assistant"), "message 3 of 3 has the role assistant, after the role assistant"),
    ("messages", said("system", "system", "user", "assistant"), "message 2 of 4 has the role system, after the role system"),
    ("messages", said("user", "system", "assistant"), "message 2 of 3 has the role system"), ("messages", said("system", "assistant"), "message 2 of 2"),
    ("messages", said("user", "tool", "assistant"), "message 2 of 3 has the role tool, after the role user"),
    ("messages", said("user", "assistant", "tool", "user", "assistant"), "message 4 of 5 has the role user, after the role tool"),
    ("sharegpt", said("gpt", "human", "gpt", key="conversations", names=("from", "value")), "message 1 of 3 has the role assistant, with nothing before"),
])
def test_what_is_no_row_is_told_with_its_reason(name, record, words):
    with pytest.raises(BadRow) as caught:
        FORMATS[name](record)
    assert words in caught.value.reason and "\n" not in caught.value.reason and len(caught.value.reason) < 260


def test_rows_that_need_no_answer(tmp_path):
    asked = lambda name, record: [message.role for message in FORMATS[name](record, answered=False).messages]  # noqa: E731
    assert asked("alpaca", {"instruction": "a"}) == ["user"] == asked("alpaca", {"instruction": "a", "output": ""}) == asked("completion", {"prompt": "a"})
    assert asked("alpaca", {"instruction": "a", "output": "b"}) == ["user", "assistant"] == asked("messages", said("user", "assistant"))
    assert asked("messages", said("system", "user", "assistant", "tool")) == ["system", "user", "assistant", "tool"]
    for record in (said(), said("system")):
        with pytest.raises(BadRow, match="expected a question"):
            FORMATS["messages"](record, answered=False)


def test_fields_that_nobody_reads_are_named():
    assert FORMATS["alpaca"].ignored({"instruction": "a", "output": "b", "id": 1, "history": [], "task": "t"}) == {"id", "history"}
    record = {"messages": [{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "tool_calls": []}], "source": "x"}
    assert FORMATS["messages"].ignored(record) == {"source", "messages.weight"} and FORMATS["text"].ignored({"text": "a"}) == set()


def test_a_file_of_one_format_with_a_record_of_another_is_refused_by_line(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [said("user", "assistant"), {"instruction": "a", "output": "b"}])
    with pytest.raises(EngineError) as caught:
        list(read_rows(path, "messages"))
    assert f'{path}:2:1: "messages": got no such field; the record looks like format alpaca' in str(caught.value)
    assert json.loads(path.read_text().splitlines()[0]) == said("user", "assistant")


@pytest.mark.parametrize(("format", "line", "column", "words"), [
    ("alpaca", '{"instruction": "a", "output": 5}', 32, '"output": got 5, expected text'),
    ("alpaca", '  {"output" :\t"b"}', 3, '"instruction": got no such field'),  # the object that lacks it
    ("alpaca", '{"instruction": "猫", "output": " "}', 32, "the answer (message 2 of 2) is empty"),
    ("completion", '{"x": [1, {"prompt": 2}], "prompt": "a", "completion": null}', 56, '"completion": got null'),
    ("sharegpt", '{"conversations": [{"from": "human", "value": "a"}, {"from": "ai", "value": "b"}]}', 62, '"conversations" 2: "from": got "ai"'),
    ("messages", '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', 49, "message 2 of 2 has the role user"),
    ("messages", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": 1}]}', 96, '"messages" 2: "train": got 1'),
    ("messages", '{"messages": []}', 14, "the conversation ends with nothing before"),
    ("text", '{"\\u0074ext": ["a"]}', 15, '"text": got ["a"]'),
])
def test_a_fault_of_a_field_is_named_with_its_column(tmp_path, format, line, column, words):
    """The same in JSON Lines and within an array that stands over several lines."""
    path = tmp_path / "rows.jsonl"
    for text, place in ((f"\n{line}\n", f"2:{column}"), (f"[\n   {line.strip()}\n]", f"2:{column + 3 - (len(line) - len(line.strip()))}")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(EngineError) as caught:
            list(read_rows(path, format))
        assert caught.value.text.startswith(f"{path}:{place}: {words}"), caught.value.text
