"""Logical names for the axes of activations, and the mesh axes they lie on.

A network says what an axis is (`constrain(x, "batch", "length", "width")`); a
config says where such an axis lies (`config.axis_rules`); whoever traces a
step on a mesh brings both together (`use`). Elsewhere, as in a notebook,
`constrain` does nothing. Without constraints in every block XLA gathers
activations to the global batch where parameters are sharded.

The names: batch, length (tokens, patches), width (D), heads (N), mlp (the
hidden layer), channels (the hidden layer of a ResBlock), height.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = Mapping[str, str | tuple[str, ...] | None]


def fitting(
  names: str | Sequence[str], size: int, mesh: Mesh
) -> tuple[str, ...]:
  """These mesh axes; none where they do not split a dimension evenly."""
  names = (names,) if isinstance(names, str) else tuple(names)
  count = math.prod(mesh.shape[axis] for axis in names)
  return () if count == 1 or size % count else names


class AxisRules(NamedTuple):
  """A mesh, and the mesh axes of each logical axis."""

  mesh: Mesh
  rules: Rules

  def mesh_axes(self, name: str | None, size: int) -> tuple[str, ...]:
    """Those of a logical axis; none where they do not divide its size."""
    return fitting((name and self.rules.get(name)) or (), size, self.mesh)


_current: contextvars.ContextVar[AxisRules | None] = contextvars.ContextVar(
  "axis_rules", default=None
)


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: Rules) -> Iterator[None]:
  """What is traced inside has its logical axes on this mesh; None: nowhere.

  Open it inside of the traced function, so that traces are not shared between
  meshes.
  """
  token = _current.set(None if mesh is None else AxisRules(mesh, rules))
  try:
    yield
  finally:
    _current.reset(token)


def current() -> AxisRules | None:
  """The rules in use."""
  return _current.get()


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Places an array by the logical names of its axes (None: on no mesh axis).

  Args:
    names: one for each axis of x.
  """
  rules = current()
  if rules is None:
    return x
  spec = P(
    *(
      rules.mesh_axes(name, size) or None
      for name, size in zip(names, x.shape, strict=True)
    )
  )
  return jax.lax.with_sharding_constraint(x, NamedSharding(rules.mesh, spec))
