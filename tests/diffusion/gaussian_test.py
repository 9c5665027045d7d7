"""Gaussian diffusion: laws of the noising process, predictions and losses."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian, schedules

SHAPES = [(7, 6), (7, 2, 4, 3)]
PREDICTIONS = ["eps", "x_start", "v"]
TIMESTEPS = jnp.array([0, 1, 100, 300, 500, 800, 950])
T = 1000


@pytest.fixture(scope="module", params=["cosine", "linear"])
def schedule(request):
  return schedules.make_schedule(request.param, T)


def _normal(shape, seed=0):
  # By numpy: jax.random would be compiled anew for every shape.
  draws = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(draws, jnp.float32)


def _draw(shape, seed=0):
  """x_start inside of (-1, 1), and noise."""
  return 0.9 * jnp.sin(3 * _normal(shape, seed)), _normal(shape, seed + 1)


def _like(table, x):
  return np.asarray(table).reshape((-1,) + (1,) * (x.ndim - 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample_is_the_markov_chain_of_the_betas(schedule, shape):
  mean, variance = [1.0], [0.0]
  for beta in schedule.betas:
    mean.append(math.sqrt(1 - beta) * mean[-1])
    variance.append((1 - beta) * variance[-1] + beta)
  mean = np.array(mean[1:])[np.asarray(TIMESTEPS)]
  variance = np.array(variance[1:])[np.asarray(TIMESTEPS)]
  x_start, noise = _draw(shape)
  x_t = gaussian.q_sample(schedule, x_start, TIMESTEPS, noise)
  np.testing.assert_allclose(
    x_t,
    _like(mean, x_start) * x_start + _like(np.sqrt(variance), noise) * noise,
    atol=1e-5,
  )


def test_q_sample_has_the_moments_of_the_closed_form(schedule):
  num_draws = 20_000
  noise = _normal((len(TIMESTEPS), num_draws))
  x_t = gaussian.q_sample(schedule, jnp.full_like(noise, 0.7), TIMESTEPS, noise)
  level = schedule.alphas_cumprod[np.asarray(TIMESTEPS)]
  error = np.abs(np.mean(x_t, axis=1) - 0.7 * np.sqrt(level))
  assert np.all(error < 4 * np.sqrt((1 - level) / num_draws))
  ratio = np.var(x_t, axis=1) / (1 - level)
  np.testing.assert_allclose(ratio, 1, atol=4 * math.sqrt(2 / num_draws))


@pytest.mark.parametrize("shape", SHAPES)
def test_q_posterior_is_bayes_rule(schedule, shape):
  timesteps = TIMESTEPS.at[0].set(2)  # t = 0 is degenerate: see below
  t = np.asarray(timesteps)
  x_start, x_t = _draw(shape)
  beta = _like(schedule.betas[t], x_start)
  level_prev = _like(schedule.alphas_cumprod[t - 1], x_start)
  # q(x_{t-1} | x_start) is the prior, q(x_t | x_{t-1}) the likelihood.
  precision = 1 / (1 - level_prev) + (1 - beta) / beta
  mean = (
    np.sqrt(level_prev) * np.asarray(x_start) / (1 - level_prev)
    + np.sqrt(1 - beta) * np.asarray(x_t) / beta
  ) / precision
  got_mean, got_variance, got_log_variance = gaussian.q_posterior(
    schedule, x_start, x_t, timesteps
  )
  np.testing.assert_allclose(got_mean, mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got_variance, 1 / precision, rtol=1e-5)
  np.testing.assert_allclose(got_log_variance, -np.log(precision), rtol=1e-5)


def test_q_posterior_at_0_is_x_start_with_the_next_variance(schedule):
  x_start, x_t = _draw((1, 5))
  t = jnp.array([0])
  mean, variance, log_variance = gaussian.q_posterior(schedule, x_start, x_t, t)
  np.testing.assert_allclose(mean, x_start, rtol=1e-6)
  np.testing.assert_array_equal(variance, 0)
  _, _, next_log_variance = gaussian.q_posterior(schedule, x_start, x_t, t + 1)
  np.testing.assert_array_equal(log_variance, next_log_variance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_back_x_start_and_noise(
  schedule, shape, prediction
):
  x_start, noise = _draw(shape)
  x_t = gaussian.q_sample(schedule, x_start, TIMESTEPS, noise)
  output = gaussian.target(schedule, x_start, noise, TIMESTEPS, prediction)
  args = (schedule, output, x_t, TIMESTEPS)
  np.testing.assert_allclose(
    gaussian.predict_x_start(*args, prediction=prediction), x_start, atol=1e-4
  )
  np.testing.assert_allclose(
    gaussian.predict_eps(*args, prediction=prediction), noise, atol=1e-4
  )


@pytest.mark.parametrize("first", PREDICTIONS)
@pytest.mark.parametrize("second", PREDICTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_convert_into_each_other_and_back(
  schedule, shape, first, second
):
  """Holds for any output, not only for one that fits x_t."""
  x_t, output = _draw(shape, seed=1)

  def convert(output, source, sink):
    args = (schedule, output, x_t, TIMESTEPS)
    x_start = gaussian.predict_x_start(*args, prediction=source)
    eps = gaussian.predict_eps(*args, prediction=source)
    np.testing.assert_allclose(
      gaussian.q_sample(schedule, x_start, TIMESTEPS, eps), x_t, atol=1e-5
    )
    return gaussian.target(schedule, x_start, eps, TIMESTEPS, sink)

  converted = convert(output, first, second)
  np.testing.assert_allclose(
    convert(converted, second, first), output, atol=2e-4
  )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_the_true_posterior(schedule, shape, prediction):
  x_start, noise = _draw(shape)
  x_t = gaussian.q_sample(schedule, x_start, TIMESTEPS, noise)
  mean, _, log_variance = gaussian.q_posterior(
    schedule, x_start, x_t, TIMESTEPS
  )
  predicted = gaussian.p_mean_variance(
    schedule,
    gaussian.target(schedule, x_start, noise, TIMESTEPS, prediction),
    x_t,
    TIMESTEPS,
    prediction=prediction,
    variance="fixed_small",
  )
  np.testing.assert_allclose(predicted.mean, mean, atol=1e-5)
  np.testing.assert_allclose(predicted.x_start, x_start, atol=1e-4)
  np.testing.assert_array_equal(
    predicted.log_variance, np.broadcast_to(log_variance, shape)
  )


def test_clipping_bounds_x_start_and_moves_the_mean(schedule):
  x_start, x_t = _draw((7, 6))
  predicted = gaussian.p_mean_variance(
    schedule,
    3 * x_start,
    x_t,
    TIMESTEPS,
    prediction="x_start",
    variance="fixed_small",
    clip_x_start=0.5,
  )
  clipped = np.clip(3 * x_start, -0.5, 0.5)
  np.testing.assert_array_equal(predicted.x_start, clipped)
  mean, _, _ = gaussian.q_posterior(schedule, clipped, x_t, TIMESTEPS)
  np.testing.assert_array_equal(predicted.mean, mean)


def _log_variance(schedule, variance, variance_output=None):
  x_t = jnp.zeros((len(TIMESTEPS), 2, 2, 3))
  output = x_t
  if variance_output is not None:
    output = jnp.concatenate([x_t, x_t + variance_output], axis=-1)
  return gaussian.p_mean_variance(
    schedule,
    output,
    x_t,
    TIMESTEPS,
    prediction="eps",
    variance=variance,
  ).log_variance


def test_learned_range_ends_at_the_posterior_and_at_beta(schedule):
  small = _log_variance(schedule, "fixed_small")
  large = _log_variance(schedule, "fixed_large")
  lower = _log_variance(schedule, "learned_range", -1.0)
  upper = _log_variance(schedule, "learned_range", 1.0)
  middle = _log_variance(schedule, "learned_range", 0.0)
  np.testing.assert_allclose(lower, small, rtol=1e-6)
  np.testing.assert_allclose(upper[1:], large[1:], rtol=1e-6)
  np.testing.assert_allclose(middle, (lower + upper) / 2, rtol=1e-5)
  betas = _like(schedule.betas[np.asarray(TIMESTEPS)], upper)
  np.testing.assert_allclose(
    upper, np.broadcast_to(np.log(betas), upper.shape), rtol=1e-5
  )
  # Only at t = 0 does fixed_large depart from beta (Ho et al.'s code).
  np.testing.assert_array_equal(large[0], small[0])


def test_the_analytic_variance_is_that_of_the_theorem(schedule):
  """Bao et al. 2022, theorem 1, from the score's norm on N(0, 0.25)."""
  schedule = schedule.respace(range(0, schedule.num_timesteps, 7))
  level, last = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
  score_norm = 1 / (level * 0.25 + 1 - level)  # Gamma: E score^2 a dimension
  posterior = schedule.posterior_variance
  theorem = posterior + (
    np.sqrt((1 - level) / (1 - schedule.betas)) - np.sqrt(1 - last - posterior)
  ) ** 2 * (1 - (1 - level) * score_norm)
  table = np.zeros(schedule.timestep_map[-1] + 1)
  table[schedule.timestep_map] = 0.25 * (1 - level) * score_norm
  x = jnp.zeros((schedule.num_timesteps, 3))
  found = gaussian.p_mean_variance(
    schedule,
    x,
    x,
    jnp.arange(schedule.num_timesteps),
    prediction="eps",
    variance=gaussian.AnalyticVariance(jnp.asarray(table, jnp.float32)),
  ).log_variance
  expected = np.broadcast_to(np.log(theorem)[:, None], x.shape)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_variance_channels_are_the_last_half():
  output, variance_output = gaussian.split_variance(
    jnp.arange(12.0).reshape(2, 6)
  )
  assert output.tolist() == [[0, 1, 2], [6, 7, 8]]
  assert variance_output.tolist() == [[3, 4, 5], [9, 10, 11]]


