"""Classifier-free guidance: its identities, and its effect on a known score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian, guidance, samplers, schedules

SHAPES = [(3, 4), (3, 2, 2, 4)]
TIMESTEPS = jnp.array([5, 90, 20])


def _normal(shape):
  draws = np.random.default_rng(0).normal(size=shape)
  return jnp.asarray(draws, jnp.float32)


def _half(x_t, timesteps, row):
  """A network of 2C channels that knows its timestep and its condition."""
  scale = (timesteps + 1).reshape((-1,) + (1,) * (x_t.ndim - 1))
  return jnp.concatenate(
    [jnp.sin(x_t * scale + row), jnp.cos(x_t + row * scale)], axis=-1
  )


def _denoise_2b(x_t, timesteps):
  first, second = jnp.split(x_t, 2)
  first_timesteps, second_timesteps = jnp.split(timesteps, 2)
  return jnp.concatenate(
    [_half(first, first_timesteps, 1.0), _half(second, second_timesteps, 2.0)]
  )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guidance_is_linear_and_keeps_the_conditional_variance(
  shape, scale, traced
):
  x_t = _normal(shape)
  cond, variance_output = jnp.split(_half(x_t, TIMESTEPS, 1.0), 2, axis=-1)
  uncond, _ = jnp.split(_half(x_t, TIMESTEPS, 2.0), 2, axis=-1)

  def run(scale):
    denoise = guidance.classifier_free(
      _denoise_2b, scale, learned_variance=True
    )
    return denoise(x_t, TIMESTEPS)

  output = jax.jit(run)(scale) if traced else run(scale)
  guided, got_variance_output = jnp.split(output, 2, axis=-1)
  expected = {0.0: uncond, 1.0: cond, 3.5: 3.5 * cond - 2.5 * uncond}[scale]
  np.testing.assert_allclose(guided, expected, atol=1e-5)
  np.testing.assert_allclose(got_variance_output, variance_output, atol=1e-6)


def test_without_learned_variance_every_channel_is_guided():
  x_t = _normal((3, 4))
  denoise = guidance.classifier_free(_denoise_2b, 2.0, learned_variance=False)
  expected = 2 * _half(x_t, TIMESTEPS, 1.0) - _half(x_t, TIMESTEPS, 2.0)
  np.testing.assert_allclose(denoise(x_t, TIMESTEPS), expected, atol=1e-5)


def test_the_network_is_called_once_and_the_output_is_float32():
  seen = []

  def denoise_2b(x_t, timesteps):
    seen.append((x_t.shape, timesteps.tolist()))
    return _denoise_2b(x_t, timesteps).astype(jnp.bfloat16)

  denoise = guidance.classifier_free(denoise_2b, 2.0, learned_variance=True)
  output = denoise(jnp.ones((3, 4)), TIMESTEPS)
  assert seen == [((6, 4), [5, 90, 20, 5, 90, 20])]
  assert output.shape == (3, 8) and output.dtype == jnp.float32


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_guided_samples_of_two_gaussians_are_extrapolated(prediction):
  """Guiding N(c, s^2) away from N(u, s^2) samples N(u + scale (c - u), s^2).

  For their scores are linear in the means; so is DDIM's map for any number of
  steps, whatever the network predicts.
  """
  schedule = schedules.make_schedule("cosine", 1000)
  level_table = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
  variance = 0.3**2

  def optimum(x_t, timesteps, mean):
    level = level_table[timesteps][:, None]
    signal = jnp.sqrt(level)
    gain = signal * variance / (level * variance + 1 - level)
    x_start = mean + gain * (x_t - signal * mean)
    eps = gaussian.predict_eps(
      schedule, x_start, x_t, timesteps, prediction="x_start"
    )
    return gaussian.target(schedule, x_start, eps, timesteps, prediction)

  def sample(denoise_fn):
    return samplers.ddim(
      denoise_fn,
      schedule,
      x_T,
      None,
      num_steps=10,
      prediction=prediction,
      variance="fixed_small",
    )

  x_T = _normal((4, 5))
  means = jnp.repeat(jnp.array([0.6, -0.2]), 4)[:, None]  # cond, uncond
  denoise = guidance.classifier_free(
    lambda x_t, timesteps: optimum(x_t, timesteps, means),
    3.0,
    learned_variance=False,
  )
  direct = sample(lambda x_t, timesteps: optimum(x_t, timesteps, 2.2))
  np.testing.assert_allclose(sample(denoise), direct, atol=3e-3)


def _denoise_3b(x_t, timesteps):
  rows = zip(jnp.split(x_t, 3), jnp.split(timesteps, 3))
  return jnp.concatenate([_half(x, t, i) for i, (x, t) in enumerate(rows)])


def test_two_conditions_with_equal_scales_are_one():
  x_t = _normal((3, 4))
  both, first, none = (
    jnp.split(_half(x_t, TIMESTEPS, i), 2, axis=-1)[0] for i in range(3)
  )
  for first_scale, second_scale in ((3.0, 3.0), (2.0, 0.0), (1.0, 4.0)):
    output = guidance.two_conditions(
      _denoise_3b, first_scale, second_scale, learned_variance=True
    )(x_t, TIMESTEPS)
    expected = (
      none + first_scale * (first - none) + second_scale * (both - first)
    )
    np.testing.assert_allclose(output[:, :4], expected, atol=1e-5)
    variance = jnp.split(_half(x_t, TIMESTEPS, 0), 2, axis=-1)[1]
    np.testing.assert_allclose(output[:, 4:], variance, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_interval_turns_guidance_off_row_by_row(shape):
  x_t = _normal(shape)
  options = dict(learned_variance=False)
  guided = guidance.classifier_free(_denoise_2b, 3.0, **options)
  inside = guidance.classifier_free(
    _denoise_2b, 3.0, interval=(10, 50), **options
  )
  expected = jnp.stack(  # TIMESTEPS are 5, 90, 20
    [
      _half(x_t, TIMESTEPS, 1.0)[0],
      _half(x_t, TIMESTEPS, 1.0)[1],
      guided(x_t, TIMESTEPS)[2],
    ]
  )
  np.testing.assert_allclose(inside(x_t, TIMESTEPS), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rescale_1_has_the_conditional_standard_deviation(shape):
  x_t = _normal(shape)
  options = dict(learned_variance=False)
  guided = guidance.classifier_free(_denoise_2b, 5.0, **options)(x_t, TIMESTEPS)
  full, half = (
    guidance.classifier_free(_denoise_2b, 5.0, rescale=phi, **options)(
      x_t, TIMESTEPS
    )
    for phi in (1.0, 0.5)
  )
  axes = tuple(range(1, len(shape)))
  cond = _half(x_t, TIMESTEPS, 1.0)
  np.testing.assert_allclose(
    jnp.std(full, axes), jnp.std(cond, axes), rtol=1e-4
  )
  np.testing.assert_allclose(half, (full + guided) / 2, atol=1e-5)
