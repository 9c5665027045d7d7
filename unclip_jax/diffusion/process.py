"""One diffusion process as plain data, with its loss and its sampler.

`Process` bundles the choices that belong together (schedule, prediction,
variance, clipping), so that a picture `[B, H, W, C]` and an embedding `[B, D]`
are trained and sampled by the same few lines. The network enters only as
`denoise_fn(x_t, timesteps) -> model_output`; one that is to be self-conditioned
as `samplers.SelfConditioned`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import (
  draws,
  gaussian,
  guidance,
  likelihood,
  samplers,
  schedules,
)

OnStep = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Process:
  """A Gaussian diffusion process.

  Attributes:
    schedule: "cosine" or "linear" (schedules.make_schedule).
    num_timesteps: T.
    snr_scale: factor on the schedule's signal-to-noise ratios.
    prediction: what the network gives: "eps", "x_start" or "v".
    variance: "fixed_small", "fixed_large", "learned_range" or "analytic"
      (gaussian.AnalyticVariance), which is "fixed_small" as long as its table
      has not been estimated.
    clip_x_start: bound on |x_start| while sampling; None leaves it free.
    min_snr_gamma: of the loss (gaussian.training_losses); None: unweighted.
    num_vlb_terms: calls of the network for an estimate of the bound; at least
      2, and T for the bound itself (likelihood.vlb).
  """

  schedule: str = "cosine"
  num_timesteps: int = 1000
  snr_scale: float = 1.0
  prediction: str = "eps"
  variance: str = "fixed_small"
  clip_x_start: float | None = None
  min_snr_gamma: float | None = None
  num_vlb_terms: int = 32

  @functools.cached_property
  def noise_schedule(self) -> schedules.NoiseSchedule:
    return schedules.make_schedule(
      self.schedule, self.num_timesteps, self.snr_scale
    )

  @property
  def learned_variance(self) -> bool:
    return self.variance == "learned_range"

  def loss(
    self,
    denoise_fn: samplers.DenoiseFn,
    x_start: jax.Array,
    rng: jax.Array,
    timesteps: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Training loss at one timestep per example.

    Self-conditioned, a batch sees with even chances zeros, or what the network
    predicts from zeros, through which no gradient goes (Chen et al. 2022,
    algorithm 1).

    Args:
      rng: one key, or one key per example.
      timesteps: [B] int32; None: drawn uniformly.

    Returns:
      `loss` [B] and its parts (gaussian.training_losses).
    """
    timestep_rng, noise_rng, estimate_rng = draws.split(rng, 3)
    if timesteps is None:
      timesteps = draws.integers(
        timestep_rng, 0, self.num_timesteps, x_start.shape[:1]
      )
    noise = draws.normal(noise_rng, x_start.shape)
    x_t = gaussian.q_sample(self.noise_schedule, x_start, timesteps, noise)
    estimate: tuple[jax.Array, ...] = ()
    if isinstance(denoise_fn, samplers.SelfConditioned):
      estimate = (self._estimate(denoise_fn, x_t, timesteps, estimate_rng),)
    return gaussian.training_losses(
      self.noise_schedule,
      denoise_fn(x_t, timesteps, *estimate),
      x_start,
      x_t,
      timesteps,
      noise,
      prediction=self.prediction,
      variance=self._variance(None),
      min_snr_gamma=self.min_snr_gamma,
    )

  def x_start_mse(self, mse: np.ndarray) -> np.ndarray:
    """The error of x_start [T], given that of the prediction [T]."""
    return mse * gaussian.x_start_error_factor(
      self.noise_schedule, self.prediction
    )

  def _variance(self, x_start_mse: jax.Array | None) -> gaussian.Variance:
    if self.variance != "analytic":
      return self.variance
    if x_start_mse is None:
      return "fixed_small"
    return gaussian.AnalyticVariance(x_start_mse)

  def _estimate(
    self,
    denoise_fn: samplers.SelfConditioned,
    x_t: jax.Array,
    timesteps: jax.Array,
    rng: jax.Array,
  ) -> jax.Array:
    """What a self-conditioned network is given of x_start in training."""

    def predict(x_t: jax.Array) -> jax.Array:
      model_output = denoise_fn(x_t, timesteps, jnp.zeros_like(x_t))
      return gaussian.p_mean_variance(
        self.noise_schedule,
        model_output,
        x_t,
        timesteps,
        prediction=self.prediction,
        variance=self._variance(None),
        clip_x_start=self.clip_x_start,
      ).x_start

    coin = jax.random.bernoulli(draws.first(rng))
    return jax.lax.stop_gradient(
      jax.lax.cond(coin, predict, jnp.zeros_like, x_t)
    )

  def vlb(
    self,
    denoise_fn: samplers.DenoiseFn,
    x_start: jax.Array,
    rng: jax.Array,
    *,
    discrete: bool,
    x_start_mse: jax.Array | None = None,
  ) -> likelihood.Vlb:
    """Bits per dimension of x_start [B, ...]; arguments as likelihood.vlb.

    Args:
      x_start_mse: as in `sample`.
    """
    return likelihood.vlb(
      denoise_fn,
      self.noise_schedule,
      x_start,
      rng,
      num_terms=min(self.num_vlb_terms, self.num_timesteps),
      prediction=self.prediction,
      variance=self._variance(x_start_mse),
      clip_x_start=self.clip_x_start,
      discrete=discrete,
    )

  def sample(
    self,
    denoise_fn: samplers.DenoiseFn,
    shape: Sequence[int],
    rng: jax.Array | None,
    *,
    sampler: str = "ddim",
    num_sample_steps: int = 50,
    step_placement: str = "uniform",
    guidance_scale: float = 1.0,
    text_guidance_scale: float | None = None,
    guidance_interval: tuple[int, int] | None = None,
    guidance_rescale: float = 0.0,
    clip_x_start: gaussian.ClipXStart = None,
    dynamic_threshold: float | None = None,
    eta: float = 0.0,
    num_resamples: int = 1,
    jump_length: int = 10,
    x_start_mse: jax.Array | None = None,
    x_T: jax.Array | None = None,
    init: jax.Array | None = None,
    strength: float = 1.0,
    known: jax.Array | None = None,
    is_known: jax.Array | None = None,
    noise: jax.Array | None = None,
    on_step: OnStep | None = None,
  ) -> jax.Array:
    """Draws x_0 of the given shape.

    Args:
      denoise_fn: with guidance it takes and gives 2B rows, the conditional
        half first; with a `text_guidance_scale` 3B: both conditions, the image
        embedding alone, none (diffusion.guidance).
      rng: one key, or one key per example, `[B]`; None where `noise` is given.
      sampler: a name in samplers.SAMPLERS.
      num_sample_steps, step_placement: schedules.step_placement.
      guidance_scale: 1 is off.
      text_guidance_scale: the scale of what the text adds to the image
        embedding; `guidance_scale` is then the embedding's own. None: one
        scale for both.
      guidance_interval, guidance_rescale: `interval` and `rescale` of
        guidance.classifier_free.
      clip_x_start: in place of the process's own, if not None.
      dynamic_threshold: percentile of gaussian.dynamic_threshold, in place of
        plain clipping.
      eta: DDIM's share of fresh noise; the other samplers take none.
      num_resamples, jump_length: of samplers.ddpm alone; they are for `known`.
      x_start_mse: [T], the table of gaussian.AnalyticVariance, where that is
        the process's variance.
      x_T: `shape`, where sampling starts; drawn where it is None.
      init: `shape`, data to start from in place of pure noise: the last
        `strength` of the steps is done, from `init` noised by x_T to the first
        of them (SDEdit, Meng et al. 2021, arXiv 2108.01073).
      strength: in (0, 1]; 1 forgets `init` up to the schedule's last level.
      known: `shape`, data of which a part is kept. Every predicted x_start
        gets the known values, so that x_t's known part is `known` noised by
        x_T; the result has them unchanged, bit for bit.
      is_known: bool, broadcastable to `shape`: where `known` counts.
      noise: `[num_network_calls + 1, *shape]` in place of every draw: entry 0
        is x_T, entry i the noise of step i.
      on_step: called on the host after every call of the network, with the
        number of calls that there will be.

    Raises:
      ValueError: an unknown sampler, or options that do not fit it.
    """
    if sampler not in samplers.SAMPLERS:
      known_names = ", ".join(samplers.SAMPLERS)
      raise ValueError(f"unknown sampler {sampler!r}: use one of {known_names}")
    if eta and sampler != "ddim":
      raise ValueError(f"eta is an option of 'ddim', not of {sampler!r}")
    if num_resamples > 1 and sampler != "ddpm":
      raise ValueError(
        f"num_resamples is an option of 'ddpm', not of {sampler!r}"
      )
    step_rng = step_noise = None
    if noise is not None:
      x_T, step_noise = noise[0], noise[1:]
    elif rng is not None:
      x_rng, step_rng = draws.split(rng)
      x_T = draws.normal(x_rng, shape) if x_T is None else x_T
    elif x_T is None:
      raise ValueError("sampling needs rng, noise or x_T to start from")
    steps = schedules.step_placement(
      self.num_timesteps, num_sample_steps, step_placement
    )
    if init is not None:
      if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must be in (0, 1], got {strength}")
      steps = steps[: max(1, round(strength * num_sample_steps))]
      timesteps = jnp.full(init.shape[:1], steps[-1])
      x_T = gaussian.q_sample(self.noise_schedule, init, timesteps, x_T)
      step_noise = None if step_noise is None else step_noise[-len(steps) :]
    if on_step is not None:
      num_calls = samplers.num_network_calls(
        sampler, len(steps), num_resamples, jump_length
      )
      denoise_fn = _with_callback(
        denoise_fn, functools.partial(on_step, num_calls)
      )
    guide = dict(
      learned_variance=self.learned_variance,
      interval=guidance_interval,
      rescale=guidance_rescale,
    )
    if text_guidance_scale is not None:
      denoise_fn = guidance.two_conditions(
        denoise_fn, guidance_scale, text_guidance_scale, **guide
      )
    elif guidance_scale != 1.0:
      denoise_fn = guidance.classifier_free(denoise_fn, guidance_scale, **guide)
    if clip_x_start is None:
      clip_x_start = self.clip_x_start
    if dynamic_threshold is not None:
      clip_x_start = gaussian.dynamic_threshold(dynamic_threshold)
    if known is not None:
      clip_x_start = _keep_known(clip_x_start, known, is_known)
    own = {
      "ddim": dict(eta=eta),
      "ddpm": dict(num_resamples=num_resamples, jump_length=jump_length),
    }
    x_0 = samplers.SAMPLERS[sampler](
      denoise_fn,
      self.noise_schedule,
      x_T,
      step_rng,
      num_steps=steps,
      prediction=self.prediction,
      variance=self._variance(x_start_mse),
      clip_x_start=clip_x_start,
      noise=step_noise,
      **own.get(sampler, {}),
    )
    return x_0 if known is None else jnp.where(is_known, known, x_0)

  def invert(
    self,
    denoise_fn: samplers.DenoiseFn,
    x_start: jax.Array,
    *,
    num_sample_steps: int = 50,
    step_placement: str = "uniform",
    num_refinements: int = 0,
  ) -> jax.Array:
    """The x_T from which DDIM with eta 0 gives x_start back.

    Options as in `sample` and samplers.ddim_inverse; without guidance, under
    which DDIM inversion is no good approximation.
    """
    return samplers.ddim_inverse(
      denoise_fn,
      self.noise_schedule,
      x_start,
      num_steps=schedules.step_placement(
        self.num_timesteps, num_sample_steps, step_placement
      ),
      prediction=self.prediction,
      variance=self._variance(None),
      clip_x_start=self.clip_x_start,
      num_refinements=num_refinements,
    )


def _keep_known(
  clip_x_start: gaussian.ClipXStart, known: jax.Array, is_known: jax.Array
) -> Callable[[jax.Array], jax.Array]:
  def keep(x_start: jax.Array) -> jax.Array:
    x_start = gaussian.clip(x_start, clip_x_start)
    return jnp.where(is_known, known, x_start)

  return keep


def _with_callback(
  denoise_fn: samplers.DenoiseFn, on_step: Callable[[], None]
) -> samplers.DenoiseFn:
  def denoise(*args: jax.Array) -> jax.Array:
    model_output = denoise_fn(*args)
    # The dependence on the output keeps the call behind the step's work.
    jax.debug.callback(lambda _: on_step(), jnp.ravel(model_output)[0])
    return model_output

  return samplers.as_conditioned(denoise_fn, denoise)
