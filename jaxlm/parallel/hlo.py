"""XLA's text of a compiled program, read far enough to say what runs, how often, and beside what."""

import re
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_END = re.compile(r"^\}(,|\s*$)")
"""Of a computation; text that a kernel brings along may begin lines with other braces."""
_CALLED = re.compile(
    r"\b(to_apply|body|condition|calls|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FORWARDS = ("bitcast", "copy", "convert", "copy-done", "copy-start")
"""Operations whose value is that of their operand."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line: `name = result opcode(operands), rest`."""

    name: str
    result: str
    """Its type: `f32[8,128]{1,0}`, or several in parentheses."""
    opcode: str
    operands: tuple[str, ...]
    """Names of other instructions of the computation."""
    literal: str
    """What stands in the parentheses."""
    rest: str

    def called(self, *roles: str) -> list[str]:
        """Computations it names, of those `roles` (`body`, `calls`, ...) or all."""
        found = [(role, one or several) for role, one, several in _CALLED.findall(self.rest)]
        chosen = [names for role, names in found if not roles or role in roles]
        return [name.strip().removeprefix("%") for names in chosen for name in names.split(",")]

    def element(self) -> int:
        """Which one a get-tuple-element takes."""
        return int(re.findall(r"\bindex=(\d+)", self.rest)[0])


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order in which they run where the program is scheduled."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    root: str = ""


@dataclass(frozen=True)
class Program:
    """All computations by name."""

    computations: dict[str, Computation]
    entry: str

    def executions(self) -> dict[str, int]:
        """How often each computation runs in one execution of the program.

        Each branch of a conditional counts as taken, a loop whose turns cannot be told as turning once.
        """
        runs: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            runs[name] = runs.get(name, 0) + times
            computation = self.computations.get(name, Computation())
            for instruction in computation.instructions.values():
                called = instruction.called()
                turns = self._trips(computation, instruction) if instruction.opcode == "while" and called else 1
                for other in called:
                    visit(other, times * turns)

        visit(self.entry, 1)
        return runs

    def _trips(self, caller: Computation, loop: Instruction) -> int:
        """Turns of a loop: as the compiler states them, else counted by its condition `i < limit`."""
        stated = _TRIPS.search(loop.rest)
        if stated:
            return int(stated[1])
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        test = self._root(self.computations[condition])
        if test is None or test[1].opcode != "compare" or "direction=LT" not in test[1].rest:
            return 1
        place, limit = (self._source(test[0], operand) for operand in test[1].operands)
        if place[1].opcode != "get-tuple-element" or limit[1].opcode != "constant":
            return 1
        index = place[1].element()
        start = self._start(caller, loop, index)
        return max(-(-(int(limit[1].literal) - start) // self._step(self.computations[body], index)), 1)

    def _start(self, caller: Computation, loop: Instruction, index: int) -> int:
        """The counter before the first turn; 0 where that cannot be told."""
        carried = self._source(caller, loop.operands[0])[1]
        if carried.opcode != "tuple":
            return 0
        value = self._source(caller, carried.operands[index])[1]
        return int(value.literal) if value.opcode == "constant" else 0

    def _step(self, body: Computation, index: int) -> int:
        """What a turn adds to the counter; 1 where that cannot be told."""
        carried = body.instructions[body.root]
        if carried.opcode != "tuple":
            return 1
        where, added = self._source(body, carried.operands[index], enter=True)
        if added.opcode != "add":
            return 1
        values = [self._source(where, operand)[1] for operand in added.operands]
        constants = [int(value.literal) for value in values if value.opcode == "constant"]
        return constants[0] if constants and constants[0] > 0 else 1

    def _root(self, computation: Computation) -> tuple[Computation, Instruction] | None:
        """The result's instruction, within a fusion if it is made there."""
        return self._source(computation, computation.root, enter=True) if computation.root else None

    def _source(self, computation: Computation, name: str, enter: bool = False) -> tuple[Computation, Instruction]:
        """The instruction that makes a value, past copies, and into fusions where asked."""
        instruction = computation.instructions[name]
        if instruction.opcode in _FORWARDS and instruction.operands:
            return self._source(computation, instruction.operands[0], enter)
        if enter and instruction.opcode == "fusion":
            inner = self.computations[instruction.called("calls")[0]]
            outer = [self._source(computation, operand)[1] for operand in instruction.operands]
            bound = dict(zip(inner.parameters, outer, strict=False))
            # A parameter stands for what was passed.
            return self._source(Computation(inner.instructions | bound, inner.parameters, inner.root), inner.root, True)
        return computation, instruction


def parse(text: str) -> Program:
    """Read `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    parameters: dict[int, str] = {}
    entry = name = root = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and " = " not in line.split("{")[0]:
            name, instructions, parameters, root = header[2], {}, {}, ""
            entry = name if header[1] else entry
            continue
        if name and _END.match(line):
            ordered = [parameters[i] for i in sorted(parameters)]
            computations[name] = Computation(instructions, ordered, root or next(reversed(instructions), ""))
            name = ""
            continue
        match = _INSTRUCTION.match(line)
        if not match or not name:
            continue
        literal, rest = _parentheses(line, match.end())
        instructions[match[2]] = Instruction(
            name=match[2],
            result=match[3],
            opcode=match[4],
            operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
            literal=literal,
            rest=rest,
        )
        root = match[2] if match[1] else root
        if match[4] == "parameter":
            parameters[int(literal)] = match[2]
    return Program(computations, entry)


def _parentheses(line: str, start: int) -> tuple[str, str]:
    """What stands between the parenthesis that opens before `start` and its match, and what follows."""
    depth = 1
    for parenthesis in re.finditer(r"[()]", line[start:]):
        depth += 1 if parenthesis[0] == "(" else -1
        if not depth:
            return line[start : start + parenthesis.start()], line[start + parenthesis.end() :]
    return line[start:], ""
