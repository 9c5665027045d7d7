"""Where arrays live: the mesh, path rules for parameters, and two backends.

The mesh has the axes `data` (replicas), `fsdp` (parameters in parts, gathered
where they are used) and `tensor` (layers in parts). Examples are spread over
`data` and `fsdp`: with both above 1 parameters are sharded within a group of
devices and replicated across ("hybrid"). Over several slices of a pod, `data`
goes across slices.

A list `config.sharding = ((regex, tactic), ...)` is matched against dotted
parameter names (first match wins; a parameter without one is an error). A
tactic is

  "replicate"   whole on every device
  "fsdp"        the largest dimension that the axis divides is split over it;
                several axes are joined by "+", as in "data+fsdp"
  a tuple       mesh axes by dimension, as in a `PartitionSpec`; an axis that
                does not divide its dimension is left out

Optimizer moments and the moving average follow their parameter, or, with rules
of their own in `config.optimizer_sharding`, lie apart from it: parameters
whole and moments in parts are ZeRO-1 (Rajbhandari et al. 2019, arXiv
1910.02054, section 5). Activations: utils/axes.py.

The backends run the same step. `jit`: one program over global arrays, into
which XLA puts the collectives (`jax.jit` with shardings is what pjit became).
`pmap`: one program for each device with a whole replica, and averages across
(`lax.pmean`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.utils import axes, errors, trees

PyTree = Any
Rules = Sequence[tuple[str, Any]]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The device mesh with axes `data`, `fsdp`, `tensor`.

  Args:
    sizes: devices along each axis; at most one is -1, which takes the rest.
    devices: None: all that there are.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or several
      slices do not divide `data`.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = [int(sizes.get(axis, 1)) for axis in AXES]
  if shape.count(-1) == 1:
    known = math.prod(size for size in shape if size != -1)
    shape[shape.index(-1)] = len(devices) // known
  if math.prod(shape) != len(devices) or min(shape) < 1:
    raise errors.UserError(
      f"config.mesh {dict(sizes)} does not fit {len(devices)} devices: the "
      "sizes must multiply to that number (one of them may be -1)"
    )
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if shape[0] % slices:
    raise errors.UserError(
      f"config.mesh.data {shape[0]} is not a multiple of the {slices} slices, "
      "across which replicas go: change the mesh"
    )
  if devices[0].platform != "tpu":
    return Mesh(np.asarray(devices).reshape(shape), AXES)
  if slices > 1:
    within = [shape[0] // slices, *shape[1:]]
    grid = mesh_utils.create_hybrid_device_mesh(
      within, [slices, 1, 1], devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return Mesh(grid, AXES)


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
  if not isinstance(tactic, str):
    return P(
      *(
        axes.fitting(names or (), dim, mesh)
        for names, dim in zip(tactic, shape)
      )
    )
  names = tactic.split("+")
  fits = [i for i, dim in enumerate(shape) if axes.fitting(names, dim, mesh)]
  if not fits:
    return P()
  largest = max(fits, key=lambda i: shape[i])
  return P(*(tuple(names) if i == largest else () for i in range(len(shape))))


def _check_rules(rules: Rules, field: str) -> None:
  """Raises UserError unless the rules can be read."""
  for rule in rules:
    if len(rule) != 2 or not isinstance(rule[0], str):
      raise errors.UserError(f"{field}: {rule} is not a pair (regex, tactic)")
    pattern, tactic = rule
    parts = tactic.split("+") if isinstance(tactic, str) else tactic
    names = {
      name
      for part in parts
      for name in ((part,) if isinstance(part, str) else part or ())
    }
    if tactic != "replicate" and not names <= {*AXES}:
      raise errors.UserError(
        f"{field}: the tactic {tactic!r} of {pattern!r} is neither 'replicate' "
        f"nor made of the mesh axes {', '.join(AXES)}"
      )


def param_specs(
  shapes: Mapping[str, Sequence[int]],
  rules: Rules,
  mesh: Mesh,
  *,
  field: str = "config.sharding",
) -> dict[str, P]:
  """The PartitionSpec of every parameter, by dotted name.

  Raises:
    UserError: a parameter that no rule matches, or a rule that is none.
  """
  _check_rules(rules, field)
  specs = {}
  for name, shape in shapes.items():
    for pattern, tactic in rules:
      if re.search(pattern, name):
        specs[name] = _spec(tactic, shape, mesh)
        break
    else:
      raise errors.UserError(
        f"{field} has no rule for parameter '{name}': add one, for "
        "example ('.*', 'replicate') as the last"
      )
  return specs


def state_shardings(
  state: PyTree,
  rules: Rules,
  mesh: Mesh,
  optimizer_rules: Rules | None = None,
) -> PyTree:
  """A sharding for every leaf of a train state (arrays or shapes).

  A leaf whose dotted name ends in a parameter's name and has its shape (a
  moment, a moving average) is placed as that parameter, or by the optimizer's
  own rules; the rest replicates.
  """
  shapes = {k: v.shape for k, v in trees.flatten(state.params).items()}
  specs = param_specs(shapes, rules, mesh)
  optimizer_specs = specs
  if optimizer_rules is not None:
    optimizer_specs = param_specs(
      shapes, optimizer_rules, mesh, field="config.optimizer_sharding"
    )

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    parts = trees.path_names(path)
    apart = parts[0] in ("opt_state", "ema_params")
    for start in range(len(parts)):
      name = ".".join(parts[start:])
      if name in specs and leaf.shape == shapes[name]:
        spec = (optimizer_specs if apart else specs)[name]
        return NamedSharding(mesh, spec)
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(place, state)


def frozen_shardings(frozen: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
  """Upstream parameters by the rules for parameters; tables replicate."""
  flat = trees.flatten(frozen)
  params = {k: v.shape for k, v in flat.items() if ".params." in k}
  specs = param_specs(params, rules, mesh)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: NamedSharding(
      mesh, specs.get(".".join(trees.path_names(path)), P())
    ),
    frozen,
  )


def as_shapes(tree: PyTree, shardings: PyTree) -> PyTree:
  """Arrays or shapes as `ShapeDtypeStruct`s with these shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def spread(batch: Mapping[str, np.ndarray], mesh: Mesh) -> PyTree:
  """A whole batch that every process has -> arrays over the whole mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_callback(
      rows.shape, sharding, lambda index, rows=rows: rows[index]
    )
    for name, rows in batch.items()
  }


def process_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """(index, count): this process makes block `index` of `count` of a batch.

  Processes whose devices hold the same rows make the same block.

  Raises:
    UserError: the rows of this process do not lie together.
  """
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  blocks = sorted(
    {rows.indices(batch_size)[:2] for (rows,) in indices.values()}
  )
  start, stop = blocks[0][0], blocks[-1][1]
  if sum(b - a for a, b in blocks) != stop - start or start % (stop - start):
    raise errors.UserError(
      f"config.mesh {dict(mesh.shape)} gives a host rows that do not lie "
      "together: let fsdp x tensor be a multiple or a divisor of its devices"
    )
  return start // (stop - start), batch_size // (stop - start)


# (state, frozen, batch, rng) -> (state, metrics)
Step = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]]


@dataclasses.dataclass(frozen=True)
class Jit:
  """One program over global arrays; XLA inserts the collectives."""

  mesh: Mesh
  axis_name = None

  def compile(self, step: Step, shardings: PyTree) -> Step:
    """The step, compiled; the state is donated.

    Args:
      shardings: of the state.
    """
    return jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(shardings, replicated(self.mesh)),
    )

  def place(self, batch: Mapping[str, np.ndarray]) -> PyTree:
    """This process's rows of a batch, as the step takes them."""
    sharding = batch_sharding(self.mesh)
    return {
      name: jax.make_array_from_process_local_data(sharding, rows)
      for name, rows in batch.items()
    }

  def on_mesh(self, state: PyTree) -> PyTree:
    """What a step returned, as arrays over the whole mesh."""
    return state


