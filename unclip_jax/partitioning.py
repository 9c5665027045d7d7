"""Where arrays live: the mesh, and path rules that place every parameter.

One rule list, `config.sharding = ((regex, tactic), ...)`, is matched against
dotted parameter names (first match wins). A tactic is "replicate", "fsdp"
(the largest dimension that the axis divides is split over `fsdp`), or a tuple
of mesh axes for a `PartitionSpec`. Optimizer moments and the moving average
follow their parameter. XLA inserts the collectives (`jax.jit` with shardings,
which is what pjit became).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.utils import errors, trees

PyTree = Any
Rules = Sequence[tuple[str, Any]]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
  """The device mesh with axes `data`, `fsdp`, `tensor`.

  Args:
    sizes: devices along each axis; at most one is -1, which takes the rest.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices()
  shape = [int(sizes.get(axis, 1)) for axis in AXES]
  if shape.count(-1) == 1:
    known = math.prod(size for size in shape if size != -1)
    shape[shape.index(-1)] = len(devices) // known
  if math.prod(shape) != len(devices) or min(shape) < 1:
    raise errors.UserError(
      f"config.mesh {dict(sizes)} does not fit {len(devices)} devices: the "
      "sizes must multiply to that number (one of them may be -1)"
    )
  return Mesh(np.asarray(devices).reshape(shape), AXES)


def num_batch_shards(mesh: Mesh) -> int:
  """How many parts the rows of a batch are in."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(
  batch_size: int, num_microbatches: int, mesh: Mesh
) -> None:
  """Raises UserError unless every device gets whole examples each time."""
  shards = num_batch_shards(mesh)
  if batch_size % (shards * num_microbatches):
    raise errors.UserError(
      f"config.batch_size {batch_size} does not divide into {shards} batch "
      f"shards x {num_microbatches} microbatches: make it a multiple of "
      f"{shards * num_microbatches}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples over `data` and `fsdp`; other dimensions whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def _spec(tactic: Any, shape: Sequence[int], mesh: Mesh) -> P:
  """The PartitionSpec of one parameter under one tactic."""
  if tactic == "replicate":
    return P()
  if tactic == "fsdp":
    size = mesh.shape["fsdp"]
    fits = [i for i, dim in enumerate(shape) if size > 1 and dim % size == 0]
    if not fits:
      return P()
    largest = max(fits, key=lambda i: shape[i])
    return P(*("fsdp" if i == largest else None for i in range(len(shape))))
  return P(*tactic)


def param_specs(
  shapes: Mapping[str, Sequence[int]], rules: Rules, mesh: Mesh
) -> dict[str, P]:
  """The PartitionSpec of every parameter, by dotted name.

  Raises:
    UserError: a parameter that no rule matches.
  """
  specs = {}
  for name, shape in shapes.items():
    for pattern, tactic in rules:
      if re.search(pattern, name):
        specs[name] = _spec(tactic, shape, mesh)
        break
    else:
      raise errors.UserError(
        f"config.sharding has no rule for parameter '{name}': add one, for "
        "example ('.*', 'replicate') as the last"
      )
  return specs


def state_shardings(state: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
  """A sharding for every leaf of a train state (arrays or shapes).

  A leaf whose dotted name ends in a parameter's name and has its shape (a
  moment, a moving average) is placed as that parameter; the rest replicates.
  """
  specs = param_specs(
    {k: v.shape for k, v in trees.flatten(state.params).items()}, rules, mesh
  )
  shapes = {k: v.shape for k, v in trees.flatten(state.params).items()}

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    parts = trees.path_names(path)
    for start in range(len(parts)):
      name = ".".join(parts[start:])
      if name in specs and leaf.shape == shapes[name]:
        return NamedSharding(mesh, specs[name])
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(place, state)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> PyTree:
  """This process's rows of a batch -> arrays over the whole mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }


def overview(state: PyTree, frozen: PyTree, mesh: Mesh) -> str:
  """A table of all parameters, then the total, the mesh, and the memory.

  Args:
    state: a train state of `ShapeDtypeStruct`s with shardings.
    frozen: upstream variables, arrays or shapes, which lie on every device.
  """
  rows = [
    (name, x.shape, str(x.dtype), x.size, str(x.sharding.spec))
    for name, x in trees.flatten(state.params).items()
  ]
  wide = max(len(row[0]) for row in rows)
  lines = [
    f"{name:<{wide}}  {shape!s:<22}  {dtype:<9}{size:>13,}  {spec}"
    for name, shape, dtype, size, spec in rows
  ]
  state_bytes = sum(
    x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(state)
  )
  frozen_bytes = sum(
    x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves(frozen)
  )
  sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  return "\n".join(
    [
      *lines,
      "",
      f"total: {sum(row[3] for row in rows):,} parameters",
      f"mesh: {sizes} ({mesh.size} devices)",
      f"memory per device: {state_bytes / 2**20:,.1f} MiB state (parameters, "
      f"optimizer, moving average), {frozen_bytes / 2**20:,.1f} MiB frozen "
      "upstream models; gradients and activations come on top",
    ]
  )