def test_kl_is_the_integral():
  grid = np.linspace(-30, 30, 200_001)

  def log_density(mean, log_variance):
    return -0.5 * (
      np.log(2 * np.pi)
      + log_variance
      + (grid - mean) ** 2 / np.exp(log_variance)
    )

  first, second = (0.3, -0.5), (-0.6, 0.4)
  log_1, log_2 = log_density(*first), log_density(*second)
  integral = np.sum(np.exp(log_1) * (log_1 - log_2)) * (grid[1] - grid[0])
  args = [jnp.array(value) for value in first + second]
  np.testing.assert_allclose(gaussian.normal_kl(*args), integral, rtol=1e-5)
  assert gaussian.normal_kl(*args[:2], *args[:2]) == 0


@pytest.mark.parametrize("std", [0.003, 0.05, 1.0, 20.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.004, 0.0, 0.611, 2.0])
def test_discretised_likelihood_sums_to_one_over_the_levels(mean, std):
  levels = jnp.arange(256) / 127.5 - 1
  log_likelihood = gaussian.discretized_gaussian_log_likelihood(
    levels, jnp.full(256, mean), jnp.full(256, 2 * math.log(std))
  )
  np.testing.assert_allclose(np.exp(log_likelihood).sum(), 1, rtol=1e-4)