@dataclasses.dataclass(frozen=True)
class Pmap:
  """One program a device, with a replica of everything but the batch."""

  mesh: Mesh
  axis_name = "replica"

  def compile(self, step: Step, shardings: PyTree) -> Step:
    """As `Jit.compile`; the state comes out as one replicated array a leaf."""
    del shardings
    return jax.pmap(
      step,
      axis_name=self.axis_name,
      in_axes=(None, None, 0, None),
      out_axes=(None, None),
      donate_argnums=0,
    )

  def place(self, batch: Mapping[str, np.ndarray]) -> PyTree:
    """[B, ...] -> [devices of this process, B / devices, ...]."""
    n = jax.local_device_count()
    return {k: x.reshape(n, -1, *x.shape[1:]) for k, x in batch.items()}

  def on_mesh(self, state: PyTree) -> PyTree:
    """As `Jit.on_mesh`, without a copy: a process knows of its own replicas."""
    whole = replicated(self.mesh)

    def join(x: jax.Array) -> jax.Array:
      replicas = [shard.data for shard in x.addressable_shards]
      return jax.make_array_from_single_device_arrays(x.shape, whole, replicas)

    return jax.tree.map(join, state)


def make_backend(parallel: str, mesh: Mesh) -> Jit | Pmap:
  """The backend that `config.parallel` names.

  Raises:
    UserError: an unknown one, or a mesh that pmap cannot have.
  """
  if parallel == "jit":
    return Jit(mesh)
  if parallel != "pmap":
    raise errors.UserError(
      f"config.parallel '{parallel}' is unknown: choose 'jit' or 'pmap'"
    )
  if mesh.shape["data"] != jax.device_count():
    raise errors.UserError(
      "config.parallel 'pmap' replicates parameters: set config.mesh.fsdp and "
      "config.mesh.tensor to 1, or config.parallel to 'jit'"
    )
  return Pmap(mesh)


def overview(state: PyTree, frozen: PyTree, mesh: Mesh) -> str:
  """A table of all parameters, then the total, the mesh, and the memory.

  Args:
    state: a train state of `ShapeDtypeStruct`s with shardings.
    frozen: upstream variables, with shardings too.
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
    x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(frozen)
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
