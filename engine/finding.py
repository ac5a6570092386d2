"""What a probe of the machine finds: a line of text that is fine, of note or wrong, and what to change where it is not fine."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError, first_line
from engine.terminal import shown


@dataclass(frozen=True)
class Finding:
    """`change`: what to change; empty where there is nothing to."""

    name: str
    found: str
    change: str = ""
    is_wrong: bool = False

    @property
    def verdict(self) -> str:
        return "wrong" if self.is_wrong else "note" if self.change else "ok"

    def __str__(self) -> str:
        lines = f"  {self.verdict:<5}  {self.name:<13}  {_one_line(self.found)}"
        return lines + (f"\n{'':24}{_one_line(self.change)}" if self.change else "")


Probe = Callable[[], Iterator[Finding]]


def tried(name: str, probe: Probe) -> Iterator[Finding]:
    """What the probe finds. That it fails is a finding too, and no reason to keep the others' from the user."""
    try:
        yield from probe()
    except EngineError as error:
        yield of_error(name, error.text)
    except ImportError as error:
        yield Finding(name, f"not looked at: {first_line(error)}", "install what is missing, see the packages above", True)
    except Exception as error:
        yield Finding(name, f"{type(error).__name__}: {first_line(error)}", "look into this: it was not expected, and hides what else there is to find", True)


def of_error(name: str, text: str) -> Finding:
    """What one of the engine's errors says, which ends in what to change."""
    found, _, change = text.rpartition("; ")
    return Finding(name, found or text, change if found else "do as it says", True)


def read(path: Path) -> str:
    """A file of the kernel's; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _one_line(text: str) -> str:
    return shown(" ".join(text.split()))
