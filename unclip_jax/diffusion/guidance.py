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
  interval: tuple[int, int] | None = None,
  rescale: float = 0.0,
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
    interval: (first, last) timestep at which guidance is on; elsewhere the
      scale is 1 (Kynkaanniemi et al. 2024, arXiv 2404.07724). None: always.
    rescale: how far to pull the guided prediction's standard deviation, per
      example, back to the conditional one's: phi of Lin et al. 2023 (arXiv
      2305.08891, section 3.4; they use 0.7), 0 = off.

  Returns:
    A function of x_t [B, ...] and timesteps [B]; its output is float32, since
    a scale multiplies the rounding errors of lower precisions.
  """

  def guided(
    x_t: jax.Array, timesteps: jax.Array, *estimate: jax.Array
  ) -> jax.Array:
    model_output = denoise_fn(*_repeat(2, x_t, timesteps, *estimate))
    (cond, uncond), variance_output = _split(model_output, 2, learned_variance)
    scale = _scale_at(guidance_scale, timesteps, interval, x_t.ndim)
    output = uncond + scale * (cond - uncond)
    return _join(_rescale(output, cond, rescale), variance_output)

  return samplers.as_conditioned(denoise_fn, guided)


def two_conditions(
  denoise_fn: samplers.DenoiseFn,
  first_scale: float | jax.Array,
  second_scale: float | jax.Array,
  *,
  learned_variance: bool,
  interval: tuple[int, int] | None = None,
  rescale: float = 0.0,
) -> samplers.DenoiseFn:
  """Guidance on two conditions, each with its scale.

    none + first_scale (first - none) + second_scale (both - first),

  as in Brooks et al. 2022 (arXiv 2211.09800, eq. 3). Equal scales are
  `classifier_free` with that scale.

  Args:
    denoise_fn: takes x_t [3B, ...]: B rows with both conditions, B with the
      first one alone, B with none.
    first_scale, second_scale: floats or (traced) scalars.
    learned_variance, interval, rescale: as for `classifier_free`; "the
      conditional" is the one with both.
  """

  def guided(
    x_t: jax.Array, timesteps: jax.Array, *estimate: jax.Array
  ) -> jax.Array:
    model_output = denoise_fn(*_repeat(3, x_t, timesteps, *estimate))
    (both, first, none), variance_output = _split(
      model_output, 3, learned_variance
    )
    first_at = _scale_at(first_scale, timesteps, interval, x_t.ndim)
    second_at = _scale_at(second_scale, timesteps, interval, x_t.ndim)
    output = none + first_at * (first - none) + second_at * (both - first)
    return _join(_rescale(output, both, rescale), variance_output)

  return samplers.as_conditioned(denoise_fn, guided)


def _repeat(count: int, *arrays: jax.Array) -> list[jax.Array]:
  return [jnp.concatenate([x] * count) for x in arrays]


def _split(
  model_output: jax.Array, count: int, learned_variance: bool
) -> tuple[list[jax.Array], jax.Array | None]:
  """`count` predictions, and the first one's variance channels if learned."""
  parts = jnp.split(model_output.astype(jnp.float32), count)
  if not learned_variance:
    return parts, None
  predictions, variances = zip(*map(gaussian.split_variance, parts))
  return list(predictions), variances[0]


def _join(output: jax.Array, variance_output: jax.Array | None) -> jax.Array:
  if variance_output is None:
    return output
  return jnp.concatenate([output, variance_output], axis=-1)


def _scale_at(
  scale: float | jax.Array,
  timesteps: jax.Array,
  interval: tuple[int, int] | None,
  ndim: int,
) -> float | jax.Array:
  """The scale, or 1 for the rows outside the interval: [B, 1, ...]."""
  if interval is None:
    return scale
  first, last = interval
  is_on = (first <= timesteps) & (timesteps <= last)
  return jnp.where(is_on, scale, 1.0).reshape((-1,) + (1,) * (ndim - 1))


def _rescale(output: jax.Array, cond: jax.Array, rescale: float) -> jax.Array:
  if not rescale:
    return output
  axes = tuple(range(1, output.ndim))
  ratio = jnp.std(cond, axes, keepdims=True) / jnp.std(
    output, axes, keepdims=True
  )
  return output * (rescale * ratio + 1.0 - rescale)
