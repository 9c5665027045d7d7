"""Samplers, on data N(MEAN, STD^2), of which the best denoiser is known.

The best prediction of x_start is linear in x_t, so a sample is linear in x_T
and in the noise of every step. Its distribution is therefore known exactly
from its response to one unit of each (`_moments`), without drawing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import draws, gaussian, samplers, schedules

MEAN, STD = 0.3, 0.5
SCHEDULE = schedules.make_schedule("cosine", 1000)
LEVELS = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)
PREDICTIONS = ["eps", "x_start", "v"]
# E (x_start - its best prediction)^2, by timestep.
X_START_MSE = STD**2 * (1 - LEVELS) / (LEVELS * STD**2 + 1 - LEVELS)
SAMPLERS = {
  "ddpm_small": functools.partial(samplers.ddpm, variance="fixed_small"),
  "ddpm_large": functools.partial(samplers.ddpm, variance="fixed_large"),
  "ddpm_learned": functools.partial(samplers.ddpm, variance="learned_range"),
  "ddpm_analytic": functools.partial(
    samplers.ddpm, variance=gaussian.AnalyticVariance(X_START_MSE)
  ),
  "ddim_0": functools.partial(samplers.ddim, variance="fixed_small", eta=0.0),
  "ddim_half": functools.partial(
    samplers.ddim, variance="learned_range", eta=0.5
  ),
  "ddim_1": functools.partial(samplers.ddim, variance="fixed_small", eta=1.0),
  "dpmpp_2m": functools.partial(samplers.dpmpp_2m, variance="fixed_small"),
  "heun": functools.partial(samplers.heun, variance="learned_range"),
}


def _normal(shape, seed=0):
  # By numpy: jax.random would be compiled anew for every shape.
  draws = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(draws, jnp.float32)


def _column(values, x):
  return values.reshape((-1,) + (1,) * (x.ndim - 1))


def _denoiser(prediction="x_start", variance_table=None, mean=MEAN, std=STD):
  """The best network for N(mean, std^2); 2C channels if given a table [T]."""

  def denoise(x_t, timesteps):
    level = _column(LEVELS[timesteps], x_t)
    signal = jnp.sqrt(level)
    gain = signal * std**2 / (level * std**2 + 1 - level)
    x_start = mean + gain * (x_t - signal * mean)
    eps = (x_t - signal * x_start) / jnp.sqrt(1 - level)
    output = gaussian.target(SCHEDULE, x_start, eps, timesteps, prediction)
    if variance_table is None:
      return output
    variance_output = _column(jnp.asarray(variance_table)[timesteps], x_t)
    variance_output = jnp.broadcast_to(variance_output, x_t.shape)
    return jnp.concatenate([output, variance_output], axis=-1)

  return denoise


def _exact_variance_table(num_steps):
  """Variance channels [T] that make every step's variance the true one.

  Var(x_{t-1} | x_t) is the posterior's plus that of its mean, in which x_start
  is uncertain.
  """
  respaced = SCHEDULE.respace(num_steps)
  level = respaced.alphas_cumprod
  uncertainty = STD**2 * (1 - level) / (level * STD**2 + 1 - level)
  log_variance = np.log(
    respaced.posterior_variance
    + respaced.posterior_mean_coef_x_start**2 * uncertainty
  )
  small = respaced.posterior_log_variance_clipped
  large = np.log(respaced.betas)
  table = np.zeros(SCHEDULE.num_timesteps)
  table[respaced.timestep_map] = (
    2 * (log_variance - small) / (large - small) - 1
  )
  return table.astype(np.float32)


def _network_for(name, prediction, num_steps, **kwargs):
  learned = SAMPLERS[name].keywords["variance"] == "learned_range"
  table = _exact_variance_table(num_steps) if learned else None
  return _denoiser(prediction, table, **kwargs)


def _moments(sample, num_steps, shape=(2,)):
  """Mean and variance [*shape] of sample(x_T, noise) under unit normals."""
  response = jnp.eye(num_steps + 2)[1:]  # row 0 of the batch: no noise at all
  response = response.reshape(num_steps + 1, -1, *(1,) * len(shape))
  response = jnp.broadcast_to(response, (num_steps + 1, num_steps + 2, *shape))
  x_0 = np.asarray(sample(response[0], response[1:]), np.float64)
  return x_0[0], np.sum((x_0[1:] - x_0[0]) ** 2, axis=0)


def _run(name, num_steps, prediction="x_start", **kwargs):
  """A jitted sampler of x_T and noise."""
  denoise = _network_for(name, prediction, num_steps, **kwargs)
  return jax.jit(
    lambda x_T, noise: SAMPLERS[name](
      denoise,
      SCHEDULE,
      x_T,
      None,
      num_steps=num_steps,
      prediction=prediction,
      noise=noise,
    )
  )


# Exactness


@pytest.mark.parametrize("num_steps", [2, 20])
@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
@pytest.mark.parametrize("name", ["ddpm_learned", "ddpm_analytic"])
def test_ddpm_with_the_true_variance_is_exact(name, num_steps, shape):
  mean, variance = _moments(_run(name, num_steps), num_steps, shape)
  # The last step returns a mean: it leaves out what x_{t=0} does not tell.
  level = SCHEDULE.respace(num_steps).alphas_cumprod[0]
  told = level * STD**2 / (level * STD**2 + 1 - level)
  np.testing.assert_allclose(mean, MEAN, atol=1e-4)
  np.testing.assert_allclose(variance, told * STD**2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 20])
def test_ddpm_with_fixed_large_is_exact_on_a_standard_normal(num_steps):
  """Which is what beta is the right variance for (Ho et al., section 3.2)."""
  sample = _run("ddpm_large", num_steps, mean=0.0, std=1.0)
  mean, variance = _moments(sample, num_steps)
  np.testing.assert_allclose(mean, 0, atol=1e-6)
  np.testing.assert_allclose(variance, SCHEDULE.alphas_cumprod[0], rtol=1e-4)


def test_going_back_and_down_again_leaves_the_distribution_exact():
  num_steps = samplers.num_network_calls("ddpm", 12, 3, 4)
  assert num_steps == 12 + 2 * 4 * 2  # twice back by 4, at two places
  run = jax.jit(
    lambda x_T, noise: samplers.ddpm(
      _denoiser(),
      SCHEDULE,
      x_T,
      None,
      num_steps=12,
      num_resamples=3,
      jump_length=4,
      prediction="x_start",
      variance=gaussian.AnalyticVariance(X_START_MSE),
      noise=noise,
    )
  )
  mean, variance = _moments(run, num_steps)
  level = SCHEDULE.alphas_cumprod[0]
  told = level * STD**2 / (level * STD**2 + 1 - level)
  np.testing.assert_allclose(mean, MEAN, atol=1e-4)
  np.testing.assert_allclose(variance, told * STD**2, rtol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_many_steps_sample_the_data(name):
  mean, variance = _moments(_run(name, 250), 250)
  np.testing.assert_allclose(mean, MEAN, atol=3e-3)
  np.testing.assert_allclose(variance, STD**2, rtol=0.04)


@pytest.mark.parametrize("name", ["ddpm_learned", "ddim_1"])
def test_drawn_noise_samples_the_data(name):
  """Moments of samples with drawn noise, independent across dimensions."""
  num_steps, shape = 50, (4096, 6)
  x_T = _normal(shape)
  denoise = _network_for(name, "eps", num_steps)
  x_0 = jax.jit(
    lambda x_T, rng: SAMPLERS[name](
      denoise, SCHEDULE, x_T, rng, num_steps=num_steps, prediction="eps"
    )
  )(x_T, jax.random.key(1))
  mean, variance = _moments(_run(name, num_steps, "eps"), num_steps)
  size = np.prod(shape)
  np.testing.assert_allclose(
    np.mean(x_0), mean[0], atol=4 * STD / np.sqrt(size)
  )
  np.testing.assert_allclose(
    np.var(x_0), variance[0], rtol=4 * np.sqrt(2 / size)
  )
  correlation = np.corrcoef(x_0, rowvar=False) - np.eye(shape[1])
  assert np.abs(correlation).max() < 5 / np.sqrt(shape[0])


def _flow(x_T):
  """Where DDIM's ordinary differential equation carries x_T."""
  level = SCHEDULE.alphas_cumprod[-1]
  std_T = np.sqrt(level * STD**2 + 1 - level)
  return MEAN + STD * (x_T - np.sqrt(level) * MEAN) / std_T


