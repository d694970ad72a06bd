"""What a compiled program launches on a GPU: read off the program, and off the trace of a run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import jax

#: HLO instructions that are no kernel of their own.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call"),
    *("opt-barrier", "partition-id", "replica-id", "copy-done", "async-done", "async-update", "get-dimension-size"),
}
#: What XLA's kinds of fusions are.
_FUSIONS = {"Loop": "elementwise", "Input": "reduction", "Custom": "slice or library"}
#: What our kernels are, by how their names begin.
_OURS = {"loop": "loop in one kernel", "step": "part of a step"}
_NO_KERNELS = ("Sharding", "AllocateBuffer", "annotate")
#: Bytes of one entry of an array.
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*?[\]\})]) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel: its kind, the operation that it came from, bytes that it writes; of loops in one kernel and steps in
    few, also the bytes of weights that each multiprocessor reads."""

    kind: str
    source: str
    written: int
    read: int = 0


@dataclasses.dataclass(frozen=True)
class Loop:
    """What is launched in each of `times` trips; the program outside of all loops is one of a single trip."""

    name: str
    times: int
    launches: tuple[Launch, ...]

    @property
    def total(self) -> int:
        return self.times * len(self.launches)

    @property
    def title(self) -> str:
        return f"{self.times} x {len(self.launches)}, {self.name}"


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a module's text, by name; that of the program itself as ENTRY too."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = found[head[1]] = []
            if line.startswith("ENTRY"):
                found["ENTRY"] = lines
        elif line.startswith("  "):
            lines.append(line.strip())
    return found


def loops(text: str) -> list[Loop]:
    """Every loop of a compiled module with all of its launches, those with the most first."""
    parts = computations(text)

    def walk(name: str, times: int, label: str) -> Iterator[Loop]:
        own: list[Launch] = []

        def read(name: str) -> Iterator[Loop]:
            for line in parts[name]:
                matched = _LINE.match(line)
                if matched is None:
                    continue
                _, shape, operation, rest = matched.groups()
                if operation == "while":
                    trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                    body = re.search(r"body=%?([\w.\-]+)", rest)
                    assert body is not None
                    yield from walk(body[1], times * int(trips[1] if trips else 1), _title(_source(rest)))
                elif operation in ("call", "conditional", "async-start"):
                    for inner in re.findall(r"%?([\w.\-]+)", rest):
                        if inner in parts:
                            yield from read(inner)
                elif operation not in _FREE and (kind := _kind(operation, rest)):
                    own.append(Launch(kind, _source(rest), _size(shape), _read(rest)))

        inner = list(read(name))
        yield Loop(label, times, tuple(own))
        yield from inner

    return sorted(walk("ENTRY", 1, "outside of loops"), key=lambda loop: -loop.total)


def _kind(operation: str, rest: str) -> str:
    """What a kernel is: a product, a reduction, ...; empty for an instruction that is none."""
    if operation == "fusion":
        kind = re.search(r"kind=k(\w+)", rest)
        if "triton" in rest:
            return "product (Triton)" if "gemm" in rest else "reduction (Triton)"
        return _FUSIONS.get(kind[1] if kind else "", "fusion")
    if operation == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        name = target[1] if target else "custom call"
        if any(word in name for word in _NO_KERNELS):
            return ""
        own = re.search(r'name = "(loop|step)_\d', rest)
        return _OURS[own[1]] if own else "product (library)" if "cublas" in name else name
    return "copy" if operation in ("copy", "copy-start", "transpose") else operation


def _source(rest: str) -> str:
    label = re.search(r'op_name="([^"]*)"', rest)
    return label[1] if label else ""


def _read(rest: str) -> int:
    """Bytes of weights that a multiprocessor reads, after which `one_kernel` and `few_kernels` name their kernels."""
    found = re.search(r'name = "(?:loop|step)_(\d+)(?:_(\d+))?"', rest)
    return int(found[1]) * int(found[2] or 1) if found else 0


def _title(source: str) -> str:
    """The name of a loop, from that of its operation: the scope that `scans` gives it."""
    scope = re.search(r"(backward )?loop of ([\w.]+)", source)
    return scope[0].replace("loop of ", "") if scope else "a loop"


def _size(shape: str) -> int:
    """Bytes of a shape as HLO writes it."""
    total = 0
    for kind, dims in _SHAPE.findall(shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += count * _BYTES.get(kind, 4)
    return total


def launched(trace: Path) -> int:
    """Kernels and copies that ran on GPUs while `jax.profiler.trace` wrote to this folder."""
    return sum(
        len(list(line.events))
        for file in trace.rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
    )