@pytest.mark.parametrize("distance", [-6.0, -2.0, 0.0, 0.4, 6.0])
def test_discretised_likelihood_is_the_mass_of_a_bin(distance):
  """Six deviations out, where a naive float32 difference has no digits."""
  std = 0.05
  x = 128 / 127.5 - 1
  mean = x - distance * std

  def cdf(value):
    return math.erfc((mean - value) / std / math.sqrt(2)) / 2

  if distance > 0:  # the lower tail, for the precision of float64
    mean = x + distance * std
  mass = cdf(x + 1 / 255) - cdf(x - 1 / 255)
  got = gaussian.discretized_gaussian_log_likelihood(
    jnp.array(x), jnp.array(x - distance * std), jnp.array(2 * math.log(std))
  )
  np.testing.assert_allclose(got, math.log(mass), rtol=1e-4)


@functools.partial(jax.jit, static_argnames=("schedule", "prediction"))
def _losses(schedule, output, x_start, noise, timesteps, prediction="eps"):
  x_t = gaussian.q_sample(schedule, x_start, timesteps, noise)
  return gaussian.training_losses(
    schedule,
    output,
    x_start,
    x_t,
    timesteps,
    noise,
    prediction=prediction,
    variance="learned_range",
  )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_of_a_perfect_network(shape, prediction):
  schedule = schedules.make_schedule("cosine", T)
  x_start, noise = _draw(shape)
  perfect = gaussian.target(schedule, x_start, noise, TIMESTEPS, prediction)
  output = jnp.concatenate([perfect, -jnp.ones(shape)], axis=-1)
  losses = _losses(schedule, output, x_start, noise, TIMESTEPS, prediction)
  np.testing.assert_allclose(losses["mse"], 0, atol=1e-12)
  np.testing.assert_allclose(losses["vlb"][1:], 0, atol=1e-4)
  # At t = 0: how much of the decoder's normal lies outside of a level's bin.
  std = math.exp(schedule.posterior_log_variance_clipped[0] / 2)
  mass = math.erf(1 / 255 / std / math.sqrt(2))
  np.testing.assert_allclose(losses["vlb"][0], -math.log2(mass), rtol=1e-2)


