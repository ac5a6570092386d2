"""argparse as the commands use it: a mistake is one line that says what was got and what is expected, with an example."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from engine.errors import EngineError


class Parser(argparse.ArgumentParser):
    """Of `python -m engine.NAME`. Raises EngineError where argparse would print its usage and leave."""

    def __init__(self, name: str, example: str, description: str) -> None:
        super().__init__(f"python -m engine.{name}", description=description, epilog=f"example: {example}")
        self.area = name.split()[0].upper()

    def error(self, message: str) -> NoReturn:
        raise EngineError(f"{self.area}-ARGUMENTS", f"{message}; {self.epilog}")


def between(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """The `type` of an argument that is a number between the two, both included."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or value == float("inf"):
            span = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {'a whole number' if kind is int else 'a number'} {span}")
        return value

    return parse
