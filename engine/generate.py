"""Answers of a model: to one prompt, to the rows of a file, or in a chat at the terminal.

    python -m engine.generate --model runs/quickstart/export/model --prompt "Name three colours."
    python -m engine.generate --adapter runs/lora/export/adapter --file questions.jsonl --out answers.jsonl
    python -m engine.generate --model HuggingFaceTB/SmolLM2-135M-Instruct --template chatml

A prompt goes through the code that makes training's, so a model meets exactly the tokens it was trained to answer.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine import hub
from engine.arguments import Parser, between
from engine.data.formats import Message, Row
from engine.data.reading import read_rows
from engine.data.template import TEMPLATES
from engine.errors import ENVIRONMENT, EngineError, run

EXAMPLE = 'python -m engine.generate --model runs/quickstart/export/model --prompt "Name three colours."'


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("generate", EXAMPLE, "Answers of a model: to one prompt, to the rows of a file, or without either in a chat "
                    "at the terminal, where each turn is a prompt of its own and an empty line ends.")
    parser.add_argument("--model", metavar="DIR", help="model folder in Hugging Face layout, or org/name[@revision] on the hub")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="adapter folder in PEFT layout; it names its base unless --model does")
    parser.add_argument("--prompt", metavar="TEXT", help="an instruction")
    parser.add_argument("--input", metavar="TEXT", default="", help="what the instruction is about, if it needs that")
    parser.add_argument("--file", type=Path, metavar="ROWS.jsonl", help='JSON Lines of {"instruction", "input"}; they need no output')
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the file's answers go, a new file [the terminal]")
    parser.add_argument("--batch", type=between(int, 1), default=16, metavar="N", help="rows of the file answered at once, fewer where long [16]")
    parser.add_argument("--temperature", type=between(float, 0), default=0.0, metavar="T", help="0 takes the likeliest token [0]")
    parser.add_argument("--top-p", type=between(float, 0, 1), default=1.0, metavar="P", help="draw from the fewest tokens that hold P [1]")
    parser.add_argument("--seed", type=between(int, 0, 2**63 - 1), default=0, metavar="N", help="of the draws [0]")
    parser.add_argument("--max-new-tokens", type=between(int, 1), default=256, metavar="N", help="longest answer [256]")
    parser.add_argument("--template", choices=TEMPLATES, help="how a row becomes a prompt [what the folder says, else alpaca]")
    parser.add_argument("--system", metavar="TEXT", help="system prompt [what the folder says for its template, else none]")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type of weights and arithmetic [CPU: fp32, CUDA: bf16]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where it is [auto]")
    args = parser.parse_args(argv)
    for wrong, text in ((not (args.model or args.adapter), "--model or --adapter is needed"),
                        (args.prompt is not None and args.file, "--prompt and --file exclude each other"),
                        (args.input and args.prompt is None, "--input needs --prompt"), (args.out and not args.file, "--out needs --file"),
                        (args.top_p == 0, "argument --top-p: got 0, expected more"),
                        (0 < args.temperature < 0.001, f"argument --temperature: got {args.temperature}, expected 0 or at least 0.001")):
        if wrong:
            parser.error(text)
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if args.out and args.out.exists():
        raise EngineError("GENERATE-OUT", f"{args.out}: exists already; name another file")
    rows = list(read_rows(args.file, answered=False)) if args.file else []

    answerer = Answerer(args)
    if args.file:
        answer_file(answerer, rows, args)
    elif args.prompt is not None:
        answerer.stream(args.prompt, args.input)
        answerer.report()
    else:
        chat(answerer)


def chat(answerer: "Answerer") -> None:
    """Answers line after line, from a terminal or a pipe, until an empty one or the end."""
    if at_terminal := sys.stdin.isatty():
        import readline  # noqa: F401  lines can be edited and called back
    while True:
        try:
            line = input("> " if at_terminal else "")
        except EOFError:
            line = ""
        except UnicodeDecodeError as error:
            raise EngineError("GENERATE-TEXT", f"standard input: {error}; expected UTF-8") from error
        if not line.strip():
            return
        answerer.stream(line, "")


def answer_file(answerer: "Answerer", rows: list[Row], args: argparse.Namespace) -> None:
    """Writes {"instruction", "input", "answer"} for each row, in the rows' order, batch by batch."""
    from tqdm import tqdm

    from engine.sampling import rows_at_once

    prompts = [answerer.prompt(row, f"{args.file}:{row.line}: ") for row in rows]
    at_once = rows_at_once(answerer.model, prompts, args.max_new_tokens, args.batch)
    try:
        out = args.out.open("x", encoding="utf-8") if args.out else sys.stdout
    except OSError as error:
        raise EngineError("ENVIRONMENT-OUT", f"{args.out}: cannot be written: {error.strerror}; name another file", ENVIRONMENT) from error
    with tqdm(total=len(rows), desc="answering", unit=" rows", disable=not sys.stderr.isatty(), leave=False) as progress:
        for start in range(0, len(rows), at_once):
            batch = rows[start : start + at_once]
            for row, ids in zip(batch, answerer.answer(prompts[start : start + at_once]), strict=True):
                asked = row.messages[0]
                record = {"instruction": asked.content, "input": asked.input, "answer": answerer.tokenizer.decode(ids)}
                print(json.dumps(record, ensure_ascii=False), file=out)
            out.flush()
            progress.update(len(batch))
    answerer.report()
    if args.out:
        out.close()


