"""What a compiled program does, read from its text (HLO)."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%([^ ]+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|branch_computations)="
  r"(\{[^}]*\}|%[^ ,)]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CONSTANT = re.compile(r" = s32\[\][^ ]* constant\((\d+)\)")
_KINDS = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
  "collective-permute",
)
# The TPU compiler's form of a reduce-scatter: a computation of this name.
_REDUCE_SCATTER = "all-reduce-scatter"
_NO_ESTIMATE = 1e12  # more cycles than that stand for "unknown"


class Collective(NamedTuple):
  """One collective operation."""

  kind: str
  shapes: tuple[tuple[int, ...], ...]  # of the result
  size: int  # bytes of its larger side on one device
  times: int  # executions a step


class Program(NamedTuple):
  """A compiled program, as far as it is of interest here."""

  collectives: tuple[Collective, ...]
  cycles: int  # sum of the estimates, loops by their length

  def bytes_by_kind(self) -> dict[str, int]:
    """Bytes a step of each kind of collective."""
    sums: collections.Counter[str] = collections.Counter()
    for c in self.collectives:
      sums[c.kind] += c.size * c.times
    return dict(sums)

  def largest(self, count: int) -> list[Collective]:
    """Those that move most in a step; equal ones are one."""
    times: collections.Counter[Collective] = collections.Counter()
    for c in self.collectives:
      times[c._replace(times=0)] += c.times
    merged = [c._replace(times=n) for c, n in times.items()]
    return sorted(merged, key=lambda c: -c.size * c.times)[:count]

  def gathers_of(self, rows: int) -> list[tuple[int, ...]]:
    """Shapes [rows, ...] of gathered arrays of more than one axis."""
    return [
      shape
      for c in self.collectives
      if c.kind == "all-gather"
      for shape in c.shapes
      if len(shape) > 1 and shape[0] == rows
    ]


class _Instruction(NamedTuple):
  opcode: str
  result: str
  called: tuple[tuple[str, str], ...]  # (as what, name)
  line: str


def read(text: str) -> Program:
  """Reads the text of `compiled.as_text()`."""
  entry, computations = _parse(text)
  collectives = []
  channels = set()
  cycles = 0
  for name, times, is_fused in _executions(entry, computations):
    for instruction in computations[name]:
      found = _collective(instruction, name, times)
      channel = _CHANNEL.search(instruction.line)
      # One that is spread over several fusions stands in each of them.
      if found is not None and (channel is None or channel[1] not in channels):
        collectives.append(found)
        channels.add(channel and channel[1])
      match = _CYCLES.search(instruction.line)
      if match and not is_fused and int(match[1]) < _NO_ESTIMATE:
        cycles += int(match[1]) * times
  return Program(tuple(collectives), cycles)


def _parse(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
  """The name of the entry, and the instructions of each computation."""
  entry, current = "", None
  computations: dict[str, list[_Instruction]] = {}
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      called = tuple(
        (role, name)
        for role, names in _CALLED.findall(line)
        for name in re.findall(r"%([^ ,}]+)", names)
      )
      current.append(_Instruction(match[3], match[2], called, line))
  return entry, computations


def _executions(
  entry: str, computations: dict[str, list[_Instruction]]
) -> Iterator[tuple[str, int, bool]]:
  """(computation, how often it runs, whether inside a fusion)."""
  todo = [(entry, 1, False)]
  while todo:
    name, times, is_fused = todo.pop()
    if name not in computations:
      continue
    yield name, times, is_fused
    for instruction in computations[name]:
      for role, called in instruction.called:
        trips = _trips(instruction, computations) if role == "body" else 1
        inside = is_fused or role in ("calls", "to_apply")
        if instruction.opcode == "call":
          inside = is_fused
        todo.append((called, times * trips, inside))


def _trips(
  loop: _Instruction, computations: dict[str, list[_Instruction]]
) -> int:
  """How often a loop's body runs; 1 where the program does not say."""
  if match := _TRIPS.search(loop.line):
    return int(match[1])
  condition = dict(loop.called).get("condition", "")
  bounds = [
    int(match[1])
    for instruction in computations.get(condition, ())
    if (match := _CONSTANT.search(instruction.line))
  ]
  return max(bounds, default=1)


def _collective(
  instruction: _Instruction, computation: str, times: int
) -> Collective | None:
  opcode = instruction.opcode.removesuffix("-start")
  if opcode not in _KINDS:
    return None
  if opcode == "all-reduce" and computation.startswith(_REDUCE_SCATTER):
    opcode = "reduce-scatter"
  arrays = [
    (dtype, tuple(int(d) for d in dims.split(",") if d))
    for dtype, dims in _ARRAY.findall(instruction.result)
  ]
  sizes = [_item_size(dtype) * math.prod(shape) for dtype, shape in arrays]
  # What starts a gather has its operand in the result, too.
  is_pair = instruction.opcode == "all-gather-start"
  size = max(sizes) if is_pair else sum(sizes)
  return Collective(opcode, tuple(shape for _, shape in arrays), size, times)


def _item_size(dtype: str) -> int:
  """Bytes of one number, from a name such as bf16."""
  if dtype == "pred":
    return 1
  bits = int(re.search(r"\d+", dtype)[0])
  return max(bits // 8, 1)