def test_ddim_converges_to_the_flow_at_first_order():
  x_T = jnp.linspace(-2, 2, 10).reshape(2, 5)
  errors = [
    np.abs(_run("ddim_0", n)(x_T, None) - _flow(np.asarray(x_T))).max()
    for n in (250, 500)
  ]
  assert errors[1] < 0.01
  np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.15)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
def test_higher_order_samplers_are_nearer_to_the_exact_moments(name):
  errors = {}
  for sampler in ("ddim_0", name):
    mean, variance = _moments(_run(sampler, 20), 20)
    np.testing.assert_allclose(mean, MEAN, atol=1e-4)
    errors[sampler] = np.abs(variance - STD**2).max()
  assert errors[name] < 0.5 * errors["ddim_0"]


def test_one_or_two_steps_of_dpmpp_are_ddim():
  x_T = _normal((3, 4))
  for num_steps in (1, 2):
    np.testing.assert_allclose(
      _run("dpmpp_2m", num_steps)(x_T, None),
      _run("ddim_0", num_steps)(x_T, None),
      atol=1e-5,
    )


def test_heun_calls_the_network_twice_but_for_the_last_step():
  x_0, trace = samplers.heun(
    _denoiser(),
    SCHEDULE,
    _normal((2, 3)),
    num_steps=[10, 400, 999],
    prediction="x_start",
    variance="fixed_small",
    return_trace=True,
  )
  assert trace.timesteps.tolist() == [999, 400, 400, 10, 10]
  np.testing.assert_allclose(trace.x_start[-1], x_0, atol=1e-6)


