"""What a compiled program tells of itself without a GPU: read from XLA's and ptxas's texts, judged, and laid out.

Standard library alone, so that the judgement itself is tested everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_ALL_REDUCES_PER_LAYER = 2
OTHER_ALL_REDUCES = 1  # for the embedding
# Kernels that XLA writes, by the beginning of their names, and the bytes that each may spill. Its sort (for the most
# likely tokens, where a request wants log-probabilities) keeps one register too many on sm_90; nothing here tunes it.
ACCEPTED_SPILLS = {"sort": 8}

# Kernels whose loops must load ahead, by the beginning of their names: what waits for all its loads overlaps none.
LOADS_AHEAD = ("decode_attention", "prefill_attention", "grouped_linear")

# What may name an array as large as the pool without touching every byte of it.
_IN_PLACE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "reshape", "optimization-barrier"),
    *("scatter", "dynamic-update-slice", "fusion", "custom-call", "while", "call", "conditional"),
}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b[a-z]+\d*\w*\[([\d,]*)\]")
_PTXAS_KERNEL = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_STATIC_SHARED = re.compile(r"(\d+) bytes smem")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
_WAIT = re.compile(r"cp\.async\.wait_group\s+(\d+);")
_THUNK = re.compile(r"^\s*\d+: k(\w+)", re.MULTILINE)
_LAUNCH = re.compile(r"(\S+) grid: \[[^]]*\] threads: \[[^]]*\] +shared_memory: (\d+) bytes")


class Target(NamedTuple):
    """A kind of GPU, from its description in XLA's text format."""

    name: str
    architecture: str  # sm_80
    memory_bytes: int
    shared_limit: int  # bytes that a block of threads can have


class Kernel(NamedTuple):
    """One kernel as ptxas compiled it."""

    name: str
    registers: int
    spill_bytes: int  # stores and loads
    shared_bytes: int
    ahead: int | None = None  # groups of loads that its loops leave under way; None where none loads asynchronously

    @property
    def must_load_ahead(self) -> bool:
        """Whether it is one of ours whose loop loads; what is known by its launch alone tells nothing."""
        return bool(self.registers) and self.name.startswith(LOADS_AHEAD)


@dataclass(frozen=True, slots=True)
class Program:
    """One executable on one target. Bytes are those of one device."""

    jax: str
    target: str
    model: str
    what: str
    num_layers: int
    num_devices: int
    compile_s: float
    memory_bytes: int  # of the device
    shared_limit: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    pool_bytes: int  # that must be aliased: 0 where the pool is only read, or absent
    all_reduces: int
    pool_copies: tuple[str, ...]  # instructions
    kernels: tuple[Kernel, ...]
    launches: int = 0  # kernels and copies that XLA lists, a loop's body once
    loops: int = 0  # among them: a loop's small kernels are launched one by one, again and again

    @property
    def peak_bytes(self) -> int:
        """Arguments, results and temporaries, those in one place counted once."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def read_target(name: str, text: str) -> Target:
    """The limits in a GPU's description. ValueError where one is absent."""

    def field(key: str) -> int:
        found = re.search(rf"\b{key}: (\d+)", text)
        if found is None:
            raise ValueError(f"target {name}: the description has no {key}")
        return int(found[1])

    architecture = f"sm_{field('major')}{field('minor')}"
    return Target(name, architecture, field("device_memory_size"), field("shared_memory_per_block_optin"))


def pool_copies(hlo: str, pool_elements: int) -> tuple[str, ...]:
    """Instructions whose result has as many elements as the pool's K and that write all of it anew."""
    found = []
    for line in hlo.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        opcode = _OPCODE.search(match[2])
        if opcode is None or opcode[1].removesuffix("-done") in _IN_PLACE:
            continue
        sizes = [math.prod(map(int, dims.split(","))) for dims in _ARRAY.findall(match[2][: opcode.start(1)]) if dims]
        if max(sizes, default=0) >= pool_elements:
            found.append(f"{opcode[1]} {match[1]}")
    return tuple(found)


def count_all_reduces(hlo: str) -> int:
    """All-reduces in a program's text, each started once."""
    return len(re.findall(r" all-reduce(?:-start)?\(", hlo))


def loads_ahead(ptx: str) -> dict[str, int]:
    """Groups of asynchronous loads that the loops of each kernel leave under way where they wait, the least of them.

    Of a kernel whose loops are unrolled, all waits count but the last. One that never waits so is absent.
    """
    parts = _ENTRY.split(ptx)[1:]
    found = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        lines, labels, waits = text.splitlines(), dict[str, int](), list[int]()
        for number, line in enumerate(lines):
            if label := _LABEL.match(line):
                labels[label[1]] = number
            branch = _BRANCH.search(line)
            if branch and branch[1] in labels:  # backwards: a loop's end
                waits += [int(groups) for groups in _WAIT.findall("\n".join(lines[labels[branch[1]] : number]))]
        waits = waits or [int(groups) for groups in _WAIT.findall(text)][:-1]
        if waits:
            found[name] = min(waits)
    return found


