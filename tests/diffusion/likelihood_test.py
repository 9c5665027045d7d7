"""The variational bound, where it is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import (
  gaussian,
  likelihood,
  process,
  samplers,
  schedules,
)

T = 40
SCALE = 0.5  # of the normal data


@pytest.fixture(scope="module")
def schedule():
  return schedules.make_schedule("cosine", T)


def normal(*shape: int, seed: int = 0) -> jax.Array:
  draws = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(draws, jnp.float32)


def exact(schedule: schedules.NoiseSchedule, prediction: str):
  """The best predictor for N(0, SCALE^2), and its error of x_start [T]."""
  level = schedule.alphas_cumprod
  power = level * SCALE**2 + 1 - level  # of x_t
  weight = np.sqrt(level) * SCALE**2 / power
  tables = {
    "x_start": weight,
    "eps": (1 - np.sqrt(level) * weight) / np.sqrt(1 - level),
  }
  tables["v"] = (
    np.sqrt(level) * tables["eps"] - np.sqrt(1 - level) * tables["x_start"]
  )
  table = jnp.asarray(tables[prediction], jnp.float32)
  error = jnp.asarray(SCALE**2 * (1 - level) / power, jnp.float32)
  return (lambda x_t, t: table[t][:, None] * x_t), error


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_bound_of_the_exact_model_is_the_entropy(schedule, prediction):
  denoise_fn, error = exact(schedule, prediction)
  x_start = SCALE * normal(4, 60_000)
  found = jax.jit(
    functools.partial(
      likelihood.vlb,
      denoise_fn,
      schedule,
      num_terms=T,
      prediction=prediction,
      variance=gaussian.AnalyticVariance(error),
      discrete=False,
    )
  )(x_start, jax.random.key(0))
  # The reverse chain is that of the data, but starts from N(0, 1).
  power = 1 + schedule.alphas_cumprod[-1] * (SCALE**2 - 1)
  start = 0.5 * (power - 1 - np.log(power)) / np.log(2)
  entropy = 0.5 * np.log2(2 * np.pi * np.e * SCALE**2)
  mean = float(found.bits_per_dim.mean())
  np.testing.assert_allclose(mean, entropy + start, atol=0.01)
  np.testing.assert_array_equal(found.timesteps, np.tile(np.arange(T), (4, 1)))
  # Any other variance costs bits.
  worse = likelihood.vlb(
    denoise_fn,
    schedule,
    x_start,
    jax.random.key(0),
    num_terms=T,
    prediction=prediction,
    variance="fixed_large",
    discrete=False,
  )
  assert float(worse.bits_per_dim.mean()) > mean + 0.02


def test_parts_add_up_and_all_terms_but_the_last_are_zero_when_x_start_is_known(
  schedule,
):
  x_start = 0.9 * jnp.sin(3 * normal(3, 50))
  found = likelihood.vlb(
    lambda x_t, t: x_start,
    schedule,
    x_start,
    jax.random.key(0),
    num_terms=T,
    prediction="x_start",
    variance="fixed_small",
  )
  np.testing.assert_allclose(found.terms[:, 1:], 0.0, atol=1e-5)
  assert np.all(found.terms[:, 0] > 0)
  np.testing.assert_allclose(
    found.bits_per_dim, found.prior_term + found.terms.sum(axis=1), rtol=1e-6
  )


def test_prior_term_is_its_integral():
  schedule = schedules.make_schedule("linear").respace([100, 400])
  level, x_start = schedule.alphas_cumprod[-1], 0.7
  grid = np.linspace(-12, 12, 200_001)
  std = np.sqrt(1 - level)
  log_q = -0.5 * ((grid - np.sqrt(level) * x_start) / std) ** 2 - np.log(std)
  log_p = -0.5 * grid**2
  density = np.exp(log_q) / np.sqrt(2 * np.pi)
  integral = np.trapezoid(density * (log_q - log_p), grid) / np.log(2)
  found = likelihood.prior_term(schedule, jnp.full((2, 3, 1), x_start))
  np.testing.assert_allclose(found, [integral] * 2, rtol=1e-5)
  assert integral > 1e-3


def test_a_few_terms_estimate_all_without_bias(schedule):
  denoise_fn, _ = exact(schedule, "eps")
  x_start = SCALE * normal(4000, 16)
  bound = functools.partial(
    likelihood.vlb,
    denoise_fn,
    schedule,
    x_start,
    prediction="eps",
    variance="fixed_small",
    discrete=False,
  )
  all_terms = bound(jax.random.key(0), num_terms=T)
  few = bound(jax.random.key(1), num_terms=8)
  assert few.terms.shape == few.timesteps.shape == (4000, 8)
  difference = np.asarray(few.bits_per_dim - all_terms.bits_per_dim)
  error = difference.std() / 4000**0.5
  assert abs(difference.mean()) < 3.5 * error < 0.1 * few.bits_per_dim.mean()
  edges = likelihood.strata(T, 8)
  assert np.all(few.timesteps >= edges[:-1])
  assert np.all(few.timesteps < edges[1:])
  assert len(np.unique(few.timesteps)) == T


@pytest.mark.parametrize("timesteps", [2, 7, 40, 1000])
def test_strata_cover_every_timestep_once(timesteps):
  for terms in range(2, timesteps + 1, 1 + timesteps // 30):
    edges = likelihood.strata(timesteps, terms)
    assert edges[0] == 0 and edges[1] == 1 and edges[-1] == timesteps
    assert len(edges) == terms + 1 and np.diff(edges).min() >= 1
  whole = likelihood.strata(timesteps, timesteps)
  np.testing.assert_array_equal(whole, np.arange(timesteps + 1))
  for wrong in (1, timesteps + 1):
    with pytest.raises(ValueError, match="num_terms must be in"):
      likelihood.strata(timesteps, wrong)


def test_rows_do_not_see_each_other(schedule):
  denoise_fn, _ = exact(schedule, "v")
  keys = jax.random.split(jax.random.key(0), 3)
  x_start = normal(3, 8)
  bound = functools.partial(
    likelihood.vlb,
    denoise_fn,
    schedule,
    num_terms=4,
    prediction="v",
    variance="fixed_small",
  )
  whole, one = bound(x_start, keys), bound(x_start[1:2], keys[1:2])
  for a, b in zip(whole, one):
    np.testing.assert_allclose(a[1:2], b, rtol=1e-5)


def test_the_network_is_told_the_timesteps_of_the_full_schedule(schedule):
  told = []

  def denoise_fn(x_t, timesteps):
    jax.debug.callback(lambda t: told.append(int(t)), timesteps[0])
    return x_t

  short = schedule.respace([3, 17, 39])
  found = likelihood.vlb(
    denoise_fn,
    short,
    normal(1, 4),
    jax.random.key(0),
    num_terms=3,
    prediction="eps",
    variance="fixed_small",
  )
  jax.block_until_ready(found)
  jax.effects_barrier()
  assert sorted(told) == [3, 17, 39]


def test_a_self_conditioned_network_sees_its_own_estimate(schedule):
  x_start = 0.5 * jnp.sin(normal(2, 6))

  def fn(x_t, timesteps, estimate):
    # Right, once it is given anything near the data.
    return jnp.where(estimate == 0, x_start + 0.1, x_start)

  found = likelihood.vlb(
    samplers.SelfConditioned(fn),
    schedule,
    x_start,
    jax.random.key(0),
    num_terms=T,
    prediction="x_start",
    variance="fixed_small",
  )
  np.testing.assert_allclose(found.terms[:, 1:], 0.0, atol=1e-5)


def test_levels_and_density_differ_by_the_width_of_a_level(schedule):
  # 8-bit mass = density x 2/255, where the density is flat over a level.
  x_start = jnp.asarray(np.arange(-100, 100, 10) / 127.5, jnp.float32)[None]
  bits = {
    discrete: likelihood.vlb(
      lambda x_t, t: x_start + 0.01,
      schedules.make_schedule("linear", T),
      x_start,
      jax.random.key(0),
      num_terms=2,
      prediction="x_start",
      variance="fixed_small",
      discrete=discrete,
    ).terms[0, 0]
    for discrete in (True, False)
  }
  np.testing.assert_allclose(
    bits[True] - bits[False], np.log2(255 / 2), atol=5e-3
  )


def test_process_gives_the_bound_of_what_it_is(schedule):
  denoise_fn, error = exact(schedule, "eps")
  made = process.Process(
    num_timesteps=T, prediction="eps", variance="analytic", num_vlb_terms=100
  )
  x_start, rng = SCALE * normal(2, 30), jax.random.key(0)
  found = made.vlb(denoise_fn, x_start, rng, discrete=False, x_start_mse=error)
  expected = likelihood.vlb(
    denoise_fn,
    schedule,
    x_start,
    rng,
    num_terms=T,  # there are no more
    prediction="eps",
    variance=gaussian.AnalyticVariance(error),
    discrete=False,
  )
  np.testing.assert_allclose(found.bits_per_dim, expected.bits_per_dim)