def _invert(x_start, num_steps, prediction="x_start", **kwargs):
  denoise = _denoiser(prediction)
  return jax.jit(
    lambda x: samplers.ddim_inverse(
      denoise,
      SCHEDULE,
      x,
      num_steps=num_steps,
      prediction=prediction,
      variance="fixed_small",
      **kwargs,
    )
  )(x_start)


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 1, 3)])
def test_ddim_inverse_is_undone_by_ddim(shape):
  x_start = MEAN + STD * _normal(shape)
  errors = []
  for num_steps in (250, 500):
    x_T = _invert(x_start, num_steps)
    x_0 = _run("ddim_0", num_steps)(x_T, None)
    errors.append(np.abs(x_0 - x_start).max())
  assert errors[1] < 0.01
  np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.15)
  np.testing.assert_allclose(_flow(np.asarray(x_T)), x_start, atol=0.02)


def test_refinements_make_the_inverse_exact():
  x_start = MEAN + STD * _normal((4, 6))
  errors = []
  for num_refinements in (0, 2, 6):
    x_T = _invert(x_start, 100, num_refinements=num_refinements)
    x_0 = _run("ddim_0", 100)(x_T, None)
    errors.append(np.abs(x_0 - x_start).max())
  assert errors[1] < 0.5 * errors[0] and errors[2] < 0.1 * errors[0]


def test_ddim_inverse_leaves_the_data_by_the_first_level():
  """One step of a network that says eps = 0.7 everywhere is q_sample."""
  x_start = jnp.array([[0.2, -0.4]])
  x_1 = samplers.ddim_inverse(
    lambda x_t, timesteps: jnp.full_like(x_t, 0.7),
    SCHEDULE,
    x_start,
    num_steps=[400],
    prediction="eps",
    variance="fixed_small",
  )
  expected = gaussian.q_sample(
    SCHEDULE, x_start, jnp.array([400]), jnp.full_like(x_start, 0.7)
  )
  np.testing.assert_allclose(x_1, expected, rtol=1e-5)


# Equivalences


def test_ddim_with_eta_1_is_ddpm_with_fixed_small():
  x_T = _normal((4, 6))
  sampled = [
    SAMPLERS[name](
      _denoiser(),
      SCHEDULE,
      x_T,
      jax.random.key(1),
      num_steps=10,
      prediction="x_start",
    )
    for name in ("ddpm_small", "ddim_1")
  ]
  np.testing.assert_allclose(*sampled, atol=1e-4)


@pytest.mark.parametrize("clip_x_start", [None, 0.6])
@pytest.mark.parametrize(
  "name", ["ddpm_learned", "ddim_half", "dpmpp_2m", "heun"]
)
def test_predictions_give_the_same_samples(name, clip_x_start):
  x_T, *noise = _normal((11, 4, 6))
  x_0 = {}
  for prediction in PREDICTIONS:
    x_0[prediction] = SAMPLERS[name](
      _network_for(name, prediction, 10),
      SCHEDULE,
      x_T,
      None,
      num_steps=10,
      prediction=prediction,
      clip_x_start=clip_x_start,
      noise=jnp.stack(noise),
    )
  np.testing.assert_allclose(x_0["eps"], x_0["x_start"], atol=2e-3)
  np.testing.assert_allclose(x_0["v"], x_0["x_start"], rtol=1e-4, atol=2e-5)