def count_launches(thunks: str) -> tuple[int, int]:
    """Kernels and copies in XLA's list of thunks, and loops."""
    kinds = _THUNK.findall(thunks)
    return len(kinds) - kinds.count("CommandBuffer") - kinds.count("While"), kinds.count("While")


def read_kernels(ptxas: str, launches: str, ahead: Mapping[str, int]) -> tuple[Kernel, ...]:
    """Kernels from what `ptxas -v` prints, for the shared memory given at launch from XLA's list of thunks, and from
    what `loads_ahead` found."""
    dynamic: dict[str, int] = {}
    for name, shared in _LAUNCH.findall(launches):
        dynamic[name] = max(dynamic.get(name, 0), int(shared))
    kernels = []
    parts = _PTXAS_KERNEL.split(ptxas)[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        registers, spills = _REGISTERS.search(text), _SPILLS.search(text)
        if registers is None or spills is None:
            raise ValueError(f"kernel {name}: ptxas tells no registers or spills: {text.strip()!r}")
        static = _STATIC_SHARED.search(text)
        shared = dynamic.pop(name, 0) + (int(static[1]) if static else 0)
        kernels.append(Kernel(name, int(registers[1]), int(spills[1]) + int(spills[2]), shared, ahead.get(name)))
    # A kernel that several fusions share has one entry in ptxas; the other names are known by their launches alone.
    kernels += [Kernel(name, 0, 0, shared) for name, shared in dynamic.items() if shared]
    return tuple(kernels)


def accepted_spill(name: str) -> int:
    """Bytes that a kernel of this name may spill."""
    return max((size for start, size in ACCEPTED_SPILLS.items() if name.startswith(start)), default=0)


def faults(program: Program) -> list[str]:
    """What keeps a program from being served on its target, in words."""
    found = [f"writes the KV pool anew: {copy}" for copy in program.pool_copies]
    if program.alias_bytes < program.pool_bytes:
        missing = program.pool_bytes - program.alias_bytes
        found.append(f"{missing:,} of the KV pool's {program.pool_bytes:,} bytes are not aliased")
    if not any(kernel.registers for kernel in program.kernels):
        found.append("no kernel's registers were read: this jax hides them, so spills would not show")
    for kernel in program.kernels:
        if kernel.spill_bytes > accepted_spill(kernel.name):
            found.append(f"{kernel.name} spills {kernel.spill_bytes} bytes of registers")
        if kernel.shared_bytes > program.shared_limit:
            found.append(
                f"{kernel.name} takes {kernel.shared_bytes:,} bytes of shared memory of {program.shared_limit:,}"
            )
        if kernel.must_load_ahead and not kernel.ahead:
            found.append(f"{kernel.name} waits for all its loads, so none is under way while it computes")
    if program.loops and program.what.startswith("step") and program.what.endswith("pallas"):
        found.append(f"{program.loops} loops: each of their small kernels is launched by itself")
    most = MAX_ALL_REDUCES_PER_LAYER * program.num_layers + OTHER_ALL_REDUCES
    if program.num_devices > 1 and program.all_reduces > most:
        found.append(f"{program.all_reduces} all-reduces: expected at most {most}")
    if program.peak_bytes > program.memory_bytes:
        found.append(f"takes {program.peak_bytes:,} bytes of the device's {program.memory_bytes:,}")
    where = f"jax {program.jax}, {program.target} x{program.num_devices}, {program.model}, {program.what}"
    return [f"{where}: {fault}" for fault in found]


def table(programs: Iterable[Program]) -> str:
    """A Markdown table, one line for each program."""
    heads = (
        "jax", "target", "model", "layers", "program", "kernels", "launches", "most registers", "spills", "most shared",
        "loads ahead", "pool", "alias", "temp", "peak", "pool copies", "all-reduces", "compile",
    )  # fmt: skip
    rows = [heads, ("---",) * len(heads), *(_row(program) for program in programs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(program: Program) -> Sequence[str]:
    kernels = program.kernels
    most = max(kernels, key=lambda kernel: kernel.registers, default=None)
    shared = max((kernel.shared_bytes for kernel in kernels), default=0)
    ahead = [kernel.ahead for kernel in kernels if kernel.must_load_ahead and kernel.ahead is not None]
    return (
        program.jax,
        program.target if program.num_devices == 1 else f"{program.num_devices} x {program.target}",
        program.model,
        str(program.num_layers),
        program.what,
        str(len(kernels)),
        f"{program.launches:,}",
        f"{most.registers} ({most.name})" if most else "-",
        str(sum(kernel.spill_bytes for kernel in kernels)),
        f"{shared:,}",
        str(min(ahead)) if ahead else "-",
        *(_mib(size) for size in (program.pool_bytes, program.alias_bytes, program.temp_bytes, program.peak_bytes)),
        str(len(program.pool_copies)),
        str(program.all_reduces),
        f"{program.compile_s:.1f} s",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
