"""One diffusion process as plain data, with its loss and its sampler.

`Process` bundles the choices that belong together (schedule, prediction,
variance, clipping), so that a picture `[B, H, W, C]` and an embedding `[B, D]`
are trained and sampled by the same few lines. The network enters only as
`denoise_fn(x_t, timesteps) -> model_output`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from unclip_jax.diffusion import gaussian, guidance, samplers, schedules

DenoiseFn = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Process:
  """A Gaussian diffusion process.

  Attributes:
    schedule: "cosine" or "linear" (schedules.make_schedule).
    num_timesteps: T.
    snr_scale: factor on the schedule's signal-to-noise ratios.
    prediction: what the network gives: "eps", "x_start" or "v".
    variance: "fixed_small", "fixed_large" or "learned_range".
    clip_x_start: bound on |x_start| while sampling; None leaves it free.
  """

  schedule: str = "cosine"
  num_timesteps: int = 1000
  snr_scale: float = 1.0
  prediction: str = "eps"
  variance: str = "fixed_small"
  clip_x_start: float | None = None

  @functools.cached_property
  def noise_schedule(self) -> schedules.NoiseSchedule:
    return schedules.make_schedule(
      self.schedule, self.num_timesteps, self.snr_scale
    )

  @property
  def learned_variance(self) -> bool:
    return self.variance == "learned_range"

  def loss(
    self, denoise_fn: DenoiseFn, x_start: jax.Array, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Training loss at one uniformly drawn timestep per example.

    Returns:
      `loss` [B] and its parts (gaussian.training_losses).
    """
    timestep_rng, noise_rng = jax.random.split(rng)
    timesteps = jax.random.randint(
      timestep_rng, x_start.shape[:1], 0, self.num_timesteps
    )
    noise = jax.random.normal(noise_rng, x_start.shape, x_start.dtype)
    x_t = gaussian.q_sample(self.noise_schedule, x_start, timesteps, noise)
    return gaussian.training_losses(
      self.noise_schedule,
      denoise_fn(x_t, timesteps),
      x_start,
      x_t,
      timesteps,
      noise,
      prediction=self.prediction,
      variance=self.variance,
    )

  def sample(
    self,
    denoise_fn: DenoiseFn,
    shape: Sequence[int],
    rng: jax.Array | None,
    *,
    sampler: str = "ddim",
    num_sample_steps: int = 50,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    noise: jax.Array | None = None,
    on_step: Callable[[], None] | None = None,
  ) -> jax.Array:
    """Draws x_0 of the given shape.

    Args:
      denoise_fn: with `guidance_scale` other than 1 it takes and gives 2B
        rows, the conditional half first (guidance.classifier_free).
      rng: one key, or one key per example, `[B]`; None where `noise` is given.
      sampler: "ddim" or "ddpm".
      eta: DDIM's share of fresh noise; ignored by DDPM.
      noise: `[num_sample_steps + 1, *shape]` in place of every draw: entry 0
        is x_T, entry i the noise of step i.
      on_step: called on the host after every denoising step.
    """
    if noise is None:
      x_rng, step_rng = split(rng)
      x_T, step_noise = samplers.draw_noise(x_rng, shape), None
    else:
      x_T, step_noise, step_rng = noise[0], noise[1:], None
    if guidance_scale != 1.0:
      denoise_fn = guidance.classifier_free(
        denoise_fn, guidance_scale, learned_variance=self.learned_variance
      )
    if on_step is not None:
      denoise_fn = _with_callback(denoise_fn, on_step)
    options = dict(
      num_steps=num_sample_steps,
      prediction=self.prediction,
      variance=self.variance,
      clip_x_start=self.clip_x_start,
      noise=step_noise,
    )
    if sampler == "ddpm":
      return samplers.ddpm(
        denoise_fn, self.noise_schedule, x_T, step_rng, **options
      )
    if sampler == "ddim":
      return samplers.ddim(
        denoise_fn, self.noise_schedule, x_T, step_rng, eta=eta, **options
      )
    raise ValueError(f"sampler '{sampler}' is not 'ddim' or 'ddpm'")


def split(rng: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`jax.random.split` into two, for one key or for one key per example."""
  if rng.ndim:
    pairs = jax.vmap(jax.random.split)(rng)
    return pairs[:, 0], pairs[:, 1]
  first, second = jax.random.split(rng)
  return first, second


def _with_callback(
  denoise_fn: DenoiseFn, on_step: Callable[[], None]
) -> DenoiseFn:
  def denoise(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
    model_output = denoise_fn(x_t, timesteps)
    # The dependence on the output keeps the call behind the step's work.
    jax.debug.callback(lambda _: on_step(), jnp.ravel(model_output)[0])
    return model_output

  return denoise
