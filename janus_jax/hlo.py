"""What a compiled program does, read off its HLO text: collectives, loops, memory traffic.

XLA's own cost analysis counts the body of a loop once and knows no slices, so the counting is done here:
the text is parsed into computations, and a walk from the entry follows calls, fusions and loops with the
number of times that each instruction runs.

What the text of GPU programs needs besides the obvious: a loop or a branch that data decide on is looked at
by the host, which waits for the device each time; products of a library list its scratch memory among their
results.

What the text of TPU programs needs besides the obvious:

  * a collective that is cut up to overlap with compute appears several times, all with one `chain_id`;
  * a reduce-scatter is written as a fusion of an all-reduce and a dynamic-slice of its result;
  * what crosses slices (the data-centre network) is not in replica groups: it is a `send` to the host whose
    attributes name the collective (`_xla_megascale_transfer_type`).

Room: pure core.  Imports nothing of ours, nor jax: text in, numbers out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
Groups = tuple[tuple[int, ...], ...]

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "send", "recv", "domain",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


class HloError(ValueError):
    """Text that is no HLO module, or an attribute in a form that is not known here."""


@dataclass(frozen=True)
class Shape:
    """One array: element type, axes, and the memory it is kept in (0 is the device's main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """How many entries."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Size, without padding by layout."""
        return self.elements * _bits(self.dtype) / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    attributes: str  # everything behind the operands
    literal: str = ""  # what stands in the brackets: of a constant its value
    root: bool = False

    @property
    def op_name(self) -> str:
        """Where in the program it comes from, such as "jit(train_step)/.../dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *keys: str) -> tuple[str, ...]:
        """Names of the computations under the attributes `keys`."""
        names: list[str] = []
        for key in keys:
            for one, several in re.findall(rf"\b{key}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.attributes):
                names.extend([one] if one else _NAME.findall(several))
        return tuple(names)


@dataclass(frozen=True)
class Module:
    """A program: its computations by name, and which one is run."""

    entry: str
    computations: Mapping[str, tuple[Instruction, ...]]


@dataclass(frozen=True)
class Visit:
    """An instruction on the walk."""

    instruction: Instruction
    computation: str
    times: float  # how often it runs in one run of the program
    loops: tuple[str, ...]  # the while instructions around it, outermost first
    fused: bool  # inside a fusion: its operands and result need not exist in memory


@dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    kind: str  # one of KINDS
    shapes: tuple[Shape, ...]  # what each device puts in
    group: int  # devices that take part together
    crosses: bool  # slices, hence the data-centre network
    times: float
    op_name: str
    result: tuple[Shape, ...] = ()
    transfer: bool = False  # a transfer through the host: of what is left after reducing within a slice

    @property
    def bytes(self) -> float:
        """Bytes that one device sends each time, by the algorithm that sends least (a ring).

        With n bytes put in by each of g devices: all-gather n (g - 1), all-reduce 2 n (g - 1) / g,
        reduce-scatter and all-to-all n (g - 1) / g, collective-permute n.
        """
        n, g = sum(s.bytes for s in self.shapes), self.group
        share = (g - 1) / g
        return (
            n
            * {
                "all-gather": g - 1,
                "all-reduce": 2 * share,
                "reduce-scatter": share,
                "all-to-all": share,
                "collective-permute": 1,
            }[self.kind]
        )


@dataclass(frozen=True)
class Launches:
    """What a GPU's host has to do in one run of a program, beside starting it."""

    kernels: float  # that it hands over; copies on the device and library calls count as one each
    waits: float  # for the device, to see whether a loop goes on or which branch is taken


@dataclass
class Counts:
    """How often loops run whose count the program itself decides, and which of them nobody knew."""

    expected: Mapping[str, float] = field(default_factory=dict)  # part of an op_name -> times; first match
    unknown: set[str] = field(default_factory=set)  # op_names of loops that were counted once


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`.

    Raises:
      HloError: no computation is marked as the entry.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name = "", ""
    lines: list[Instruction] = []
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}") and line.endswith("{"):
            head = line.removeprefix("ENTRY ")
            name, lines = head.lstrip("%").split(" ", 1)[0].split("(", 1)[0], []
            if line.startswith("ENTRY "):
                entry = name
        elif line.startswith("}"):
            computations[name] = tuple(lines)
        elif " = " in line and line[:1] == " ":
            lines.append(_instruction(line.strip()))
    if entry not in computations:
        raise HloError("this is no HLO module: it has no entry computation")
    return Module(entry, computations)


def replica_groups(attributes: str) -> Groups:
    """The groups of devices of a collective, from its attributes.

    Three forms are in use: `{{0,1},{2,3}}`, the iota form `[2,4]<=[4,2]T(1,0)` (numbers 0 to 7 laid out as
    [4, 2], axes transposed, cut into 2 groups of 4), and the mesh form
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}` (one group along the named axes of that mesh).

    Returns:
      The groups; () where the attribute is empty or absent, which means all devices together.

    Raises:
      HloError: another form.
    """
    found = re.search(r"\breplica_groups=(.*)", attributes)
    text = found[1] if found else "{}"
    if text.startswith("{}"):
        return ()
    if explicit := re.match(r"\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", text):
        return tuple(_ints(g) for g in re.findall(r"\{([\d,]*)\}", explicit[1]))
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]*)\))?", text):
        return _cut(_laid_out(_ints(iota[2]), _ints(iota[3] or "")), _ints(iota[1])[-1])
    if mesh := re.match(r"mesh\[[^\]]*\][^{]*\{[^}]*\}", text):
        return _mesh_groups(mesh[0])
    raise HloError(f"replica groups of an unknown form: {text[:80]}")


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a while runs, where the program text tells; None where it depends on data.

    XLA writes it into the backend's configuration, or the condition compares the counter to a constant
    (the counters of jax's scan and fori_loop begin at 0 and go up by one).
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations.get(next(iter(loop.called("condition")), ""), ())
    by_name = {i.name: i for i in condition}
    for instruction in condition:
        if instruction.root and instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            bound = by_name.get(instruction.operands[1])
            if bound and bound.opcode == "constant" and bound.literal.isdigit():
                return int(bound.literal)
    return None


def walk(module: Module, counts: Counts) -> Iterator[Visit]:
    """Every instruction that runs, with how often.  Of a conditional all branches count."""

    def visit(name: str, times: float, loops: tuple[str, ...], fused: bool) -> Iterator[Visit]:
        for instruction in module.computations.get(name, ()):
            yield Visit(instruction, name, times, loops, fused)
            if instruction.opcode == "while":
                (body,) = instruction.called("body")
                trips = _trips(module, instruction, counts)
                yield from visit(body, times * trips, (*loops, instruction.name), fused)
            elif instruction.opcode == "conditional":
                for branch in instruction.called(*_BRANCHES):
                    yield from visit(branch, times, loops, fused)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                inside = fused or instruction.opcode == "fusion"
                for called in instruction.called("calls", "to_apply"):
                    yield from visit(called, times, loops, inside)

    return visit(module.entry, 1.0, (), False)


def collectives(
    module: Module, counts: Counts, *, devices: int, slice_of: Sequence[int] | None = None
) -> list[Collective]:
    """Everything that devices exchange in one run.

    Args:
      module: the program of one device.
      counts: for loops that depend on data.
      devices: how many run it.
      slice_of: the slice of each device, in the order of the mesh; None means that there is one slice.
    """
    found: list[Collective] = []
    seen: set[tuple[object, ...]] = set()
    shapes = {c: {i.name: i.shapes for i in lines} for c, lines in module.computations.items()}
    slices = len(set(slice_of or (0,)))
    for v in walk(module, counts):
        i = v.instruction
        kind = _kind(module, v)
        if kind is None:
            continue
        if chain := re.search(r'chain_id="(\d+)"', i.attributes):
            key = (v.loops, kind, chain[1], i.shapes[-1].dims)
            if key in seen:
                continue
            seen.add(key)
        into = tuple(
            s for name in i.operands for s in shapes[v.computation].get(name, ()) if s.dtype != "token"
        )
        if i.opcode == "send":
            found.append(
                Collective(kind, into, max(slices, 2), True, v.times, i.op_name, into, transfer=True)
            )
            continue
        groups = replica_groups(i.attributes)
        group = len(groups[0]) if groups else devices
        if kind == "collective-permute":
            group, groups = 2, _pairs(i.attributes)
        crosses = (
            slices > 1 and slice_of is not None and len(slice_of) > 1 and _crosses(groups, slice_of, devices)
        )
        found.append(Collective(kind, into, group, crosses, v.times, i.op_name, i.shapes))
    return [c for c in found if c.group > 1]


def launches(module: Module, counts: Counts, more: int = 0) -> Launches:
    """Kernels of a program for GPUs, and how often its host waits.  Of a conditional, the dearest branch.

    With `more`, so many turns more of each loop that lies in no other one.
    """

    def of(name: str) -> Launches:
        parts: list[tuple[float, Launches]] = []  # how often, and what
        for i in module.computations.get(name, ()):
            if i.opcode == "while":
                (body,), (condition,) = i.called("body"), i.called("condition")
                times = _trips(module, i, counts) + (more if name == module.entry else 0)
                parts.append((times, of(body)))
                if trip_count(module, i) is None:
                    parts.append((times + 1, Launches(of(condition).kernels, waits=1)))
            elif i.opcode == "conditional":
                branches = [of(branch) for branch in i.called(*_BRANCHES)]
                dearest = max(x.kernels for x in branches), max(x.waits for x in branches)
                parts += [(1, Launches(*dearest)), (1, Launches(kernels=0, waits=1))]
            elif i.opcode in ("call", "async-start"):
                parts += [(1, of(called)) for called in i.called("calls", "to_apply")]
            elif i.opcode not in _FREE and not i.opcode.endswith("-done"):
                parts.append((1, Launches(kernels=1, waits=0)))
        return Launches(sum(n * x.kernels for n, x in parts), sum(n * x.waits for n, x in parts))

    return of(module.entry)


def memory_bytes(module: Module, counts: Counts) -> float:
    """Bytes read from and written to main memory in one run, as far as the text tells.

    Operands and results of everything outside fusions; of an operand that a fusion only slices, the slice,
    and of one that it updates in place, the update.  Buffers in on-chip memory (space above 0) are free.
    """
    total = 0.0
    used: dict[str, FusionUse] = {}
    shapes = {c: {i.name: i.shapes for i in lines} for c, lines in module.computations.items()}
    for v in walk(module, counts):
        i = v.instruction
        if v.fused or i.opcode in _FREE or i.opcode.endswith("-done"):
            continue
        here = shapes[v.computation]
        reads = [_main(here.get(name, ())) for name in i.operands]
        writes = _main(i.shapes)
        if i.opcode in _SLICES:
            reads[:1] = [min(reads[0], _main(i.shapes))] if reads else []
        elif i.opcode == "dynamic-update-slice":
            update = reads[1] if len(reads) > 1 else 0.0
            reads, writes = [update], update
        elif i.opcode == "copy-start":
            writes = _main(i.shapes[:1])
        elif i.opcode == "custom-call" and "__cublas" in i.attributes:
            writes = _main([s for s in i.shapes if s.dtype != "s8"])  # less its scratch memory
        elif i.opcode == "fusion" and (called := i.called("calls")):
            partly, written = _fusion_use(module, called[0], used)
            reads = [min(size, partly.get(n, size)) for n, size in enumerate(reads)]
            writes = writes if written is None else min(writes, written)
        total += v.times * (sum(reads) + writes)
    return total


def logits_moved(found: Sequence[Collective], vocab_size: int, dim: int) -> list[Collective]:
    """Those exchanges that move something as large as vocabulary x slots: what a sharded loss never needs.

    An array has the largest prime factor of `vocab_size` in its size only if one of its axes is (a share of)
    the vocabulary; it is a table of parameters, or its gradient, if it divides vocab_size x dim.  So choose
    sizes for the check such that numbers of slots do not divide `dim`, and a vocabulary with a prime factor
    that no other axis has.
    """
    prime = _largest_prime(vocab_size)

    def suspect(shape: Shape) -> bool:
        n = shape.elements
        return n > vocab_size and n % prime == 0 and vocab_size * dim % n != 0

    return [c for c in found if any(suspect(s) for s in (*c.shapes, *c.result))]


# -- reading one line ---------------------------------------------------------------------------


def _instruction(line: str) -> Instruction:
    line = _COMMENT.sub("", line)
    head, rest = line.split(" = ", 1)
    root = head.startswith("ROOT ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, tail = rest.partition("(")
    close = _closing(rest, len(opcode)) if tail else len(rest)
    inner = rest[len(opcode) + 1 : close]
    return Instruction(
        name=head.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        shapes=_shapes(kind),
        operands=tuple(_NAME.findall(inner)),
        attributes=rest[close + 1 :],
        literal="" if "%" in inner else inner,
        root=root,
    )


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Shape(dtype, _ints(dims), int(space[1]) if space else 0))
    return tuple(found)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x)


# -- groups -------------------------------------------------------------------------------------


def _laid_out(dims: Sequence[int], axes: Sequence[int]) -> list[int]:
    """0, 1, ... laid out as `dims`, axes permuted by `axes`, read in order."""
    axes = axes or range(len(dims))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    ranges = [range(dims[a]) for a in axes]
    return [sum(i * strides[a] for i, a in zip(at, axes, strict=True)) for at in itertools.product(*ranges)]


def _cut(order: Sequence[int], size: int) -> Groups:
    return tuple(tuple(order[i : i + size]) for i in range(0, len(order), size))


def _mesh_groups(text: str) -> Groups:
    sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", text.split("]", 1)[0])}
    along = re.findall(r"'([^']+)'", text[text.rindex("{") :])
    names = list(sizes)
    ids = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]*)\))?\)", text)
    listed = re.search(r"device_ids=\(([\d,]+)\)", text)
    if ids:
        order = _laid_out(_ints(ids[1]), _ints(ids[2] or ""))
    elif listed:
        order = list(_ints(listed[1]))
    else:
        order = list(range(math.prod(sizes.values())))
    # Put the named axes last, so that a group is a run.
    axes = [i for i, n in enumerate(names) if n not in along] + [names.index(n) for n in along]
    places = _laid_out(list(sizes.values()), axes)
    return _cut([order[p] for p in places], math.prod(sizes[n] for n in along))


def _pairs(attributes: str) -> Groups:
    found = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    return tuple(_ints(p) for p in re.findall(r"\{([\d,]+)\}", found[1])) if found else ()  # type: ignore[misc]


def _crosses(groups: Groups, slice_of: Sequence[int], devices: int) -> bool:
    if len(slice_of) < devices:
        return False
    every = groups or (tuple(range(devices)),)
    return any(len({slice_of[d] for d in group if d < len(slice_of)}) > 1 for group in every)


def _kind(module: Module, v: Visit) -> str | None:
    """Which collective this instruction is, if any; of a pair of start and done, the start."""
    i = v.instruction
    if i.opcode == "send":
        found = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', i.attributes)
        kind = found[1].lower().replace("_", "-") if found else ""
        return kind if kind in KINDS else ("collective-permute" if "megascale" in i.attributes else None)
    kind = i.opcode.removesuffix("-start").replace("ragged-all-to-all", "all-to-all")
    if kind not in KINDS:
        return None
    if kind == "all-reduce" and v.fused:
        users = [u for u in module.computations[v.computation] if i.name in u.operands[:1]]
        if any(u.opcode == "dynamic-slice" for u in users):
            return "reduce-scatter"
    return kind


# -- counting -----------------------------------------------------------------------------------


def _trips(module: Module, loop: Instruction, counts: Counts) -> float:
    known = trip_count(module, loop)
    if known is not None:
        return known
    name = loop.op_name or next(
        (i.op_name for body in loop.called("body") for i in module.computations[body] if i.op_name), ""
    )
    for part, times in counts.expected.items():
        if part in name:
            return times
    counts.unknown.add(name or loop.name)
    return 1


def _main(shapes: Sequence[Shape]) -> float:
    return sum(s.bytes for s in shapes if s.space == 0)


FusionUse = tuple[dict[int, float], float | None]


def _fusion_use(module: Module, computation: str, known: dict[str, FusionUse]) -> FusionUse:
    """Of a fused computation: bytes read of each parameter that is only sliced, and bytes it writes.

    The second is None where the result is written whole.  `known` keeps what was found out before.
    """
    if computation in known:
        return known[computation]
    lines = module.computations.get(computation, ())
    by_name = {i.name: i for i in lines}
    users: dict[str, list[Instruction]] = {}
    for i in lines:
        for name in i.operands:
            users.setdefault(name, []).append(i)

    def uses(name: str) -> Iterator[tuple[str, Instruction]]:
        for user in users.get(name, ()):
            if user.opcode == "bitcast" or "output_to_operand_aliasing={{}: (0, {})}" in user.attributes:
                yield from uses(user.name)  # another view of the same memory
            else:
                yield name, user

    partly: dict[int, float] = {}
    for i in lines:
        if i.opcode != "parameter" or not i.literal.isdigit():
            continue
        size, whole = 0.0, False
        for name, user in uses(i.name):
            if user.opcode in _SLICES and user.operands[0] == name:
                size += sum(s.bytes for s in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                size += 0.0  # in place
            elif user.opcode == "fusion":  # a fusion in a fusion
                inner, _ = _fusion_use(module, next(iter(user.called("calls")), ""), known)
                places = [n for n, operand in enumerate(user.operands) if operand == name]
                whole |= not all(n in inner for n in places)
                size += sum(inner.get(n, 0.0) for n in places)
            else:
                whole = True
        if not whole:
            partly[int(i.literal)] = size
    written: float | None = None
    for root in (i for i in lines if i.root):
        parts = [by_name[n] for n in root.operands if n in by_name] if root.opcode == "tuple" else [root]
        sizes, found = 0.0, False
        for part in parts:
            while part.opcode == "bitcast" and part.operands and part.operands[0] in by_name:
                part = by_name[part.operands[0]]
            if part.opcode == "dynamic-update-slice" and part.operands[1] in by_name:
                sizes, found = sizes + sum(s.bytes for s in by_name[part.operands[1]].shapes), True
            else:
                sizes += _main(part.shapes)
        written = sizes if found else None
    known[computation] = partly, written
    return partly, written


def _largest_prime(n: int) -> int:
    factor, largest = 2, 1
    while factor * factor <= n:
        while n % factor == 0:
            largest, n = factor, n // factor
        factor += 1
    return max(largest, n)
