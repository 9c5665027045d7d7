"""What the backward pass keeps of a layer, and what it computes again.

Rematerialisation (Chen et al. 2016, arXiv 1604.06174): the less is kept, the
more is computed twice. A model's field `remat` names a policy; from the most
memory to the least:

  "none"      everything is kept that a gradient needs; also False
  "products"  what dense layers, convolutions and attention give
  "dots"      what dense layers give
  "full"      nothing but the layer's input; also True

and "offload" keeps what "dots" keeps, in the memory of the host. Layers name
what they give (`name`) in the compute dtype: policies over primitives would
keep the float32 accumulators of the same products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from unclip_jax.utils import errors

_KINDS = ("attention", "convolution", "dense")
_policies = jax.checkpoint_policies
POLICIES = {
  "none": _policies.everything_saveable,
  "products": _policies.save_only_these_names(*_KINDS),
  "dots": _policies.save_only_these_names("dense"),
  "full": _policies.nothing_saveable,
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["dense"],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


def name(x: jax.Array, kind: str) -> jax.Array:
  """The array, under the name by which policies know it.

  Args:
    x: what a layer gives.
    kind: "attention", "convolution" or "dense".
  """
  return checkpoint_name(x, kind)


def checkpoint(
  f: Callable[..., Any],
  remat: bool | str,
  transform: Callable[..., Any] = jax.checkpoint,
  **options: Any,
) -> Callable[..., Any]:
  """`f`, whose backward pass keeps what a policy says.

  Args:
    remat: False, True or the name of a policy.
    transform: `jax.checkpoint`, or `nn.remat` where `f` takes a module.
    options: of the transform.

  Raises:
    UserError: there is no such policy.
  """
  policy = {False: "none", True: "full"}.get(remat, remat)
  if policy == "none":
    return f
  if policy not in POLICIES:
    raise errors.UserError(
      f"config.model.remat {remat!r} is unknown: choose one of "
      f"{', '.join(POLICIES)}"
    )
  return transform(f, policy=POLICIES[policy], **options)