def test_predictions_give_the_same_inverse():
  x_start = MEAN + STD * _normal((4, 6))
  x_T = {p: _invert(x_start, 10, p) for p in PREDICTIONS}
  np.testing.assert_allclose(x_T["eps"], x_T["x_start"], atol=1e-3)
  np.testing.assert_allclose(x_T["v"], x_T["x_start"], atol=1e-3)


@pytest.mark.parametrize("name", ["ddpm_learned", "ddim_half"])
def test_pictures_and_embeddings_are_sampled_alike(name):
  x_T, noise = _normal((3, 12)), _normal((8, 3, 12), seed=1)
  sample = _run(name, 8)
  pictures = sample(x_T.reshape(3, 2, 2, 3), noise.reshape(8, 3, 2, 2, 3))
  np.testing.assert_allclose(
    pictures.reshape(3, 12), sample(x_T, noise), atol=1e-6
  )


# Randomness


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 2, 3)])
def test_draws_by_example_do_not_depend_on_the_batch(shape):
  keys = jax.random.split(jax.random.key(0), 5)
  together = draws.normal(keys, shape)
  apart = draws.normal(keys[3:4], (1, *shape[1:]))
  np.testing.assert_array_equal(together[3:4], apart)
  assert len(np.unique(together)) == np.prod(shape)
  one_key = draws.normal(keys[0], shape)
  assert one_key.shape == shape and len(np.unique(one_key)) == np.prod(shape)


@pytest.mark.parametrize("name", ["ddpm_small", "ddim_half"])
def test_samples_by_example_do_not_depend_on_the_batch(name):
  keys = jax.random.split(jax.random.key(0), 5)
  x_T = _normal((5, 3))

  def sample(x_T, rng):
    return SAMPLERS[name](
      _network_for(name, "eps", 6),
      SCHEDULE,
      x_T,
      rng,
      num_steps=6,
      prediction="eps",
    )

  together = sample(x_T, keys)
  np.testing.assert_allclose(sample(x_T[3:], keys[3:]), together[3:], atol=1e-6)
  assert np.abs(sample(x_T[3:], keys[:2]) - together[3:]).max() > 0.01


@pytest.mark.parametrize("by_example", [False, True])
def test_noise_stands_in_for_draws_step_by_step(by_example):
  rng = jax.random.key(0)
  if by_example:
    rng = jax.random.split(rng, 4)
  x_T = _normal((4, 3))
  fold_in = jax.random.fold_in
  noise = jnp.stack(
    [
      draws.normal(
        jax.vmap(fold_in, (0, None))(rng, i) if by_example else fold_in(rng, i),
        x_T.shape,
      )
      for i in range(6)
    ]
  )
  options = {"num_steps": 6, "prediction": "x_start", "variance": "fixed_small"}
  drawn = samplers.ddpm(_denoiser(), SCHEDULE, x_T, rng, **options)
  given = samplers.ddpm(
    _denoiser(), SCHEDULE, x_T, None, noise=noise, **options
  )
  np.testing.assert_allclose(given, drawn, atol=1e-6)
  # The last step adds none, the one before it does.
  other = samplers.ddpm(
    _denoiser(), SCHEDULE, x_T, None, noise=noise.at[-1].set(9.0), **options
  )
  np.testing.assert_array_equal(other, given)
  other = samplers.ddpm(
    _denoiser(), SCHEDULE, x_T, None, noise=noise.at[-2].set(9.0), **options
  )
  assert np.abs(other - given).min() > 0.01


# The program


def _count_scans(jaxpr):
  """Number of scans in a jaxpr, at any depth."""
  count = 0
  for eqn in jaxpr.eqns:
    count += eqn.primitive.name == "scan"
    for value in eqn.params.values():
      if hasattr(value, "jaxpr"):
        count += _count_scans(value.jaxpr)
  return count


@pytest.mark.parametrize(
  "name",
  ["ddpm_learned", "ddim_0", "ddim_half", "ddim_inverse", "dpmpp_2m", "heun"],
)
def test_a_sampler_is_one_scan_that_is_traced_once(name):
  num_calls = 0

  def denoise(x_t, timesteps):
    nonlocal num_calls
    num_calls += 1
    if name == "ddim_inverse":
      return _denoiser("eps")(x_t, timesteps)
    return _network_for(name, "eps", 30)(x_t, timesteps)

  @jax.jit
  def sample(x_T, rng):
    if name == "ddim_inverse":
      return samplers.ddim_inverse(
        denoise,
        SCHEDULE,
        x_T,
        num_steps=30,
        prediction="eps",
        variance="fixed_small",
      )
    return SAMPLERS[name](
      denoise, SCHEDULE, x_T, rng, num_steps=30, prediction="eps"
    )

  rng = jax.random.key(0)
  first = sample(jnp.ones((2, 3)), rng)
  second = sample(jnp.zeros((2, 3)), jax.random.key(1))
  assert num_calls == 1
  assert np.abs(first - second).max() > 0.01
  jaxpr = jax.make_jaxpr(sample)(jnp.ones((2, 3)), rng)
  assert _count_scans(jaxpr.jaxpr) == 1


