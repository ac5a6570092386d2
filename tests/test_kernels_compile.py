"""What nvcc makes of the kernels, without a GPU: nothing spilled, tensor cores in use, and every figure as kernels/ptxas.txt has it.

    python tests/test_kernels_compile.py > kernels/ptxas.txt       after a change of the kernels that is meant

The machine code is read here: instructions of 16 bytes, whose lowest 12 bits say what they do.
"""

import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
ARCHITECTURES = (80, 90, 120)
OPERATIONS = {0x23C: "HMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS", 0x983: "LDL", 0x387: "STL"}  # mma, ldmatrix, cp.async, local memory in and out


def version() -> str | None:
    compiler = shutil.which("nvcc")
    return compiler and re.search(r"V[\d.]+", subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout)[0]


def compiled(architecture: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Each kernel's name, and what is known of it."""
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(KERNELS.glob("*.cu")):
            binary = Path(folder) / "it.cubin"
            command = ["nvcc", "-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v,-warn-spills", "-Werror=all-warnings", "-o", str(binary)]
            done = subprocess.run([*command, str(source)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said = {mangled: text for mangled, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", done.stderr, re.DOTALL)}
            for mangled, code in sections(binary.read_bytes()):
                found = Counter(OPERATIONS.get(struct.unpack_from("<H", code, at)[0] & 0xFFF) for at in range(0, len(code), 16))
                kernel, kind, width = re.search(r"\d([A-Z][A-Za-z]+)I4(bf16|fp16)Li(\d+)E", mangled).groups()
                registers, stack = (int(re.search(text, said[mangled])[1]) for text in (r"Used (\d+) registers", r"(\d+) bytes stack frame"))
                yield f"sm_{architecture} {kernel} {kind} {width}", {
                    "registers": registers, "stack": stack,
                    "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said[mangled]))), **{name: found[name] for name in OPERATIONS.values()}}


def sections(binary: bytes) -> Iterator[tuple[str, bytes]]:
    """Kernels of an ELF file of 64 bits: name and code."""
    (headers,), (size, count, names) = struct.unpack_from("<Q", binary, 0x28), struct.unpack_from("<HHH", binary, 0x3A)
    table = [struct.unpack_from("<IIQQQQ", binary, headers + number * size) for number in range(count)]
    for name, _, _, _, start, length in table:
        at = table[names][4] + name
        if (text := binary[at : binary.index(b"\0", at)].decode()).startswith(".text."):
            yield text.removeprefix(".text."), binary[start : start + length]


def as_recorded(kernels: dict[str, dict[str, int]]) -> list[str]:
    return sorted(f"{kernel}: " + " ".join(f"{name}={value}" for name, value in found.items()) for kernel, found in kernels.items())


@pytest.mark.skipif(not version(), reason="needs nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills_and_as_recorded(architecture):
    kernels = dict(compiled(architecture))
    assert len(kernels) == 3 * 2 * 2 + 2  # kernels, types, head widths; and the probe
    for kernel, found in kernels.items():
        assert found["spilled"] == found["stack"] == found["LDL"] == found["STL"] == 0, (kernel, found)
        assert found["registers"] <= 255 and found["HMMA"] and found["LDSM"] and found["LDGSTS"], (kernel, found)
    made_by, *recorded = (KERNELS / "ptxas.txt").read_text().splitlines()
    if version() not in made_by:
        pytest.skip(f"kernels/ptxas.txt is of {made_by}, here is {version()}: the limits hold, figures differ")
    assert as_recorded(kernels) == [line for line in recorded if line.startswith(f"sm_{architecture} ")]


if __name__ == "__main__":
    print(f"nvcc {version()}", *(line for architecture in ARCHITECTURES for line in as_recorded(dict(compiled(architecture)))), sep="\n")
