"""How far a picture is from what a network makes of it: arrays in, [B] out.

  mse            squared error
  logit_laplace  negative log-likelihood under a logit-Laplace distribution:
                 Ramesh et al. 2021 (DALL-E, arXiv 2102.12092), appendix A.3

The latter lives on (0, 1), as pixels do, where l1 and l2 losses give weight to
values that no pixel has. Its density has 1 / (x (1 - x)) in it, so pixels are
first mapped into (margin, 1 - margin) (the source's equation 3). All is in
float32, and a mean over all values of an example.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

MARGIN = 0.1  # epsilon in the source


def mse(x: jax.Array, y: jax.Array) -> jax.Array:
  """Mean squared error of [B, ...]: [B]."""
  difference = x.astype(jnp.float32) - y.astype(jnp.float32)
  return _per_example(difference**2)


def logit_laplace(
  x: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
  """-ln p(x) of the logit-Laplace distribution (Ramesh et al. 2021, eq. 2).

  The sigmoid of a variable of Laplace distribution is distributed so.

  Args:
    x: [B, ...] in (0, 1), neither end included.
    mean: [B, ...], mu: the median's logit.
    log_scale: [B, ...], ln b.

  Returns:
    [B] in nats per value; negative where the density is above 1.
  """
  x, mean, log_scale = (a.astype(jnp.float32) for a in (x, mean, log_scale))
  log_x, log_1_minus_x = jnp.log(x), jnp.log1p(-x)
  distance = jnp.abs(log_x - log_1_minus_x - mean)
  return _per_example(
    math.log(2)
    + log_scale
    + log_x
    + log_1_minus_x
    + distance * jnp.exp(-log_scale)
  )


def to_open_interval(image: jax.Array, margin: float = MARGIN) -> jax.Array:
  """[-1, 1] -> [margin, 1 - margin] (Ramesh et al. 2021, equation 3)."""
  return margin + (1 - 2 * margin) * (image.astype(jnp.float32) + 1) / 2


def from_open_interval(x: jax.Array, margin: float = MARGIN) -> jax.Array:
  """The inverse of `to_open_interval`, cut to [-1, 1]."""
  return jnp.clip((x - margin) / (1 - 2 * margin) * 2 - 1, -1.0, 1.0)


def _per_example(x: jax.Array) -> jax.Array:
  return x.mean(axis=tuple(range(1, x.ndim)))
