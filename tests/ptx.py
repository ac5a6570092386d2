"""What nvcc makes of the kernels, run on the CPU: an interpreter of PTX, and a CUDA runtime through which host code launches it.

The emulator (kernels/emulator.h) runs the kernels' source with the machine's operations written anew. Here they are the instructions
that simt.h gives nvcc, after nvcc's optimiser and before ptxas. They mean what "PTX ISA" (NVIDIA, version 9.0) says; what the kernels do
not use is not known and refused by name.

All blocks of a launch run side by side: a register is an array (blocks, 32), of one warp of each. Of the lanes those that are furthest
behind go on until they part or meet others. Between barriers the warps of a block run one after the other, in an order drawn from a seed,
so that most of what a missing barrier leaves open goes wrong. Besides it is seen when memory outside of the given tensors is touched or
an address is not aligned, when a register, shared memory or a copy under way is read too early (an error, NaNs, NaNs), and when a warp
comes to an operation of all its lanes in parts. Other races, and bank conflicts, are the emulator's to see.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

WARP = 32
POISON = np.uint32(0x7FFF7FFF)  # a NaN in bf16 and fp16, and in fp32
SHARED_BASE = 1024  # what sm_90 keeps for itself
TYPES = {"u16": np.uint16, "s16": np.int16, "b16": np.uint16, "f16": np.float16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32,
         "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "pred": np.bool_}
WIDER = {"u16": np.uint32, "s16": np.int32, "u32": np.uint64, "s32": np.int64}
Value = Callable[["Warps"], Any]  # of an operand
Step = Callable[["Warps"], Any]  # an instruction; what it returns is where to go on, None the next one


class PTXError(Exception):
    """What no GPU would do, or not without harm; or what is not known here."""


def _unknown(instruction: str) -> PTXError:
    return PTXError(f"tests/ptx.py does not know {instruction}; if the kernels are to use it, add it there")


# ---- Memory --------------------------------------------------------------------------------------------------------------


class Memory:
    """Tensors as a GPU's memory: words of 32 bits at the tensors' own addresses."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        tensors = sorted((x for x in tensors if x.numel()), key=torch.Tensor.data_ptr)
        self.words = [x.view(-1).view(torch.int32).numpy().view(np.uint32) for x in tensors]
        self.starts = np.array([x.data_ptr() for x in tensors], np.int64)
        self.ends = self.starts + [x.nbytes for x in tensors]

    def find(self, at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Which tensor each address is of, and the word in it."""
        at = at.astype(np.int64)
        owner = np.searchsorted(self.starts, at, "right") - 1
        wrong = (owner < 0) | (at + size > self.ends[owner]) | (at % size != 0)
        if wrong.any():
            raise PTXError(f"global memory: {size} bytes at {int(at[wrong][0]):#x} are of no tensor, or not aligned")
        return owner, (at - self.starts[owner]) // 4

    def load(self, at: np.ndarray, count: int) -> np.ndarray:
        """(n,) addresses -> (n, count) words."""
        owner, first = self.find(at, 4 * count)
        found = np.empty((len(at), count), np.uint32)
        for number in np.unique(owner):
            here = owner == number
            found[here] = self.words[number][first[here, None] + np.arange(count)]
        return found

    def store(self, at: np.ndarray, words: np.ndarray) -> None:
        owner, first = self.find(at, 4 * words.shape[1])
        for number in np.unique(owner):
            here = owner == number
            self.words[number][first[here, None] + np.arange(words.shape[1])] = words[here]


# ---- Machine -------------------------------------------------------------------------------------------------------------


class Warps:
    """One warp of each block.

    Attributes:
        registers: arrays (blocks, 32), or of one value for all; replaced, never written into.
        at: (blocks, 32), the instruction that a lane comes to.
        waits, ended: (blocks, 32), at a barrier, or through.
        mask: (blocks, 32), lanes that take part in the instruction at hand.
        alone: whether all others are through, so that their registers need not be kept.
        next: the instruction after the one at hand.
    """

    def __init__(self, launch: "Launch", number: int) -> None:
        shape = (launch.blocks, WARP)
        self.launch, self.registers = launch, [None] * len(launch.kernel.kinds)
        self.at, self.mask, self.alone = np.zeros(shape, np.int64), np.ones(shape, bool), True
        self.waits, self.ended = np.zeros(shape, bool), np.zeros(shape, bool)
        self.lane = np.broadcast_to(np.arange(WARP, dtype=np.uint32), shape)
        self.block = np.broadcast_to(np.arange(launch.blocks)[:, None], shape)
        block = np.arange(launch.blocks, dtype=np.uint32)[:, None]
        self.special = {"%tid.x": self.lane + np.uint32(WARP * number), "%ctaid.x": block % np.uint32(launch.grid[0]) + 0 * self.lane,
                        "%ctaid.y": block // np.uint32(launch.grid[0]) + 0 * self.lane}
        self.groups = np.zeros(shape, np.int64)  # commits so far
        self.copies: list[tuple[np.ndarray, ...]] = []  # lanes (flat), the group they belong to, to, from, whether not zeros

    def put(self, register: int, value: Any) -> None:
        if value.dtype.itemsize != self.launch.kernel.sizes[register]:
            raise TypeError(f"got {value.dtype}, expected a register's {self.launch.kernel.sizes[register]} bytes")
        old = self.registers[register]
        if not self.alone:
            value = np.where(self.mask, value, old.view(value.dtype) if old is not None else np.zeros((), value.dtype))
        self.registers[register] = value

    def whole(self, what: str) -> None:
        """Raises where lanes of a warp are not all here."""
        if not self.alone or self.ended.any():
            here = self.mask.any(1)
            if not (self.mask.all(1) == here).all():
                raise PTXError(f"{what}: only some lanes of a warp came to it")

    def run(self) -> None:
        """Until each lane waits at a barrier or is through."""
        steps = self.launch.kernel.steps
        while True:
            ready = ~(self.waits | self.ended)
            if not ready.any():
                return
            at = int(self.at[ready].min())
            self.mask = ready & (self.at == at)
            others = ready & ~self.mask
            self.alone = not others.any() and not self.waits.any()
            meets = int(self.at[others].min()) if others.any() else len(steps)
            goes_on = None
            while goes_on is None and at < meets:
                at = self.next = at + 1
                goes_on = steps[at - 1](self)
            self.at = np.where(self.mask, at if goes_on is None else goes_on, self.at)

    def load_shared(self, at: np.ndarray, count: int) -> np.ndarray:
        """(blocks, 32) addresses -> (blocks, 32, count) words."""
        return self.launch.shared[self.block[..., None], self._shared_word(at, 4 * count)[..., None] + np.arange(count)]

    def store_shared(self, at: np.ndarray, words: np.ndarray) -> None:
        first = self._shared_word(at, 4 * words.shape[-1])[self.mask]
        self.launch.shared[self.block[self.mask][:, None], first[:, None] + np.arange(words.shape[-1])] = words[self.mask]

    def _shared_word(self, at: np.ndarray, size: int) -> np.ndarray:
        offset = np.where(self.mask, at.astype(np.int64) - SHARED_BASE, 0)
        if (offset < 0).any() or (offset + size > self.launch.shared_bytes).any() or (offset % size != 0).any():
            raise PTXError(f"shared memory: {size} bytes at {offset.min()} to {offset.max()} of {self.launch.shared_bytes}, or not aligned")
        return offset // 4

    def copy(self, to: np.ndarray, source: np.ndarray, size: np.ndarray) -> None:
        """cp.async: the place is nobody's until it is waited for."""
        self.launch.memory.find(source[self.mask & (size != 0)], 16)
        self.store_shared(to, np.broadcast_to(POISON, (*to.shape, 4)))
        lanes = np.flatnonzero(self.mask)
        self.copies.append((lanes, self.groups.flat[lanes], to.flat[lanes], source.flat[lanes], (np.broadcast_to(size, to.shape).flat[lanes] != 0)))

    def wait(self, open_groups: int) -> None:
        kept = []
        for lanes, group, to, source, valid in self.copies:
            done = self.mask.flat[lanes] & (group < self.groups.flat[lanes] - open_groups)
            words = np.zeros((len(lanes), 4), np.uint32)
            words[done & valid] = self.launch.memory.load(source[done & valid], 4)
            self.launch.shared[lanes[done, None] // WARP, (to[done, None].astype(np.int64) - SHARED_BASE) // 4 + np.arange(4)] = words[done]
            if not done.all():
                kept.append(tuple(x[~done] for x in (lanes, group, to, source, valid)))
        self.copies = kept


class Launch:
    """A kernel's run over grid[0] × grid[1] blocks of `threads`, with `shared_bytes` of shared memory and the bytes of its parameters."""

    def __init__(self, kernel: "Kernel", grid: tuple[int, int], threads: int, shared_bytes: int, parameters: bytes, memory: Memory) -> None:
        if threads != kernel.threads:
            raise PTXError(f"{kernel.name}: launched with {threads} threads, expected {kernel.threads}")
        self.kernel, self.grid, self.blocks, self.memory, self.shared_bytes = kernel, grid, grid[0] * grid[1], memory, shared_bytes
        self.parameters = np.frombuffer(parameters, np.uint32)
        self.shared = np.full((self.blocks, shared_bytes // 4), POISON)
        self.warps = [Warps(self, number) for number in range(threads // WARP)]

    def run(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        with np.errstate(all="ignore"):
            while not all(warps.ended.all() for warps in self.warps):
                for number in draw.permutation(len(self.warps)):
                    warps = self.warps[number]
                    try:
                        warps.run()
                    except PTXError as error:
                        raise PTXError(f"{self.kernel.name}: {self.kernel.statements[warps.next - 1]}: {error}") from None
                for warps in self.warps:  # all that are not through wait
                    warps.waits[:] = False
        if any(warps.copies for warps in self.warps):
            raise PTXError("a copy was never waited for")


# ---- Instructions --------------------------------------------------------------------------------------------------------


class Kernel:
    """An entry of a PTX module, translated once."""

    def __init__(self, name: str, parameter_bytes: int, threads: int, body: str) -> None:
        self.name, self.parameter_bytes, self.threads = name, parameter_bytes, threads
        self.registers: dict[str, int] = {}
        self.kinds: list[str] = []  # of registers, as declared
        self.labels: dict[str, int] = {}
        statements: list[str] = []
        for text in re.sub(r"(\$\w+):", r"\1:;", body).split(";"):
            text = re.sub(r"^[\s{}]+", "", text).rstrip()  # braces at its beginning open or close a scope
            if declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
                for one in declared[2].split(","):
                    prefix, _, count = one.strip().rstrip(">").partition("<")
                    for register in [f"{prefix}{i}" for i in range(int(count))] if count else [prefix]:
                        if register not in self.registers:  # in scopes of their own some are declared again
                            self.registers[register] = len(self.kinds)
                            self.kinds.append(declared[1])
            elif text.endswith(":"):
                self.labels[text[:-1]] = len(statements)
            elif text and not text.startswith(".pragma"):
                statements.append(text)
        self.sizes = [np.dtype(TYPES[kind]).itemsize for kind in self.kinds]
        self.statements, self.steps = statements, [self._step(statement) for statement in statements]

    def _step(self, statement: str) -> Step:
        guard, opcode, rest = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL).groups()
        name, *parts = opcode.split(".")
        if name not in INSTRUCTIONS:
            raise _unknown(opcode)
        operands = [one.strip() for one in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", rest)]
        do = INSTRUCTIONS[name](self, parts, *operands)
        if not guard:
            return do
        predicate, wanted = self.value(guard.lstrip("!"), "pred"), not guard.startswith("!")

        def guarded(m: Warps) -> Any:
            mask, alone, holds = m.mask, m.alone, predicate(m) == wanted
            m.mask, m.alone = mask & holds, False
            target = do(m) if m.mask.any() else None
            m.mask, m.alone = mask, alone
            return None if target is None else np.where(holds, target, m.next)

        return guarded

    def value(self, operand: str, kind: str) -> Value:
        """An operand's value in a type, per lane or one for all."""
        dtype = TYPES[kind]
        if operand in self.registers:
            number = self.registers[operand]

            def read(m: Warps) -> np.ndarray:
                if (found := m.registers[number]) is None:
                    raise PTXError(f"{self.name}: {operand} is read, and nobody has written it")
                return found.view(dtype)

            return read
        if operand.startswith("%"):
            return lambda m: m.special[operand].view(dtype)
        if operand.startswith("0f"):
            constant = np.array(int(operand[2:], 16), np.uint32).view(dtype)
        elif re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand):
            constant = np.array(int(operand, 0) % 2 ** (8 * np.dtype(dtype).itemsize), f"u{np.dtype(dtype).itemsize}").view(dtype)
        else:  # the name of a parameter, or of shared memory
            constant = np.array(SHARED_BASE if operand == "memory" else 0, dtype)
        return lambda m: constant

    def values(self, operand: str, kind: str) -> list[Value]:
        return [self.value(one.strip(), kind) for one in operand.strip("{}").split(",")]

    def targets(self, operand: str) -> list[int]:
        return [self.registers[one.strip()] for one in operand.strip("{}").split(",")]

    def address(self, operand: str, kind: str) -> Value:
        """Of [register + offset] or [name + offset]."""
        base, _, offset = operand.strip("[] ").partition("+")
        start, step = self.value(base.strip(), kind), np.array(int(offset or 0) % 2**64, np.uint64).astype(TYPES[kind])
        return lambda m: np.broadcast_to(start(m) + step, m.mask.shape)


def _each(function: Callable[..., Any]) -> Callable[..., Step]:
    """An instruction that computes its target from operands of its last part's type, lane by lane."""

    def make(kernel: Kernel, parts: list[str], target: str, *operands: str) -> Step:
        kind, number = parts[-1], kernel.registers[target]
        values = [kernel.value(operand, kind) for operand in operands]
        dtype = TYPES[kind]
        return lambda m: m.put(number, np.asarray(function(*(value(m) for value in values)), dtype))

    return make


def _mov(kernel: Kernel, parts: list[str], target: str, source: str) -> Step:
    if target.startswith("{"):  # parts of a register
        numbers, value = kernel.targets(target), kernel.value(source, parts[0])
        half = np.dtype(f"u{np.dtype(TYPES[parts[0]]).itemsize // len(numbers)}")

        def split(m: Warps) -> None:
            pieces = np.ascontiguousarray(np.broadcast_to(value(m), m.mask.shape))[..., None].view(half)
            for i, number in enumerate(numbers):
                m.put(number, np.ascontiguousarray(pieces[..., i]))

        return split
    return _each(lambda x: x)(kernel, parts, target, source)


def _mul(kernel: Kernel, parts: list[str], target: str, *operands: str) -> Step:
    kind, number = parts[-1], kernel.registers[target]
    a, b = (kernel.value(operand, kind) for operand in operands)
    if kind.startswith("f") or "lo" in parts:
        return _each(lambda x, y: x * y)(kernel, parts, target, *operands)
    wide = WIDER[kind]
    if "wide" in parts:
        return lambda m: m.put(number, a(m).astype(wide) * b(m).astype(wide))
    return lambda m: m.put(number, (a(m).astype(wide) * b(m).astype(wide) >> (4 * np.dtype(wide).itemsize)).astype(TYPES[kind]))


def _shift(left: bool) -> Callable[..., Step]:
    def make(kernel: Kernel, parts: list[str], target: str, source: str, by: str) -> Step:
        dtype, number = TYPES[parts[-1]], kernel.registers[target]
        value, amount, bits = kernel.value(source, parts[-1]), kernel.value(by, "u32"), 8 * np.dtype(TYPES[parts[-1]]).itemsize

        def shift(m: Warps) -> None:
            x, n = value(m), amount(m)
            least = np.minimum(n, bits - 1).astype(dtype)
            far = 0 if left or np.dtype(dtype).kind == "u" else x >> (bits - 1)
            m.put(number, np.asarray(np.where(n >= bits, far, x << least if left else x >> least), dtype))

        return shift

    return make


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.trunc(x.astype(np.float64) / y).astype(np.int64)  # exact for 32 bits


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def _setp(kernel: Kernel, parts: list[str], target: str, *operands: str) -> Step:
    compare, kind = parts
    a, b = (kernel.value(operand, kind) for operand in operands)
    number, holds = kernel.registers[target], COMPARISONS[compare]
    ordered = kind == "f32" and compare == "ne"  # which numpy says of NaNs, PTX does not
    return lambda m: m.put(number, np.asarray(holds(a(m), b(m)) & ~(np.isnan(a(m)) | np.isnan(b(m))) if ordered else holds(a(m), b(m))))


def _selp(kernel: Kernel, parts: list[str], target: str, first: str, second: str, predicate: str) -> Step:
    a, b, chooses, number = kernel.value(first, parts[0]), kernel.value(second, parts[0]), kernel.value(predicate, "pred"), kernel.registers[target]
    return lambda m: m.put(number, np.where(chooses(m), a(m), b(m)))


def _narrow(x: np.ndarray, kind: str) -> np.ndarray:
    """fp32 to the bits of bf16 or fp16, to the nearest, ties to even."""
    if kind == "f16x2":
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint32)


def _widen(pairs: np.ndarray, kind: str) -> list[np.ndarray]:
    """Low and high elements of registers, in fp32."""
    if kind == "bf16":
        return [(pairs << np.uint32(16)).view(np.float32), (pairs & np.uint32(0xFFFF0000)).view(np.float32)]
    return [(part & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float32) for part in (pairs, pairs >> np.uint32(16))]


def _cvt(kernel: Kernel, parts: list[str], target: str, *operands: str) -> Step:
    number, (to, source) = kernel.registers[target], parts[-2:]
    values = [kernel.value(operand, source) for operand in operands]
    if to in ("bf16x2", "f16x2"):
        return lambda m: m.put(number, _narrow(values[0](m), to) << np.uint32(16) | _narrow(values[1](m), to))
    return lambda m: m.put(number, values[0](m).astype(TYPES[to]))


def _bfi(kernel: Kernel, parts: list[str], target: str, *operands: str) -> Step:
    bits, into, at, count = (kernel.value(operand, "u32") for operand in operands)
    number = kernel.registers[target]

    def insert(m: Warps) -> None:
        mask = ((np.uint64(1) << count(m).astype(np.uint64)) - np.uint64(1)) << at(m).astype(np.uint64)
        m.put(number, (into(m) & ~mask | bits(m).astype(np.uint64) << at(m).astype(np.uint64) & mask).astype(np.uint32))

    return insert


def _ex2(x: np.ndarray) -> np.ndarray:
    y = np.exp2(x.astype(np.float64)).astype(np.float32)
    return np.where(np.abs(y) < np.finfo(np.float32).tiny, np.float32(0), y)


def _ld(kernel: Kernel, parts: list[str], target: str, source: str) -> Step:
    space, kind, numbers = parts[0], parts[-1], kernel.targets(target)
    at, dtype = kernel.address(source, "u32" if space == "shared" else "u64"), TYPES[kind]
    count = len(numbers) * np.dtype(dtype).itemsize // 4
    wider = f"{np.dtype(dtype).kind}{np.dtype(TYPES[kernel.kinds[numbers[0]]]).itemsize}"  # than what is loaded a register may be, but for floats

    def load(m: Warps) -> None:
        if space == "param":
            words = m.launch.parameters[(at(m)[..., None] // np.uint64(4)).astype(np.int64) + np.arange(count)]
        elif space == "shared":
            words = m.load_shared(at(m), count)
        else:
            words = np.zeros((*m.mask.shape, count), np.uint32)
            words[m.mask] = m.launch.memory.load(at(m)[m.mask], count)
        found = words.view(dtype).astype(wider)
        for i, number in enumerate(numbers):
            m.put(number, np.ascontiguousarray(found[..., i]))

    return load


def _st(kernel: Kernel, parts: list[str], target: str, source: str) -> Step:
    space, values = parts[0], kernel.values(source, parts[-1])
    at = kernel.address(target, "u32" if space == "shared" else "u64")

    def store(m: Warps) -> None:
        words = np.stack([np.broadcast_to(value(m), m.mask.shape) for value in values], -1).view(np.uint32)
        if space == "shared":
            m.store_shared(at(m), words)
        else:
            m.launch.memory.store(at(m)[m.mask], words[m.mask])

    return store


def _cp(kernel: Kernel, parts: list[str], *operands: str) -> Step:
    if "commit_group" in parts:
        def commit(m: Warps) -> None:
            m.groups = m.groups + m.mask
        return commit
    if "wait_group" in parts:
        return lambda m: m.wait(int(operands[0]))
    to, source, size = kernel.address(operands[0], "u32"), kernel.address(operands[1], "u64"), kernel.value(operands[3], "u32")
    if operands[2] != "16" or parts != ["async", "cg", "shared", "global"]:
        raise _unknown(f"cp.{'.'.join(parts)} of {operands[2]} bytes")
    return lambda m: m.copy(to(m), source(m), size(m))


def _ldmatrix(kernel: Kernel, parts: list[str], target: str, source: str) -> Step:
    """Lane l gives the address of row l % 8 of matrix l / 8 and gets, of matrix i, elements 2 (l % 4) and the next of row l / 4; with
    `trans`, of column l / 4."""
    if not {"sync", "aligned", "m8n8", "x4", "shared", "b16"} <= set(parts):
        raise _unknown(f"ldmatrix.{'.'.join(parts)}")
    numbers, at, turned = kernel.targets(target), kernel.address(source, "u32"), "trans" in parts
    lane = np.arange(WARP)

    def load(m: Warps) -> None:
        m.whole("ldmatrix")
        elements = m.load_shared(at(m), 4).view(np.uint16).reshape(-1, 4, 8, 8)
        if turned:
            elements = elements.transpose(0, 1, 3, 2)
        for i, number in enumerate(numbers):
            low, high = (elements[:, i, lane // 4, 2 * (lane % 4) + part].astype(np.uint32) for part in (0, 1))
            m.put(number, low | high << np.uint32(16))

    return load


# Places of a fragment's elements, by lane = 4 g + t, element and register: a (16 x 16), b (16 x 8), c (16 x 8).
_LANE = np.arange(WARP)
_G, _T = _LANE // 4, _LANE % 4
_A = np.stack([(_G + 8 * (i % 2)) * 16 + 2 * _T + part + 8 * (i // 2) for i in range(4) for part in (0, 1)])
_B = np.stack([(2 * _T + part + 8 * i) * 8 + _G for i in range(2) for part in (0, 1)])
_C = np.stack([(_G + 8 * (i // 2)) * 8 + 2 * _T + i % 2 for i in range(4)])


def _matrix(places: np.ndarray, elements: list[np.ndarray], rows: int, columns: int) -> np.ndarray:
    whole = np.empty((elements[0].shape[0], rows * columns), np.float64)
    for place, element in zip(places, elements, strict=True):
        whole[:, place] = element
    return whole.reshape(-1, rows, columns)


def _mma(kernel: Kernel, parts: list[str], d: str, a: str, b: str, c: str) -> Step:
    """d = a b + c in fp32, of which the order is the machine's own: here once at the end."""
    kind = parts[6]
    if parts not in (["sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32"],):
        raise _unknown(f"mma.{'.'.join(parts)}")
    numbers, left, right, sums = kernel.targets(d), kernel.values(a, "u32"), kernel.values(b, "u32"), kernel.values(c, "f32")

    def multiply(m: Warps) -> None:
        m.whole("mma")
        first, second = (_matrix(places, [x for one in values for x in _widen(one(m), kind)], 16, columns)
                         for places, values, columns in ((_A, left, 16), (_B, right, 8)))
        product = first @ second + _matrix(_C, [np.broadcast_to(one(m), m.mask.shape) for one in sums], 16, 8)
        product = product.reshape(len(product), -1).astype(np.float32)
        for number, place in zip(numbers, _C, strict=True):
            m.put(number, product[:, place])

    return multiply


def _shfl(kernel: Kernel, parts: list[str], target: str, source: str, by: str, clamp: str, members: str) -> Step:
    number, value, lanes = kernel.registers[target.partition("|")[0]], kernel.value(source, "u32"), kernel.value(by, "u32")
    within, all_lanes = kernel.value(clamp, "u32"), kernel.value(members, "u32")

    def exchange(m: Warps) -> None:
        m.whole("shfl")
        if ((within(m) != 31) & m.mask).any() or ((all_lanes(m) != 0xFFFFFFFF) & m.mask).any():
            raise _unknown("shfl within parts of a warp")
        other = m.lane ^ lanes(m) if parts[1] == "bfly" else np.broadcast_to(lanes(m), m.mask.shape)
        m.put(number, np.take_along_axis(np.broadcast_to(value(m), m.mask.shape), other.astype(np.int64), 1))

    return exchange


def _bra(kernel: Kernel, parts: list[str], label: str) -> Step:
    return lambda m: kernel.labels[label]


def _bar(kernel: Kernel, parts: list[str], number: str) -> Step:
    def wait(m: Warps) -> int:
        m.whole("bar.sync")
        m.waits = m.waits | m.mask
        return m.next

    return wait


def _ret(kernel: Kernel, parts: list[str]) -> Step:
    def end(m: Warps) -> int:
        m.ended = m.ended | m.mask
        return m.next

    return end


INSTRUCTIONS: dict[str, Callable[..., Step]] = {
    "mov": _mov, "cvta": lambda kernel, parts, *operands: _mov(kernel, parts[-1:], *operands),
    "add": _each(lambda x, y: x + y), "sub": _each(lambda x, y: x - y), "neg": _each(lambda x: -x), "mul": _mul,
    "mad": _each(lambda x, y, z: x * y + z), "div": _each(_quotient), "rem": _each(lambda x, y: x - y * _quotient(x, y)),
    # rounded twice, which differs from once in one of some 2^29
    "fma": _each(lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32)), "rcp": _each(lambda x: np.float32(1) / x), "ex2": _each(_ex2),
    "min": _each(np.fmin), "max": _each(np.fmax),
    "and": _each(np.bitwise_and), "or": _each(np.bitwise_or), "xor": _each(np.bitwise_xor), "not": _each(np.invert),
    "shl": _shift(True), "shr": _shift(False), "bfi": _bfi, "setp": _setp, "selp": _selp, "cvt": _cvt,
    "ld": _ld, "st": _st, "cp": _cp, "ldmatrix": _ldmatrix, "mma": _mma, "shfl": _shfl, "bra": _bra, "bar": _bar, "ret": _ret,
}


def kernels(module: str) -> dict[str, Kernel]:
    """Those of a PTX module, by name."""
    module = re.sub(r"//.*", "", module)
    entry = r"\.entry\s+(\w+)\(\s*\.param\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]\s*\)(.*?)\n\{(.*?)\n\}"
    found = re.findall(entry, module, re.DOTALL)
    assert len(found) == module.count(".entry"), "expected kernels with one struct as parameter"
    return {name: Kernel(name, int(size), int(re.search(r"\.maxntid\s+(\d+)", head)[1]), body) for name, size, head, body in found}


# ---- Host code -----------------------------------------------------------------------------------------------------------

# CUDA's runtime as far as kernels are launched by it; each launch is `on_launch`'s. Like CUDA's it keeps an error until it is asked for.
RUNTIME = r"""
#include <cstddef>
#include <map>
#include <string>

struct Dim3 { unsigned x, y, z; };
struct Function { std::string name; size_t shared = 48 * 1024; };
static std::map<const void *, Function> &functions() { static std::map<const void *, Function> all; return all; }
static struct { Dim3 grid, block; size_t shared; void *stream; } configured;

extern "C" {
int last = 0, refused = 0;  // what cudaFuncSetAttribute is to fail with
int (*on_launch)(const char *name, unsigned x, unsigned y, unsigned threads, size_t shared, const void *parameters) = nullptr;

void **__cudaRegisterFatBinary(void *) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
char __cudaInitModule(void **) { return 0; }
void __cudaRegisterFunction(void **, const void *host, char *, const char *name, int, void *, void *, void *, void *, int *) { functions()[host].name = name; }
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void *stream) { configured = {grid, block, shared, stream}; return 0; }
int __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, void **stream) {
    *grid = configured.grid, *block = configured.block, *shared = configured.shared, *stream = configured.stream;
    return 0;
}
int cudaFuncSetAttribute(const void *host, int attribute, int value) {
    if (refused || attribute != 8) return last = refused ? refused : 1;  // cudaFuncAttributeMaxDynamicSharedMemorySize
    functions()[host].shared = value;
    return 0;
}
int cudaLaunchKernel(const void *host, Dim3 grid, Dim3 block, void **parameters, size_t shared, void *) {
    const Function &function = functions()[host];
    if (shared > function.shared || grid.y > 65535 || grid.z != 1 || block.y != 1 || block.z != 1) return last = 1;
    return last = on_launch(function.name.c_str(), grid.x, grid.y, block.x, shared, parameters[0]);
}
int __cudaGetKernel(const void **kernel, const void *host) { *kernel = host; return 0; }
int __cudaLaunchKernel(const void *kernel, Dim3 grid, Dim3 block, void **parameters, size_t shared, void *stream) {
    return cudaLaunchKernel(kernel, grid, block, parameters, shared, stream);
}
int cudaGetLastError() { const int told = last; last = 0; return told; }
int cudaPeekAtLastError() { return last; }
}
"""


class Compiled:
    """Sources compiled by nvcc, host code for this machine and kernels as PTX, which are run here when the host code launches them.

    Args:
        folder: where to work.
        sources: .cu and .cpp files.
        architecture: the oldest compute capability that the PTX is for, as 80.
    """

    def __init__(self, folder: Path, sources: Sequence[Path], architecture: int = 80) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runtime.cpp").write_text(RUNTIME)
        options = ["-std=c++17", "-gencode", f"arch=compute_{architecture},code=compute_{architecture}", "--keep", "-shared", "-Xcompiler", "-fPIC"]
        alone = ["--cudart=none", "-Xlinker", "-Bsymbolic"]  # torch may have loaded the real runtime
        done = subprocess.run(["nvcc", *options, *alone, "-o", "it.so", "runtime.cpp", *sources], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.kernels: dict[str, Kernel] = {}
        for module in folder.glob("*.ptx"):
            self.kernels |= kernels(module.read_text())
        self.library = ctypes.CDLL(str(folder / "it.so"))
        self._on_launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint] * 3, ctypes.c_size_t, ctypes.c_void_p)(self._launch)
        ctypes.c_void_p.in_dll(self.library, "on_launch").value = ctypes.cast(self._on_launch, ctypes.c_void_p).value

    def call(self, name: str, *arguments: Any, tensors: Sequence[torch.Tensor], seed: int = 0) -> None:
        """Calls a function of the host code, with these tensors as all of the GPU's memory."""
        self.memory, self.seed, self.error = Memory(tensors), seed, None
        found = self.library[name](*arguments)
        if self.error:
            raise self.error
        assert found == 0, f"{name}: CUDA error {found}"

    def _launch(self, name: bytes, x: int, y: int, threads: int, shared: int, parameters: int) -> int:
        try:
            kernel = self.kernels[name.decode()]
            Launch(kernel, (x, y), threads, shared, ctypes.string_at(parameters, kernel.parameter_bytes), self.memory).run(self.seed)
        except Exception as error:  # which C does not pass on
            self.error = error
            return 719  # cudaErrorLaunchFailure
        return 0


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
