"""The model's own Jinja chat template, rendered to see whether ours writes the same; nothing is trained on what it renders.

It comes with the model, from anybody, so it runs in a process of its own under limits: see sandbox.py.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from engine.config import Data
from engine.data.formats import BadRow, Message, Row
from engine.data.template import TEMPLATES, question
from engine.data.tokenizer import Tokenizer, prompt_ids, read_json, tell_controls, text_of, tokenise
from engine.errors import SECURITY, EngineError, warn

SIZE = 1 << 20  # characters of a template
WALL_S = 10.0  # its CPU time is limited more narrowly; this is for machines that have none to spare
COMPARED = 1000  # characters of each message of a row
TURNS = 8  # messages of a row


def own_template(folder: Path) -> str | None:
    """chat_template.jinja or, before there was such a file, chat_template in tokenizer_config.json; of several, the default."""
    if (folder / "chat_template.jinja").is_file():
        with (folder / "chat_template.jinja").open(encoding="utf-8", errors="replace") as file:
            return file.read(SIZE + 1)
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    return found if isinstance(found, str) else None


def render(template: str, conversations: list[dict[str, Any]], names: dict[str, str] | None = None) -> list[str]:
    """The text of each conversation.

    Args:
        conversations: what the template is called with, {"messages": [{"role", "content"}, …], "add_generation_prompt": …}.
        names: of control tokens, {"bos_token": "<s>", …}.

    Raises:
        EngineError: with SECURITY for a template that goes beyond its limits or out of its sandbox.
    """
    if len(template) > SIZE:
        raise _refused(f"it has over {SIZE} characters")
    request = {"path": [path for path in sys.path if path], "template": template, "names": names or {}, "conversations": conversations}
    # -I and -S: nothing of the user's or the folder's is imported on the way; sys.path is handed over instead
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox.py"))]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, encoding="utf-8", timeout=WALL_S)
        answer = json.loads(done.stdout) if done.returncode == 0 else {"refused": f"it took too much time or memory (its process ended with {done.returncode})"}
    except subprocess.TimeoutExpired:
        raise _refused(f"it was not done within {WALL_S:.0f} s") from None
    except (OSError, ValueError) as error:
        answer = {"error": f"its process cannot be used: {error}"}
    why = "".join(letter if letter.isprintable() else " " for letter in str(answer.get("refused") or answer.get("error"))[:200])
    if "refused" in answer:
        raise _refused(why)
    if "error" in answer:
        raise EngineError("TEMPLATE-RENDER", f"the model's own chat template cannot be rendered: {why}")
    return answer["texts"]


def _refused(why: str) -> EngineError:
    return EngineError("TEMPLATE-REFUSED", f"the model's own chat template is not safe to render: {why}", SECURITY)


def check(folder: Path, data: Data, tokenizer: Tokenizer, row: Row | None) -> None:
    """Says in one line on standard error where a row's ids are not those that the model's own chat template gives, and what
    would give them. Never stops a run."""
    try:
        template = own_template(folder)
        if row and template is not None and (found := difference(template, folder, data, tokenizer, row)):
            warn(found)
    except BadRow:  # the template has no place for it; tokenising says so
        pass
    except EngineError as error:
        warn(f"{folder}: not compared with data.template={data.template}: {error.text}")


def difference(template: str, folder: Path, data: Data, tokenizer: Tokenizer, row: Row) -> str | None:
    """What is different in a row's ids and what to set, if anything is; plain text is the same everywhere.

    What the model's own template writes for generation is what counts; it may leave the system prompt out where there is an
    answer already, as Mistral's does, and then only prompts are compared.
    """
    if row.messages[0].role == "text":
        return None
    tell_controls(data.template, tokenizer)  # as tokenising does, which a warm cache spares
    row = _sample(row, tokenizer)
    prompt, whole = render(template, _conversations(row, data.system), _names(folder, tokenizer))
    answered = whole.startswith(prompt)
    own = tokenizer.encode_rendered(whole if answered else prompt)

    def ours(name: str, system: str | None) -> list[int]:
        return tokenise([row], name, system, "answers", tokenizer).ids.tolist() if answered else prompt_ids(row, name, tokenizer, system)

    def same(name: str, system: str | None) -> bool:
        ids = ours(name, system)  # templates may write a line break after the answer's end, before the next turn
        return own[: len(ids)] == ids and not tokenizer.show(own[len(ids) :]).strip()

    if same(data.template, data.system):
        return None
    asked = ours(data.template, data.system)
    at = next((place for place, (one, other) in enumerate(zip(asked, own, strict=False)) if one != other), min(len(asked), len(own)))
    advice = "none of ours would be the same"
    for name, system in _candidates(row, data.system, prompt, tokenizer):
        try:
            if same(name, system):
                also = "" if system == data.system else f" with data.system={json.dumps(system, ensure_ascii=False)}"
                advice = f"data.template={name}{also} would be the same"
                break
        except (EngineError, BadRow):  # a control token that this tokenizer lacks, a message that has no place there
            pass
    return (f"data.template={data.template} is not how {folder} says it chats: the first row's ids differ from its own chat template's from token "
            f"{at} on, {tokenizer.show(asked[at : at + 6])!r} where its own has {tokenizer.show(own[at : at + 6])!r}; {advice}")


def _candidates(row: Row, system: str | None, own_prompt: str, tokenizer: Tokenizer) -> Iterator[tuple[str, str | None]]:
    """Every template with the recipe's system prompt, then with one that the model's own template writes unasked: what stands
    where ours would have it, if the rest is as ours."""
    chats = [name for name, template in TEMPLATES.items() if template.chat]
    yield from ((name, system) for name in (chats if system is not None else TEMPLATES))
    if system is not None or row.messages[0].role == "system":
        return
    for name in chats:
        try:
            segments = TEMPLATES[name](row, "\ue000")
        except BadRow:
            continue
        text = "".join(segment.text for segment in takewhile(lambda one: one.turn != len(row.messages) - 1, segments))
        before, _, after = text.partition("\ue000")
        before = "".join(map(tokenizer.name, tokenizer.prefix)) + before
        if own_prompt.startswith(before) and own_prompt.endswith(after):
            unasked = own_prompt[len(before) : len(own_prompt) - len(after)]
            if len(unasked) <= COMPARED and unasked.replace("\n", "").isprintable():
                yield name, unasked


def _conversations(row: Row, system: str | None) -> list[dict[str, Any]]:
    """The row as it is asked, and with its answer."""
    own = [] if system is None or row.messages[0].role == "system" else [{"role": "system", "content": system}]
    messages = own + [as_chat(message) for message in row.messages]
    return [{"messages": messages[:-1], "add_generation_prompt": True}, {"messages": messages, "add_generation_prompt": False}]


def as_chat(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    calls = [{"type": "function", "function": call} for call in message.calls]
    return {"role": message.role, "content": question(message), **({"tool_calls": calls} if calls else {})}


def _names(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    settings = read_json(folder / "tokenizer_config.json")
    named = {key: text_of(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    names = dict(zip(("eos_token", "bos_token"), map(tokenizer.name, [tokenizer.eos, *tokenizer.prefix]), strict=False))
    return {**names, **{key: name for key, name in named.items() if isinstance(name, str)}}


def _sample(row: Row, tokenizer: Tokenizer) -> Row:
    """The row, cut, and without the names of control tokens: a chat template's text cannot tell them from its own."""
    names = "|".join(map(re.escape, tokenizer.specials())) or "(?!)"

    def cut(text: str) -> str:
        return re.sub(names, " ", text[:COMPARED]).strip()

    messages = row.messages[:TURNS]
    while messages[-1].role != "assistant":
        messages = messages[:-1]
    return replace(row, messages=tuple(replace(one, content=cut(one.content), input=cut(one.input)) for one in messages))
