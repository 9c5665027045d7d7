"""How much arithmetic a function is, and how much a device can do.

Counted are multiplications and additions of matrix products and convolutions,
two for each pair, from the traced function: loops by their length, of branches
the larger, kernels of our own not at all. XLA's own count sees a loop's body
once. What a program repeats to save memory is in it if it is in the function;
`model FLOPs` are those of a function that repeats nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Dense bfloat16 FLOP/s of one jax device, by the start of its `device_kind`
# (the vendors' data sheets; a TPU v7x chip is two devices).
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
}


def peak(device: jax.Device) -> float | None:
  """Bfloat16 FLOP/s of a device; None: not known."""
  kinds = [k for k in PEAK_FLOPS if device.device_kind.startswith(k)]
  return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def count(fn: Callable[..., Any], *args: Any) -> int:
  """FLOPs of fn(*args), which is traced and not run.

  Args:
    args: arrays or `ShapeDtypeStruct`s.
  """
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  # What nothing reads no program computes: rules of differentiation trace the
  # function that they differentiate once more.
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(used)


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(_count_equation(eqn) for eqn in jaxpr.eqns)


def _count_equation(eqn: core.JaxprEqn) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    return _dot_general(eqn)
  if name == "conv_general_dilated":
    return _conv(eqn)
  if name == "pallas_call":
    return 0
  inner = [_count(jaxpr) for jaxpr in _jaxprs(params)]
  if name == "cond":
    return max(inner)
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "shard_map":
    mesh, manual = params["mesh"], params["newly_manual_axes"]
    return math.prod(mesh.shape[axis] for axis in manual) * sum(inner)
  return sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
  """Those of an equation's parameters, but for rules of differentiation."""
  for value in params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      if isinstance(x, core.ClosedJaxpr):
        yield x.jaxpr
      elif isinstance(x, core.Jaxpr):
        yield x


def _dot_general(eqn: core.JaxprEqn) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
  return 2 * depth * math.prod(eqn.outvars[0].aval.shape)


def _conv(eqn: core.JaxprEqn) -> int:
  kernel = eqn.invars[1].aval.shape
  features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  # The zeros between dilated inputs are not multiplied with.
  zeros = math.prod(eqn.params["lhs_dilation"])
  depth = math.prod(kernel) // features
  per_group = eqn.params["batch_group_count"]
  out = math.prod(eqn.outvars[0].aval.shape)
  return 2 * depth * out // zeros // per_group