@pytest.mark.parametrize("name", ["ddpm_learned", "ddim_half"])
def test_the_trace_tells_what_every_step_saw(name):
  x_T = _normal((2, 3))
  denoise = _network_for(name, "x_start", 25)
  sample = functools.partial(
    SAMPLERS[name],
    denoise,
    SCHEDULE,
    x_T,
    jax.random.key(1),
    num_steps=25,
    prediction="x_start",
  )
  x_0, trace = sample(return_trace=True)
  np.testing.assert_allclose(sample(), x_0, atol=1e-6)
  assert trace.timesteps[:4].tolist() == [999, 957, 916, 874]
  assert trace.timesteps[-2:].tolist() == [42, 0]
  np.testing.assert_array_equal(trace.x_t[0], x_T)
  np.testing.assert_allclose(trace.x_start[-1], x_0, atol=1e-6)
  for i in (0, 11, 24):
    predicted = denoise(trace.x_t[i], jnp.full(2, trace.timesteps[i]))
    np.testing.assert_allclose(
      trace.x_start[i], predicted[:, :3], rtol=1e-5, atol=1e-6
    )


def test_the_inverse_sees_the_data_first_and_then_growing_noise():
  x_start = jnp.ones((2, 3))
  x_T, trace = _invert(x_start, [0, 300, 999], return_trace=True)
  assert trace.timesteps.tolist() == [0, 0, 300]
  np.testing.assert_array_equal(trace.x_t[0], x_start)
  assert x_T.shape == (2, 3)


def test_ddim_rederives_eps_from_a_clipped_x_start():
  x_T = jnp.array([[1.5, -1.0]])
  _, trace = samplers.ddim(
    lambda x_t, timesteps: jnp.full_like(x_t, 4.0),
    SCHEDULE,
    x_T,
    None,
    num_steps=[200, 800],
    prediction="x_start",
    variance="fixed_small",
    clip_x_start=0.9,
    return_trace=True,
  )
  np.testing.assert_allclose(trace.x_start, 0.9)
  from_level, to_level = SCHEDULE.alphas_cumprod[[800, 200]]
  eps = (np.asarray(x_T) - np.sqrt(from_level) * 0.9) / np.sqrt(1 - from_level)
  expected = np.sqrt(to_level) * 0.9 + np.sqrt(1 - to_level) * eps
  np.testing.assert_allclose(trace.x_t[1], expected, rtol=1e-5)


def test_samples_are_float32_for_a_bfloat16_network():
  denoise = _denoiser()
  x_0 = samplers.ddpm(
    lambda x_t, timesteps: denoise(x_t, timesteps).astype(jnp.bfloat16),
    SCHEDULE,
    jnp.ones((2, 3), jnp.bfloat16),
    jax.random.key(0),
    num_steps=3,
    prediction="x_start",
    variance="fixed_small",
  )
  assert x_0.dtype == jnp.float32


@pytest.mark.parametrize(
  "name, rng, options, message",
  [
    ("ddpm_small", None, {}, "needs rng"),
    ("ddim_half", None, {}, "needs rng"),
    ("ddim_0", None, {"eta": 1.5}, r"eta must be in \[0, 1\]"),
    ("ddim_0", None, {"eta": -0.1}, r"eta must be in \[0, 1\]"),
    ("ddpm_small", None, {"noise": jnp.zeros((3, 2, 3))}, "noise must be"),
    ("ddpm_small", jax.random.PRNGKey(0), {}, "rng must be typed"),
    ("ddpm_small", jax.random.split(jax.random.key(0), 3), {}, "one per"),
    ("ddpm_small", jax.random.key(0), {"num_steps": 1001}, "1000"),
  ],
)
def test_mistakes_are_named(name, rng, options, message):
  options = {"num_steps": 4, "prediction": "x_start"} | options
  with pytest.raises(ValueError, match=message):
    SAMPLERS[name](_denoiser(), SCHEDULE, jnp.ones((2, 3)), rng, **options)