def test_bound_is_least_for_the_true_posterior():
  schedule = schedules.make_schedule("cosine", T)
  timesteps = jnp.array([1, 3, 10, 30])  # later, the range is almost a point
  x_start, noise = _draw((4, 6))
  vlb = {}
  for name, error, variance_output in [
    ("true", 0.0, -1.0),
    ("biased", 0.5, -1.0),
    ("wide", 0.0, 0.5),
    ("narrow", 0.0, -1.5),
  ]:
    output = jnp.concatenate(
      [noise + error, jnp.full_like(noise, variance_output)], axis=-1
    )
    vlb[name] = _losses(schedule, output, x_start, noise, timesteps)["vlb"]
  for name in ("biased", "wide", "narrow"):
    assert np.all(vlb[name] > vlb["true"] + 1e-5), name


def test_hybrid_loss_is_mse_plus_a_thousandth_of_the_bound():
  schedule = schedules.make_schedule("cosine", 40)
  x_start, noise = _draw((4, 3))
  output = _normal((4, 6), seed=5)
  losses = _losses(schedule, output, x_start, noise, jnp.array([0, 1, 20, 39]))
  np.testing.assert_allclose(
    losses["loss"], losses["mse"] + 40 * 0.001 * losses["vlb"], rtol=1e-6
  )
  np.testing.assert_allclose(
    losses["mse"], np.mean((output[:, :3] - noise) ** 2, axis=1), rtol=1e-6
  )


