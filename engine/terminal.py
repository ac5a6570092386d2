"""What this process shows and leaves: text that a terminal shows and never obeys, files that are their owner's alone."""

import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

# What a terminal obeys instead of showing it, but for line ends and tabs: control characters, marks that turn text around, half characters.
OBEYED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
OWN = re.compile(r"\x1b\[[0-9;]*[mKA]")  # colours, progress
LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def shown(text: str) -> str:
    """`text` for a terminal or a record: names of files and rows may hold anything, a URL its password."""
    return LOGIN.sub("…", OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}" if found[0] > "\xff" else f"\\x{ord(found[0]):02x}", text))


class Shown:
    """Standard output or error of which a reader sees everything and obeys nothing.

    Args:
        needed: without a reader the process ends, as `| head` asks for; a run that trains goes on in silence.
    """

    def __init__(self, stream: TextIO, needed: bool) -> None:
        stream.reconfigure(errors="backslashreplace")  # a terminal that knows no Chinese is no reason to stop
        self.stream, self.needed = stream, needed

    def write(self, text: str) -> int:
        at_terminal = self.stream.isatty()
        parts = OWN.split(text) if at_terminal else [text]
        own = [*OWN.findall(text), ""] if at_terminal else [""]
        self._try(self.stream.write, "".join(shown(part) + mark for part, mark in zip(parts, own, strict=True)))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., Any], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError:
            if self.needed:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def prepare(needs_reader: bool) -> None:
    """What is written from here on is its owner's alone; standard streams are there and harmless."""
    os.umask(0o077)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed by who started us: the next file opened would have its number, and get what is printed
            os.open(os.devnull, os.O_RDWR)
        if number:
            stream = getattr(sys, name) or os.fdopen(number, "w", encoding="utf-8")
            setattr(sys, name, Shown(stream, needs_reader) if hasattr(stream, "reconfigure") else stream)
