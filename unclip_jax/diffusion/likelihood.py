"""Bits per dimension: the variational bound of a diffusion model, by timestep.

The bound on -log2 p(x_start), over the number of dimensions (Ho et al. 2020,
arXiv 2006.11239, eq. 5; Nichol & Dhariwal 2021, arXiv 2102.09672, eqs. 4 to 7):

  L_T      KL(q(x_T | x_start) || N(0, 1)), which no network changes
  L_t      KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t)), 0 < t < T
  L_0      -log2 p(x_start | x_1)

Indices count as those papers' do less one: our timestep t is their t + 1, and
the term of timestep 0 is L_0. For pictures L_0 is the mass of 8-bit levels, and
the bound is what the literature gives, in bits per dimension. Data that come
without levels, such as embeddings, have a density: the bound is on its
negative logarithm then, and may be below 0.

T network calls for each batch are more than training can wait for. From a few
timesteps the same sum is estimated without bias: the timesteps are cut into
strata, one timestep is drawn in each and its term counts as often as the
stratum is long. Timestep 0 is a stratum of its own, as its term is of another
kind and size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import draws, gaussian, samplers, schedules


class Vlb(NamedTuple):
  """The bound for each example and its parts, float32, bits per dimension."""

  bits_per_dim: jax.Array  # [B], prior_term and all terms together
  prior_term: jax.Array  # [B], L_T
  terms: jax.Array  # [B, num_terms], L_0 first; each the sum of its stratum
  timesteps: jax.Array  # int32 [B, num_terms], where they were taken


def prior_term(
  schedule: schedules.NoiseSchedule, x_start: jax.Array
) -> jax.Array:
  """L_T of x_start [B, ...]: [B] bits per dimension."""
  mean = schedule.sqrt_alphas_cumprod[-1] * x_start.astype(jnp.float32)
  log_variance = float(np.log1p(-schedule.alphas_cumprod[-1]))
  nats = gaussian.normal_kl(mean, log_variance, 0.0, 0.0)
  return nats.mean(axis=tuple(range(1, x_start.ndim))) / np.log(2.0)


def strata(num_timesteps: int, num_terms: int) -> np.ndarray:
  """Edges int32 [num_terms + 1]: stratum i is edges[i] <= t < edges[i + 1].

  They grow longer with t, as the terms fall steeply (Nichol & Dhariwal,
  figure 2): those that make the estimate noisy are taken most often.

  Raises:
    ValueError: num_terms is not in [2, T]; 1 where T is 1.
  """
  if not min(2, num_timesteps) <= num_terms <= num_timesteps:
    raise ValueError(
      f"num_terms must be in [2, {num_timesteps}], which is the number of"
      f" timesteps, got {num_terms}"
    )
  index = np.arange(num_terms)
  share = (index / max(num_terms - 1, 1)) ** 2
  edges = 1 + np.maximum((share * (num_timesteps - 1)).round(), index)
  return np.concatenate([[0], edges]).astype(np.int32)


def vlb(
  denoise_fn: samplers.DenoiseFn,
  schedule: schedules.NoiseSchedule,
  x_start: jax.Array,
  rng: jax.Array,
  *,
  num_terms: int,
  prediction: gaussian.Prediction,
  variance: gaussian.Variance,
  clip_x_start: gaussian.ClipXStart = None,
  discrete: bool = True,
) -> Vlb:
  """The bound for every example, by `num_terms` calls of the network.

  Args:
    denoise_fn: (x_t, timesteps) -> model_output; one that is self-conditioned
      is called twice, the second time with what it predicted.
    schedule: over whose steps the bound is; a respaced one has its own bound.
    x_start: [B, ...] data.
    rng: one key, or one key per example.
    num_terms: strata of timesteps, at least 2. T: every timestep once.
    prediction, variance, clip_x_start, discrete: as in gaussian.vlb_terms.

  Raises:
    ValueError: num_terms, or the network's channels, do not fit.
  """
  edges = strata(schedule.num_timesteps, num_terms)
  how = dict(
    prediction=prediction, variance=variance, clip_x_start=clip_x_start
  )
  x_start = x_start.astype(jnp.float32)

  def denoise(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
    told = jnp.asarray(schedule.timestep_map)[timesteps]
    if not isinstance(denoise_fn, samplers.SelfConditioned):
      return denoise_fn(x_t, told)
    first = gaussian.p_mean_variance(
      schedule,
      denoise_fn(x_t, told, jnp.zeros_like(x_t)),
      x_t,
      timesteps,
      **how,
    )
    return denoise_fn(x_t, told, first.x_start)

  def stratum(_: None, i: jax.Array) -> tuple[None, tuple[jax.Array, ...]]:
    timestep_rng, noise_rng = draws.split(draws.fold_in(rng, i))
    low, high = jnp.asarray(edges)[i], jnp.asarray(edges)[i + 1]
    timesteps = draws.integers(timestep_rng, low, high, x_start.shape[:1])
    noise = draws.normal(noise_rng, x_start.shape)
    x_t = gaussian.q_sample(schedule, x_start, timesteps, noise)
    term = gaussian.vlb_terms(
      schedule,
      denoise(x_t, timesteps),
      x_start,
      x_t,
      timesteps,
      discrete=discrete,
      **how,
    )
    return None, (term * (high - low), timesteps)

  _, (terms, timesteps) = jax.lax.scan(stratum, None, jnp.arange(num_terms))
  prior = prior_term(schedule, x_start)
  return Vlb(prior + terms.sum(axis=0), prior, terms.T, timesteps.T)