def test_bound_trains_the_variance_channels_only():
  schedule = schedules.make_schedule("cosine", T)
  x_start, noise = _draw((7, 6))
  output = _normal((7, 12), seed=5)

  def sums(output):
    losses = _losses(schedule, output, x_start, noise, TIMESTEPS)
    return {name: value.sum() for name, value in losses.items()}

  grad = jax.jit(jax.jacrev(sums))(output)
  of_loss, of_mse, of_vlb = grad["loss"], grad["mse"], grad["vlb"]
  np.testing.assert_array_equal(of_vlb[:, :6], 0)
  assert np.all(np.abs(of_vlb[:3, 6:]) > 0)
  np.testing.assert_allclose(of_loss[:, :6], of_mse[:, :6], rtol=1e-6)
  np.testing.assert_array_equal(of_mse[:, 6:], 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_and_gradients_are_finite_at_every_timestep(prediction):
  schedule = schedules.make_schedule("cosine", T)  # the further one of the two
  timesteps = jnp.arange(T)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def grad_fn(output, x_start):
    losses = _losses(schedule, output, x_start, noise, timesteps, prediction)
    return losses["loss"].sum(), losses

  x_start, noise = _draw((T, 5))
  for scale in (0.0, 1.0, 1e4):
    x_start = x_start.at[:, :3].set(jnp.array([-1.0, 1.0, scale]))
    output, variance_output = jnp.split(scale * _normal((T, 10)), 2, axis=1)
    output = jnp.concatenate(
      [output, jnp.clip(variance_output, -10, 10)], axis=1
    )
    grad, losses = grad_fn(output, x_start)
    for name, value in losses.items():
      assert value.shape == (T,) and value.dtype == jnp.float32, name
      assert np.all(np.isfinite(value)), (name, scale)
    assert np.all(np.isfinite(grad)), scale


def test_fixed_variance_has_no_bound(schedule):
  x_start, noise = _draw((7, 6))
  losses = gaussian.training_losses(
    schedule,
    jnp.zeros_like(noise),
    x_start,
    gaussian.q_sample(schedule, x_start, TIMESTEPS, noise),
    TIMESTEPS,
    noise,
    prediction="eps",
    variance="fixed_small",
  )
  assert set(losses) == {"loss", "mse"}
  np.testing.assert_array_equal(losses["loss"], losses["mse"])
  np.testing.assert_allclose(losses["mse"], np.mean(noise**2, 1), rtol=1e-6)


def test_losses_are_float32_for_a_bfloat16_network(schedule):
  x_start, noise = (x.astype(jnp.bfloat16) for x in _draw((7, 6)))
  output = jnp.ones((7, 12), jnp.bfloat16)
  losses = _losses(schedule, output, x_start, noise, TIMESTEPS)
  assert {value.dtype for value in losses.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  "channels, prediction, variance, message",
  [
    (3, "epsilon", "fixed_small", "unknown prediction 'epsilon'"),
    (3, "eps", "learned", "unknown variance 'learned'"),
    (6, "eps", "fixed_small", "does not fit variance='fixed_small'"),
    (4, "eps", "learned_range", "does not fit variance='learned_range'"),
    (3, "eps", "learned_range", "2C channels, got 3"),
  ],
)
def test_mistakes_are_named(schedule, channels, prediction, variance, message):
  with pytest.raises(ValueError, match=message):
    gaussian.p_mean_variance(
      schedule,
      jnp.zeros((1, channels)),
      jnp.zeros((1, 3)),
      jnp.array([3]),
      prediction=prediction,
      variance=variance,
    )


def test_min_snr_weighs_x_start_alike_whatever_is_predicted():
  schedule = schedules.make_schedule("cosine", T)
  x_start, noise = _draw((len(TIMESTEPS), 6))
  x_t = gaussian.q_sample(schedule, x_start, TIMESTEPS, noise)
  guess = x_start + 0.1 * noise[::-1]
  eps = gaussian.predict_eps(
    schedule, guess, x_t, TIMESTEPS, prediction="x_start"
  )
  snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
  error = np.mean((guess - x_start) ** 2, axis=1)
  expected = np.minimum(snr, 5.0)[np.asarray(TIMESTEPS)] * error
  for prediction in PREDICTIONS:
    losses = gaussian.training_losses(
      schedule,
      gaussian.target(schedule, guess, eps, TIMESTEPS, prediction),
      x_start,
      x_t,
      TIMESTEPS,
      noise,
      prediction=prediction,
      variance="fixed_small",
      min_snr_gamma=5.0,
    )
    np.testing.assert_allclose(losses["loss"], expected, rtol=2e-3)
  with pytest.raises(ValueError, match="gamma"):
    gaussian.min_snr_weight(schedule, 0.0, "eps")
