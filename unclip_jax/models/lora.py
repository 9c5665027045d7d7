"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1).

A kernel W [in, out] of a trained network becomes W + alpha / rank * a b, with
`a` [in, rank] and `b` [rank, out] in the place of the source's transposed A and
B. `a` starts Gaussian, with the variance that the source's code draws its own
with, and `b` at 0, so that an adapted network starts as the one it adapts.

The kernel of a convolution counts as a matrix too: [height * width * in, out].

Deviations: the source adapts the attention of language models, mostly the
query and value kernels, and leaves MLPs for later; the default here is all
kernels of attention and MLPs. Adapters have no dropout.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.utils import errors, trees

PyTree = Any
Variables = dict[str, PyTree]  # {"params": ..., **model_state}


@dataclasses.dataclass(frozen=True)
class Model:
  """Adapters for the kernels of another network.

  Attributes:
    rank: of what is added to a kernel; as many as a kernel's shorter side can
      add anything.
    alpha: what is added is multiplied by alpha / rank. It acts as a learning
      rate, and stays what it is where the rank is changed.
    pattern: regex; kernels of two or more axes in whose dotted names it is
      found (`re.search`) are adapted.
  """

  rank: int = 8
  alpha: float = 8.0
  pattern: str = r"(^|\.)(attn|mlp)\.\w+\.kernel$"

  def init(self, rng: jax.Array, base: Variables) -> Variables:
    """Fresh adapters: {"params": {...: {"a": [in, rank], "b": [rank, out]}}}.

    Args:
      base: variables of the network, arrays or shapes.

    Raises:
      UserError: the pattern is no regex, or is in no kernel's name; or no rank.
    """
    if self.rank < 1:
      raise errors.UserError(
        f"config.model.rank {self.rank} adapts nothing: choose 1 or more"
      )
    kernels = {
      name: leaf.shape
      for name, leaf in trees.flatten(base["params"]).items()
      if leaf.ndim >= 2
    }
    try:
      names = [name for name in kernels if re.search(self.pattern, name)]
    except re.error as e:
      raise errors.UserError(
        f"config.model.pattern '{self.pattern}' is no regular expression: {e}"
      ) from e
    if not names:
      some = list(kernels)[:: len(kernels) // 4 or 1]
      raise errors.UserError(
        f"config.model.pattern '{self.pattern}' is in no name of a kernel: they"
        f" look like {', '.join(some)}"
      )
    adapters = {}
    for name, key in zip(names, jax.random.split(rng, len(names))):
      *ins, out = kernels[name]
      size = int(np.prod(ins))
      a = jax.random.normal(key, (size, self.rank))
      adapters[f"{name}.a"] = a * (3 * size) ** -0.5
      adapters[f"{name}.b"] = jnp.zeros((self.rank, out))
    return {"params": trees.unflatten(adapters)}

  def apply(self, variables: Variables, base: Variables) -> Variables:
    """The variables of the adapted network; gradients reach the adapters."""
    adapters = trees.flatten(variables["params"])

    def adapted(name: str, kernel: jax.Array) -> jax.Array:
      product = jnp.matmul(
        adapters[f"{name}.a"], adapters[f"{name}.b"], precision="highest"
      )
      scaled = self.alpha / self.rank * product.reshape(kernel.shape)
      return (kernel + scaled).astype(kernel.dtype)

    return _replace(base, adapters, adapted)

  def merge(self, variables: Variables, base: Variables) -> Variables:
    """The same as numpy arrays, made without matrix products.

    Those round differently from machine to machine; here every machine does
    the same float32 operations in the same order.
    """
    adapters = trees.flatten(jax.device_get(variables["params"]))
    scale = np.float32(self.alpha / self.rank)

    def merged(name: str, kernel: jax.Array) -> np.ndarray:
      a, b = adapters[f"{name}.a"], adapters[f"{name}.b"]
      product = np.zeros((len(a), b.shape[1]), np.float32)
      for column, row in zip(a.T, b):
        product += np.multiply.outer(column, row)
      scaled = scale * product.reshape(kernel.shape)
      return (np.asarray(kernel) + scaled).astype(kernel.dtype)

    return _replace(base, adapters, merged)


def _replace(base: Variables, adapters: PyTree, new: Any) -> Variables:
  """`base` with new(name, kernel) for every kernel that has adapters."""
  kernels = trees.flatten(base["params"])
  names = {name.rpartition(".")[0] for name in adapters}
  replaced = {name: new(name, kernels[name]) for name in names}
  return {**base, "params": trees.overlay(base["params"], replaced)}
