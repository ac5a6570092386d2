"""Weights from one form into another: a GGUF file or a model, with an adapter or without, to a folder or a GGUF file.

    python -m engine.convert model.Q8_0.gguf models/mine --dtype bf16
    python -m engine.convert models/mine merged --adapter runs/lora/export/adapter
    python -m engine.convert org/name@revision mine.gguf --dtype q8_0

Every target is written under a temporary name, read back, and gets its own once it is whole.
"""

from pathlib import Path

from engine import gguf_in, hub
from engine.arguments import Parser
from engine.errors import EngineError, run
from engine.publish import published

EXAMPLE = "python -m engine.convert SmolLM2-135M-Instruct.Q8_0.gguf models/smollm2 --dtype bf16"
DTYPES = {"folder": ("bf16", "fp16", "fp32"), "gguf": ("bf16", "fp16", "fp32", "q8_0")}


def main(argv: list[str]) -> None:
    parser = Parser("convert", EXAMPLE, "Weights from a GGUF file or a model folder to a model folder or a GGUF file.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a .gguf file, a model folder in Hugging Face layout, or org/name[@revision] on the hub")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a folder, or a file that ends in .gguf; must not exist")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="adapter folder in PEFT layout, merged in fp32 and rounded once")
    parser.add_argument("--dtype", choices=DTYPES["gguf"], default="bf16", help="type of the written weights; q8_0 in GGUF alone [bf16]")
    args = parser.parse_args(argv)
    kind = "gguf" if args.target.suffix == ".gguf" else "folder"
    if args.dtype not in DTYPES[kind]:
        parser.error(f"--dtype: got {args.dtype} for a folder, expected one of {', '.join(DTYPES[kind])}")
    if args.source.is_dir() or args.source.suffix != ".gguf" and hub.is_name(str(args.source)):
        from_folder(args.source, args.target, args.dtype, args.adapter)
    elif not args.source.exists():
        raise EngineError("CONVERT-SOURCE", f"{args.source}: is not there, expected a .gguf file, a model folder, or org/name[@revision] on the hub")
    elif kind == "gguf" or args.adapter:
        parser.error(f"SOURCE: got the file {args.source}, expected a model folder here; convert it to a folder first")
    else:
        gguf_in.to_folder(args.source, args.target, args.dtype)
    hint = f"; try: python -m engine.generate --model {args.target}" if kind == "folder" else ""
    print(f"{args.target}: written{hint}")


def from_folder(source: Path, target: Path, dtype: str, adapter: Path | None) -> None:
    """Writes `target`, a folder or a GGUF file, from a model folder or a name on the hub, with `adapter` merged where one is given.

    Raises:
        EngineError: the target exists, cannot be written or cannot be read back; the source is no model, or one that GGUF is not written for.
    """
    if target.exists():
        raise EngineError("CONVERT-TARGET", f"{target}: exists already; name another, or remove this one")

    import torch

    from engine.export import load_for_inference, note_of, read_back, read_model, words_of, write_model

    source = hub.resolve(str(source)).folder
    model = load_for_inference(source, adapter, torch.float32, torch.device("cpu"))
    note = adapter and note_of(adapter) or note_of(source)
    with published(target) as building:
        write_model(building, model, source, words_of(source, adapter), note, dtype)
        del model  # room for what is read
        with read_back(target):
            read_model(building, dtype if dtype in DTYPES["folder"] else "bf16", torch.float32, torch.device("cpu"))


if __name__ == "__main__":
    run(main)