class Answerer:
    """A model with all that it takes to ask it; says on standard error what it uses and why."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from engine.data.tokenizer import load_tokenizer, stops
        from engine.export import load_for_inference, note_of, words_of
        from engine.precision import DTYPES

        on_cuda = torch.cuda.is_available() and args.device != "cpu"
        if args.device == "cuda" and not on_cuda:
            raise EngineError("ENVIRONMENT-CUDA", "--device cuda, but torch sees no CUDA device; leave it out", ENVIRONMENT)
        found = hub.resolve(args.model) if args.model else base_of(args.adapter)
        base, folder = found.folder, args.adapter or found.folder
        note, dtype = note_of(folder), args.dtype or ("bf16" if on_cuda else "fp32")
        noted, system = note.get("template"), note.get("system")
        self.template = args.template or noted or "alpaca"
        shown = args.adapter or found
        why = "asked for" if args.template else f"{shown} says so" if noted else f"{shown} names none"
        if self.template not in TEMPLATES:
            raise EngineError("GENERATE-TEMPLATE", f"{folder}: names the template {noted!r}, expected one of {', '.join(TEMPLATES)}")
        self.system = args.system if args.system is not None else system if self.template == noted else None
        self.tokenizer = load_tokenizer(words_of(base, args.adapter), base)
        self.stops = stops(self.template, self.tokenizer)
        self.model = load_for_inference(base, args.adapter, DTYPES[dtype], torch.device("cuda" if on_cuda else "cpu"))
        if (highest := max(self.tokenizer.pieces - 1, *self.prompt(Row(0, (Message("user", "a"),))))) >= self.model.config.vocab_size:
            raise EngineError("GENERATE-VOCABULARY", f"{base}: the tokenizer, or the template {self.template}, has ids up to {highest}, the model's "
                              f"vocab_size is {self.model.config.vocab_size}; take the model's own tokenizer")
        self.args, self.calls, self.tokens, self.seconds = args, 0, 0, 0.0
        draws = f"temperature {args.temperature}, top-p {args.top_p}, seed {args.seed}" if args.temperature else "greedy"
        why += ", with a system prompt" if self.system is not None else ""
        print(f"{shown}: template {self.template} ({why}), {dtype} on {'cuda' if on_cuda else 'cpu'}, {draws}", file=sys.stderr)

    def prompt(self, row: Row, where: str = "") -> list[int]:
        """The ids to go on from. `where` begins the text of an error."""
        from engine.data.tokenizer import prompt_ids

        try:
            "".join(message.content + message.input for message in row.messages).encode()
        except UnicodeEncodeError as error:  # of the command line or the terminal; a file's rows were looked at
            raise EngineError("GENERATE-TEXT", f"{where}the prompt holds half a character ({error}); expected UTF-8") from error
        ids, limit = prompt_ids(row, self.template, self.tokenizer, self.system), self.model.config.max_position_embeddings
        if not 0 < len(ids) < limit:
            raise EngineError("GENERATE-LENGTH", f"{where}the prompt has {len(ids)} tokens, expected 1 to {limit - 1}: prompt and answer "
                              f"share the model's {limit} positions")
        return ids

    def answer(self, prompts: list[list[int]], on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
        """Ids of the answers. Draws differ from call to call, and repeat from run to run."""
        from engine.sampling import Sampling, generate

        sampling = Sampling(self.args.temperature, self.args.top_p, self.args.seed + self.calls)
        began = time.perf_counter()
        answers = generate(self.model, prompts, self.stops, self.args.max_new_tokens, sampling, on_token)
        self.seconds += time.perf_counter() - began
        self.tokens, self.calls = self.tokens + sum(map(len, answers)), self.calls + 1
        return answers

    def stream(self, instruction: str, about: str) -> None:
        """Prints an answer as it comes."""
        text = Stream(self.tokenizer.decode)
        row = Row(0, (Message("user", instruction, about),))
        self.answer([self.prompt(row)], lambda row, token: print(text.add(token), end="", flush=True))
        print(text.rest())

    def report(self) -> None:
        print(f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens / self.seconds:.1f} tokens/s", file=sys.stderr)


class Stream:
    """Text of tokens that come one at a time. What `add` and `rest` return is together what `decode` makes of them all.

    The bytes of a character may be spread over tokens; until it is whole it is held back. Text of a token depends on the
    one before it (a space is dropped at the start), so each is decoded with those last shown, not by itself.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.ids, self.start, self.shown = decode, [], 0, 0

    def add(self, token: int) -> str:
        """The text that is certain now, often empty."""
        self.ids.append(token)
        text = self.rest()
        if not text or text.endswith("\ufffd"):
            return ""
        if not text.isspace():  # after nothing but spaces, more of them would be dropped
            self.start = self.shown
        self.shown = len(self.ids)
        return text

    def rest(self) -> str:
        """What has not been shown, an unfinished character as \ufffd."""
        return self.decode(self.ids[self.start :])[len(self.decode(self.ids[self.start : self.shown])) :]


def base_of(adapter: Path) -> hub.Base:
    """The base model that an adapter names, in the revision that it names."""
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"] or "", config.get("revision")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineError("GENERATE-ADAPTER", f"{path}: cannot be read: {error}; expected an adapter folder in PEFT's layout") from error
    if (Path(base) / "config.json").is_file():
        return hub.resolve(base)
    if not hub.is_name(name := f"{base}@{revision}" if revision else base):
        raise EngineError("GENERATE-BASE", f"{path}: names the base model {name}, which is no folder here; give it with --model")
    try:
        return hub.resolve(name)
    except EngineError as error:
        raise EngineError(error.name, f"{path} names a base model: {error.text}; or give it with --model", error.exit_code) from error


if __name__ == "__main__":
    run(main)
