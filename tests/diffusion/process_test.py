"""Options of sampling that a process adds to the bare samplers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian, process, samplers

PROCESS = process.Process(prediction="x_start")


def _denoise(x_t, timesteps):
  scale = (timesteps + 1).reshape((-1,) + (1,) * (x_t.ndim - 1)) / 1000
  return jnp.tanh(x_t * (1 - scale)) + 0.2


def _normal(shape, seed=0):
  draws = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(draws, jnp.float32)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_every_sampler_is_a_function_of_its_key(sampler):
  def draw(seed):
    return PROCESS.sample(
      _denoise,
      (2, 3),
      jax.random.key(seed),
      sampler=sampler,
      num_sample_steps=4,
    )

  np.testing.assert_array_equal(draw(0), draw(0))
  assert np.abs(draw(0) - draw(1)).max() > 1e-3


def test_x_T_starts_a_deterministic_sampler_without_a_key():
  x_T = _normal((2, 3))
  alone = PROCESS.sample(_denoise, (2, 3), None, x_T=x_T, num_sample_steps=5)
  with_key = PROCESS.sample(
    _denoise, (2, 3), jax.random.key(3), x_T=x_T, num_sample_steps=5
  )
  np.testing.assert_array_equal(alone, with_key)


def test_inverting_and_sampling_gives_the_data_back():
  levels = jnp.asarray(PROCESS.noise_schedule.alphas_cumprod, jnp.float32)

  def denoise(x_t, timesteps):  # the best one for N(0, 0.25)
    level = levels[timesteps].reshape(-1, 1, 1, 1)
    return x_t * jnp.sqrt(level) / (level + 4 * (1 - level))

  x = 0.5 * _normal((2, 4, 4, 3))
  options = dict(num_sample_steps=500)
  x_T = PROCESS.invert(denoise, x, **options)
  back = PROCESS.sample(denoise, x.shape, None, x_T=x_T, **options)
  assert np.abs(back - x).max() < 0.02


def test_strength_says_how_many_steps_are_done():
  seen = []

  def denoise(x_t, timesteps):
    jax.debug.callback(lambda t: seen.append(int(t)), timesteps[0])
    return _denoise(x_t, timesteps)

  init = jnp.full((2, 3), 0.5)
  options = dict(num_sample_steps=10, init=init)
  PROCESS.sample(denoise, (2, 3), jax.random.key(0), strength=0.3, **options)
  jax.effects_barrier()
  assert sorted(seen) == [0, 111, 222]
  # One step from the least noise changes next to nothing.
  weak = PROCESS.sample(
    lambda x_t, t: x_t, (2, 3), jax.random.key(0), strength=0.1, **options
  )
  np.testing.assert_allclose(weak, init, atol=0.05)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_known_values_stay_bit_for_bit_and_are_seen_noised(sampler):
  known = jnp.tanh(_normal((2, 4, 4, 3), seed=1))
  is_known = jnp.zeros((1, 4, 4, 1), bool).at[:, :2].set(True)
  x_T = _normal((2, 4, 4, 3))
  seen = []

  def denoise(x_t, timesteps):
    jax.debug.callback(lambda x, t: seen.append((int(t), x)), x_t, timesteps[0])
    return _denoise(x_t, timesteps)

  x_0 = PROCESS.sample(
    denoise,
    known.shape,
    jax.random.key(0),
    sampler=sampler,
    num_sample_steps=5,
    x_T=x_T,
    known=known,
    is_known=is_known,
  )
  jax.effects_barrier()
  np.testing.assert_array_equal(x_0[:, :2], known[:, :2])
  assert np.abs(x_0[:, 2:] - known[:, 2:]).max() > 0.01
  if sampler == "ddim":
    t, x_t = next(x for x in seen if x[0] == 500)
    level = PROCESS.noise_schedule.alphas_cumprod[[t, 999]]
    # The noise that x_T holds over the known picture, at this level.
    noise = (x_T - np.sqrt(level[1]) * known) / np.sqrt(1 - level[1])
    expected = np.sqrt(level[0]) * known + np.sqrt(1 - level[0]) * noise
    np.testing.assert_allclose(x_t[:, :2], expected[:, :2], atol=1e-4)


def test_dynamic_threshold_scales_far_examples_only():
  x = jnp.stack([jnp.linspace(-4, 4, 101), jnp.linspace(-0.5, 0.5, 101)])
  y = gaussian.dynamic_threshold(0.9)(x)
  np.testing.assert_allclose(y[1], x[1], atol=1e-6)
  s = np.quantile(np.abs(x[0]), 0.9)
  np.testing.assert_allclose(y[0], np.clip(x[0], -s, s) / s, atol=1e-5)
  assert np.abs(y).max() <= 1.0 + 1e-6


def test_guidance_by_two_scales_equals_by_one():
  def denoise(x_t, timesteps):  # the condition is the share of the batch
    shares = jnp.split(x_t, x_t.shape[0] // 2)
    cond = [1.0, 0.0] if len(shares) == 2 else [1.0, 0.3, 0.0]
    return jnp.concatenate([0.5 * x + c for x, c in zip(shares, cond)])

  x_T = _normal((2, 3))
  options = dict(x_T=x_T, num_sample_steps=4, guidance_scale=2.0)
  one = PROCESS.sample(denoise, (2, 3), None, **options)
  two = PROCESS.sample(
    denoise, (2, 3), None, text_guidance_scale=2.0, **options
  )
  np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(sampler="ddmi"), "ddpm, ddim, dpmpp_2m, heun"),
    (dict(sampler="ddpm", eta=0.5), "eta"),
    (dict(init=jnp.zeros((2, 3)), strength=0.0), "strength"),
    (dict(step_placement="x"), "step placement"),
    (dict(dynamic_threshold=1.5), "percentile"),
  ],
)
def test_mistakes_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    PROCESS.sample(
      _denoise, (2, 3), jax.random.key(0), num_sample_steps=4, **options
    )
  with pytest.raises(ValueError, match="rng"):
    PROCESS.sample(_denoise, (2, 3), None, num_sample_steps=4)


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_the_error_of_x_start_follows_from_that_of_the_prediction(prediction):
  diffusion = process.Process(prediction=prediction)
  x_start, timesteps = _normal((6, 4)), jnp.arange(100, 700, 100)
  losses = diffusion.loss(
    lambda x_t, t: 0.3 * x_t, x_start, jax.random.key(0), timesteps
  )
  noise = jax.random.normal(jax.random.split(jax.random.key(0))[1], (6, 4))
  schedule = diffusion.noise_schedule
  x_t = gaussian.q_sample(schedule, x_start, timesteps, noise)
  predicted = gaussian.predict_x_start(
    schedule, 0.3 * x_t, x_t, timesteps, prediction=prediction
  )
  by_timestep = np.zeros(diffusion.num_timesteps)
  by_timestep[timesteps] = losses["mse"]
  found = diffusion.x_start_mse(by_timestep)[np.asarray(timesteps)]
  expected = np.mean((predicted - x_start) ** 2, axis=1)
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_analytic_variance_is_fixed_small_until_it_is_known():
  draw = lambda variance, **table: process.Process(  # noqa: E731
    prediction="x_start", variance=variance
  ).sample(
    _denoise, (2, 3), jax.random.key(0), sampler="ddpm", num_sample_steps=4,
    **table,
  )  # fmt: skip
  np.testing.assert_array_equal(draw("analytic"), draw("fixed_small"))
  none, some = jnp.zeros(1000), jnp.full(1000, 0.5)
  exact = draw("analytic", x_start_mse=none)
  np.testing.assert_allclose(exact, draw("fixed_small"), atol=1e-4)
  assert np.abs(draw("analytic", x_start_mse=some) - exact).max() > 0.05


def test_resampling_lets_what_is_drawn_fit_what_is_known():
  """Of two numbers with correlation 0.9 the known one is 1: E of the other."""
  covariance = jnp.asarray([[1.0, 0.9], [0.9, 1.0]])
  levels = jnp.asarray(PROCESS.noise_schedule.alphas_cumprod, jnp.float32)

  def denoise(x_t, timesteps):  # the best one
    level = levels[timesteps[0]]
    total = level * covariance + (1 - level) * jnp.eye(2)
    return x_t @ jnp.linalg.solve(total, jnp.sqrt(level) * covariance)

  def mean_of_unknown(num_resamples):
    x_0 = PROCESS.sample(
      denoise,
      (2000, 2),
      jax.random.key(0),
      sampler="ddpm",
      num_sample_steps=40,
      num_resamples=num_resamples,
      jump_length=5,
      known=jnp.ones((2000, 2)),
      is_known=jnp.asarray([True, False]),
    )
    assert np.all(x_0[:, 0] == 1)
    return float(x_0[:, 1].mean())

  plain, resampled = mean_of_unknown(1), mean_of_unknown(8)
  assert abs(resampled - 0.9) < 0.08 < 0.15 < abs(plain - 0.9)


def _estimating(x_t, timesteps, x_start):
  return _denoise(x_t, timesteps) + 0.3 * x_start


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_self_conditioned_network_sees_its_last_estimate(sampler):
  _, trace = samplers.SAMPLERS[sampler](
    samplers.SelfConditioned(_estimating),
    PROCESS.noise_schedule,
    _normal((2, 3)),
    jax.random.key(0),
    num_steps=4,
    prediction="x_start",
    variance="fixed_small",
    return_trace=True,
  )
  last = jnp.zeros((2, 3))
  for timestep, x_t, x_start in zip(*trace):
    expected = _estimating(x_t, jnp.full(2, timestep), last)
    np.testing.assert_allclose(x_start, expected, rtol=1e-5, atol=1e-6)
    last = x_start
  assert np.abs(last).max() > 0.1


def test_guided_and_watched_networks_stay_self_conditioned():
  seen = []

  def both(x_t, timesteps, x_start):  # conditioned rows first
    condition = jnp.repeat(jnp.array([1.0, 0.0]), 2)[:, None]
    return _estimating(x_t, timesteps, x_start) + condition

  def alone(x_t, timesteps, x_start):
    return _estimating(x_t, timesteps, x_start) + 3.0

  options = dict(sampler="ddim", num_sample_steps=3, x_T=_normal((2, 3)))
  guided = PROCESS.sample(
    samplers.SelfConditioned(both),
    (2, 3),
    None,
    guidance_scale=3.0,
    on_step=lambda num_calls: seen.append(num_calls),
    **options,
  )
  expected = PROCESS.sample(
    samplers.SelfConditioned(alone), (2, 3), None, **options
  )
  np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-5)
  jax.effects_barrier()
  assert seen == [3, 3, 3]


def test_half_of_the_training_steps_see_an_estimate_without_a_gradient():
  def loss(w, rng):
    network = samplers.SelfConditioned(lambda x_t, t, x_start: w + w * x_start)
    return PROCESS.loss(network, jnp.zeros((4, 3)), rng)["loss"].mean()

  w = jnp.ones((4, 3))
  rngs = jax.random.split(jax.random.key(0), 40)
  # From zeros it predicts 1, from its own estimate 2.
  losses = np.asarray([loss(w, rng) for rng in rngs])
  assert set(losses.tolist()) == {1.0, 4.0}
  assert 10 < np.sum(losses == 4.0) < 30
  rng = rngs[int(np.argmax(losses))]
  # 2 (w + w e) (1 + e) at e = 1; 12 if e were a function of w.
  gradient = jax.grad(loss)(w, rng).sum()
  np.testing.assert_allclose(gradient, 8.0, rtol=1e-5)
