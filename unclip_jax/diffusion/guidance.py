"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

Guidance is a function on functions: it turns one `denoise_fn` into another, and
samplers know nothing of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.diffusion import gaussian, samplers


def classifier_free(
  denoise_fn: samplers.DenoiseFn,
  guidance_scale: float | jax.Array,
  *,
  learned_variance: bool,
) -> samplers.DenoiseFn:
  """Guided prediction: uncond + scale (cond - uncond) (Ho & Salimans, eq. 6).

  Their weight w is scale - 1. The formula is linear, hence the same for
  networks that predict eps, x_start or v.

  Args:
    denoise_fn: takes x_t [2B, ...] and timesteps [2B], and conditions the
      first B rows on the condition and the last B rows on its absence. It is
      called once.
    guidance_scale: 0 = unconditional, 1 = conditional, more = guided; a float
      or a (traced) scalar.
    learned_variance: the output has 2C channels; the variance channels are
      then taken from the conditional half, unguided.

  Returns:
    A function of x_t [B, ...] and timesteps [B]; its output is float32, since
    a scale multiplies the rounding errors of lower precisions.
  """

  def guided(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
    model_output = denoise_fn(
      jnp.concatenate([x_t, x_t]), jnp.concatenate([timesteps, timesteps])
    )
    cond, uncond = jnp.split(model_output.astype(jnp.float32), 2)
    if not learned_variance:
      return uncond + guidance_scale * (cond - uncond)
    cond, variance_output = gaussian.split_variance(cond)
    uncond, _ = gaussian.split_variance(uncond)
    output = uncond + guidance_scale * (cond - uncond)
    return jnp.concatenate([output, variance_output], axis=-1)

  return guided
