"""Gaussian diffusion: noising, its posterior, predictions and losses.

Pure functions of a `NoiseSchedule`, for data of any rank: [B, D] embeddings
and [B, H, W, C] pictures go through the same code. With a = alphas_cumprod[t]:

  x_t    = sqrt(a) x_start + sqrt(1 - a) noise                             (1)
  v      = sqrt(a) noise - sqrt(1 - a) x_start                             (2)

so each of x_start, eps and v gives, with x_t, the other two. (1) is eq. 4 of
Ho et al. 2020 (arXiv 2006.11239), (2) is section 4 of Salimans & Ho 2022
(arXiv 2202.00512). What a network predicts (`prediction`) and the variance of
the reverse step (`variance`) are independent choices:

  prediction  "eps", "x_start" or "v"
  variance    "fixed_small", "fixed_large" (Ho et al., section 3.2),
              "learned_range" (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15)
              or an `AnalyticVariance`, estimated from data after training

`timesteps` is int32 [B] and counts in the given schedule, 0 = least noise. The
network itself must be told `schedule.timestep_map[timesteps]`. Results are
float32, whatever the network's dtype.

Deviation: the discretised likelihood uses the exact normal CDF where Nichol &
Dhariwal's released code uses a tanh approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import schedules

Prediction = Literal["eps", "x_start", "v"]


class AnalyticVariance(NamedTuple):
  """The best variance of the reverse step that is one number a timestep.

  Analytic-DPM (Bao et al. 2022, arXiv 2201.06503, theorem 1), with lambda_n^2
  the posterior's variance. In our terms: that variance, plus the squared weight
  of x_start in the posterior's mean times the mean squared error per dimension
  of the predicted x_start. For the best predictor the error is what the paper
  computes from the score's norm, (1 - a) / a (1 - (1 - a) Gamma); for another
  one it is still the best variance (Bao et al. 2022, arXiv 2206.07309,
  theorem 2), and never negative.
  """

  x_start_mse: jax.Array  # float32 [T], by the network's timestep


Variance = (
  Literal["fixed_small", "fixed_large", "learned_range"] | AnalyticVariance
)
# A bound on |x_start|, or a function of the predicted x_start; None: as it is.
ClipXStart = float | Callable[[jax.Array], jax.Array] | None


class MeanVariance(NamedTuple):
  """p(x_{t-1} | x_t), each of x_t's shape, float32."""

  mean: jax.Array
  log_variance: jax.Array
  x_start: jax.Array  # the prediction that the mean is computed from


def _at(
  table: np.ndarray | jax.Array, timesteps: jax.Array, x: jax.Array
) -> jax.Array:
  """table[timesteps] in float32, shaped [B, 1, ...] to broadcast against x."""
  values = jnp.asarray(table, jnp.float32)[timesteps]
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def _signal_and_noise(
  schedule: schedules.NoiseSchedule, timesteps: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """sqrt(a) and sqrt(1 - a) of (1) and (2)."""
  return (
    _at(schedule.sqrt_alphas_cumprod, timesteps, x),
    _at(schedule.sqrt_one_minus_alphas_cumprod, timesteps, x),
  )


def _mean_per_example(x: jax.Array) -> jax.Array:
  return x.mean(axis=tuple(range(1, x.ndim)))


def q_sample(
  schedule: schedules.NoiseSchedule,
  x_start: jax.Array,
  timesteps: jax.Array,
  noise: jax.Array,
) -> jax.Array:
  """x_t of x_start's shape, given standard normal noise (Ho et al., eq. 4)."""
  signal, sigma = _signal_and_noise(schedule, timesteps, x_start)
  return signal * x_start + sigma * noise


def q_posterior(
  schedule: schedules.NoiseSchedule,
  x_start: jax.Array,
  x_t: jax.Array,
  timesteps: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mean, variance, log variance of q(x_{t-1} | x_t, x_start) (Ho, eqs. 6, 7).

  The mean has x_t's shape, the others are [B, 1, ...]. At t = 0 the mean is
  x_start and the variance 0; the log variance is then that of t = 1.
  """
  mean = (
    _at(schedule.posterior_mean_coef_x_start, timesteps, x_t) * x_start
    + _at(schedule.posterior_mean_coef_x_t, timesteps, x_t) * x_t
  )
  variance = _at(schedule.posterior_variance, timesteps, x_t)
  log_variance = _at(schedule.posterior_log_variance_clipped, timesteps, x_t)
  return mean, variance, log_variance


def target(
  schedule: schedules.NoiseSchedule,
  x_start: jax.Array,
  noise: jax.Array,
  timesteps: jax.Array,
  prediction: Prediction,
) -> jax.Array:
  """What a perfect network returns for q_sample(x_start, noise), of its shape.

  Raises:
    ValueError: an unknown prediction.
  """
  if prediction == "eps":
    return noise
  if prediction == "x_start":
    return x_start
  _check_is_v(prediction)
  signal, sigma = _signal_and_noise(schedule, timesteps, x_start)
  return signal * noise - sigma * x_start


def predict_x_start(
  schedule: schedules.NoiseSchedule,
  model_output: jax.Array,
  x_t: jax.Array,
  timesteps: jax.Array,
  *,
  prediction: Prediction,
) -> jax.Array:
  """The x_start that model_output (variance channels removed) stands for.

  Raises:
    ValueError: an unknown prediction.
  """
  model_output = model_output.astype(jnp.float32)
  if prediction == "x_start":
    return model_output
  signal, sigma = _signal_and_noise(schedule, timesteps, x_t)
  if prediction == "eps":
    return (x_t - sigma * model_output) / signal
  _check_is_v(prediction)
  return signal * x_t - sigma * model_output


def predict_eps(
  schedule: schedules.NoiseSchedule,
  model_output: jax.Array,
  x_t: jax.Array,
  timesteps: jax.Array,
  *,
  prediction: Prediction,
) -> jax.Array:
  """The noise that model_output (variance channels removed) stands for.

  Raises:
    ValueError: an unknown prediction.
  """
  model_output = model_output.astype(jnp.float32)
  if prediction == "eps":
    return model_output
  signal, sigma = _signal_and_noise(schedule, timesteps, x_t)
  if prediction == "x_start":
    return (x_t - signal * model_output) / sigma
  _check_is_v(prediction)
  return sigma * x_t + signal * model_output


def _check_is_v(prediction: str) -> None:
  if prediction != "v":
    raise ValueError(
      f"unknown prediction {prediction!r}: use 'eps', 'x_start' or 'v'"
    )


def split_variance(model_output: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits [..., 2C] into the prediction and the variance channels, [..., C].

  Raises:
    ValueError: an odd number of channels.
  """
  if model_output.shape[-1] % 2:
    raise ValueError(
      "a network with learned variance returns 2C channels, got"
      f" {model_output.shape[-1]}"
    )
  output, variance_output = jnp.split(model_output, 2, axis=-1)
  return output, variance_output


def _split(
  model_output: jax.Array, x_t: jax.Array, variance: Variance
) -> tuple[jax.Array, jax.Array | None]:
  """The prediction, and the variance channels if they are learned."""
  if variance == "learned_range":
    output, variance_output = split_variance(model_output)
  else:
    output, variance_output = model_output, None
  if output.shape != x_t.shape:
    raise ValueError(
      f"the network returned {model_output.shape} for x_t {x_t.shape}, which"
      f" does not fit variance={variance!r}"
    )
  return output, variance_output


def _log_variance(
  schedule: schedules.NoiseSchedule,
  variance_output: jax.Array | None,
  x_t: jax.Array,
  timesteps: jax.Array,
  variance: Variance,
) -> jax.Array:
  """Log variance of the reverse step, of x_t's shape."""
  small = _at(schedule.posterior_log_variance_clipped, timesteps, x_t)
  if variance == "fixed_small":
    return jnp.broadcast_to(small, x_t.shape)
  if variance == "fixed_large":
    # beta_0 would be a poor decoder variance at t = 0: Ho et al. use the small.
    log_betas = np.log(schedule.betas)
    log_betas[0] = schedule.posterior_log_variance_clipped[0]
    return jnp.broadcast_to(_at(log_betas, timesteps, x_t), x_t.shape)
  if isinstance(variance, AnalyticVariance):
    error = variance.x_start_mse[schedule.timestep_map]
    total = (
      schedule.posterior_variance
      + schedule.posterior_mean_coef_x_start**2 * error
    )
    log_total = jnp.log(jnp.maximum(total, 1e-20))
    return jnp.broadcast_to(_at(log_total, timesteps, x_t), x_t.shape)
  if variance == "learned_range":
    large = _at(np.log(schedule.betas), timesteps, x_t)
    fraction = (variance_output.astype(jnp.float32) + 1.0) / 2.0
    return fraction * large + (1.0 - fraction) * small
  raise ValueError(
    f"unknown variance {variance!r}: use 'fixed_small', 'fixed_large' or"
    " 'learned_range', or an AnalyticVariance"
  )


def p_mean_variance(
  schedule: schedules.NoiseSchedule,
  model_output: jax.Array,
  x_t: jax.Array,
  timesteps: jax.Array,
  *,
  prediction: Prediction,
  variance: Variance,
  clip_x_start: ClipXStart = None,
) -> MeanVariance:
  """The reverse step p(x_{t-1} | x_t): the posterior at the predicted x_start.

  Args:
    schedule: the schedule that timesteps count in.
    model_output: of x_t's shape; [..., 2C] if the variance is learned. A
      learned channel of -1 means the posterior's variance, 1 means beta
      (Nichol & Dhariwal, eq. 15; not bounded, as there).
    x_t: [B, ...] noised data.
    timesteps: int32 [B].
    prediction: what the network predicts.
    variance: the kind of variance.
    clip_x_start: clips the predicted x_start to [-value, value]; or a function
      that is applied to it, such as `dynamic_threshold(0.995)`.

  Raises:
    ValueError: an unknown prediction or variance, or channels that do not fit.
  """
  output, variance_output = _split(model_output, x_t, variance)
  x_start = predict_x_start(
    schedule, output, x_t, timesteps, prediction=prediction
  )
  x_start = clip(x_start, clip_x_start)
  mean, _, _ = q_posterior(schedule, x_start, x_t, timesteps)
  log_variance = _log_variance(
    schedule, variance_output, x_t, timesteps, variance
  )
  return MeanVariance(mean, log_variance, x_start)


def clip(x_start: jax.Array, clip_x_start: ClipXStart) -> jax.Array:
  """x_start within a bound, or what a function makes of it."""
  if clip_x_start is None:
    return x_start
  if callable(clip_x_start):
    return clip_x_start(x_start)
  return jnp.clip(x_start, -clip_x_start, clip_x_start)


def dynamic_threshold(
  percentile: float, bound: float = 1.0
) -> Callable[[jax.Array], jax.Array]:
  """Clipping at a percentile of |x_start|, then scaling back into the bound.

  Saharia et al. 2022 (Imagen, arXiv 2205.11487, section 2.3): with s the
  percentile in each example, where s is above the bound, x_start is clipped to
  [-s, s] and divided by s / bound; elsewhere it is clipped to the bound.

  Args:
    percentile: in (0, 1); 0.995 in Imagen's examples.
    bound: what plain clipping would clip to.

  Raises:
    ValueError: the percentile is not in (0, 1).
  """
  if not 0.0 < percentile < 1.0:
    raise ValueError(f"percentile must be in (0, 1), got {percentile}")

  def threshold(x_start: jax.Array) -> jax.Array:
    axes = tuple(range(1, x_start.ndim))
    s = jnp.quantile(jnp.abs(x_start), percentile, axes, keepdims=True)
    s = jnp.maximum(s, bound)
    return jnp.clip(x_start, -s, s) * (bound / s)

  return threshold


def normal_kl(
  mean_1: jax.Array,
  log_variance_1: jax.Array,
  mean_2: jax.Array,
  log_variance_2: jax.Array,
) -> jax.Array:
  """KL(N_1 || N_2) elementwise, in nats."""
  log_ratio = log_variance_1 - log_variance_2
  distance = jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2)
  return 0.5 * (jnp.exp(log_ratio) - 1.0 - log_ratio + distance)


def log_density(
  x: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
  """Log density of a normal at x, elementwise, in nats."""
  distance = jnp.square(x - mean) * jnp.exp(-log_variance)
  return -0.5 * (np.log(2.0 * np.pi) + log_variance + distance)


def discretized_gaussian_log_likelihood(
  x: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
  """Log mass that a normal gives to the 8-bit level of x (Ho et al., eq. 13).

  Args:
    x: data in [-1, 1], 256 levels 2/255 apart; the two outermost levels hold
      everything beyond them.
    mean: of x's shape.
    log_variance: of x's shape.

  Returns:
    Elementwise nats, at least log(1e-12): below that the value and its
    gradient are cut, as in Nichol & Dhariwal's released code.
  """
  half_bin = 1.0 / 255.0
  is_edge = jnp.abs(x) > 0.999
  # By symmetry each level is mirrored into the lower tail, where differences
  # of the CDF keep their precision in float32. An edge level is mirrored such
  # that its open side is the lower one.
  sign = jnp.where(is_edge, -jnp.sign(x), jnp.where(x > mean, -1.0, 1.0))
  centered = sign * (x - mean)
  inverse_std = jnp.exp(-0.5 * log_variance)
  upper = jax.scipy.stats.norm.cdf((centered + half_bin) * inverse_std)
  lower = jax.scipy.stats.norm.cdf((centered - half_bin) * inverse_std)
  mass = upper - jnp.where(is_edge, 0.0, lower)
  return jnp.log(jnp.maximum(mass, 1e-12))


def vlb_terms(
  schedule: schedules.NoiseSchedule,
  model_output: jax.Array,
  x_start: jax.Array,
  x_t: jax.Array,
  timesteps: jax.Array,
  *,
  prediction: Prediction,
  variance: Variance,
  clip_x_start: ClipXStart = None,
  discrete: bool = True,
) -> jax.Array:
  """One term of the variational bound per example, [B] bits per dimension.

  For t > 0 the KL of p(x_{t-1} | x_t) from the true posterior, for t = 0 the
  likelihood of x_start (Ho et al., eqs. 5 and 13). The whole bound is the sum
  over all t plus a prior term that no network changes
  (diffusion/likelihood.py). Other arguments and errors as in
  `p_mean_variance`.

  Args:
    discrete: at t = 0 the mass of 8-bit levels in [-1, 1]; False: the density,
      for data that have no levels.
  """
  x_start = x_start.astype(jnp.float32)
  mean, _, log_variance = q_posterior(schedule, x_start, x_t, timesteps)
  predicted = p_mean_variance(
    schedule,
    model_output,
    x_t,
    timesteps,
    prediction=prediction,
    variance=variance,
    clip_x_start=clip_x_start,
  )
  kl = normal_kl(mean, log_variance, predicted.mean, predicted.log_variance)
  log_likelihood = (
    discretized_gaussian_log_likelihood if discrete else log_density
  )
  nll = -log_likelihood(x_start, predicted.mean, predicted.log_variance)
  nats = jnp.where(
    timesteps == 0, _mean_per_example(nll), _mean_per_example(kl)
  )
  return nats / np.log(2.0)


def min_snr_weight(
  schedule: schedules.NoiseSchedule, gamma: float, prediction: Prediction
) -> np.ndarray:
  """Min-SNR-gamma weights [T] of the prediction's squared error.

  Hang et al. 2023 (arXiv 2303.09556, section 3.4): min(SNR, gamma) times the
  error of x_start, which is that of eps over the SNR and that of v over the
  SNR + 1.

  Raises:
    ValueError: an unknown prediction, or gamma <= 0.
  """
  if gamma <= 0:
    raise ValueError(f"gamma must be positive, got {gamma}")
  snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
  return np.minimum(snr, gamma) * x_start_error_factor(schedule, prediction)


def x_start_error_factor(
  schedule: schedules.NoiseSchedule, prediction: Prediction
) -> np.ndarray:
  """[T], times the prediction's squared error it is that of x_start.

  1 for x_start, 1 / SNR for eps and 1 / (SNR + 1) for v, from (1) and (2).

  Raises:
    ValueError: an unknown prediction.
  """
  level = schedule.alphas_cumprod
  if prediction == "x_start":
    return np.ones_like(level)
  if prediction == "eps":
    return (1.0 - level) / level
  _check_is_v(prediction)
  return 1.0 - level


def training_losses(
  schedule: schedules.NoiseSchedule,
  model_output: jax.Array,
  x_start: jax.Array,
  x_t: jax.Array,
  timesteps: jax.Array,
  noise: jax.Array,
  *,
  prediction: Prediction,
  variance: Variance,
  min_snr_gamma: float | None = None,
) -> dict[str, jax.Array]:
  """L_simple (Ho, eq. 14) or L_hybrid (Nichol & Dhariwal, eq. 16), each [B].

  With learned variance the loss is mse + (T / 1000) vlb: the bound is a sum of
  T terms of which one is drawn, times lambda = 0.001, in bits per dimension as
  in the authors' released code. The bound trains the variance channels only:
  its gradient with respect to the prediction is stopped.

  Args:
    schedule: the schedule that timesteps count in.
    model_output: [B, ...], with twice the channels if the variance is learned.
    x_start: [B, ...] data.
    x_t: q_sample(schedule, x_start, timesteps, noise).
    timesteps: int32 [B].
    noise: what x_t was made with.
    prediction: what the network predicts.
    variance: the kind of variance.
    min_snr_gamma: weighs the mse by `min_snr_weight` with that gamma; 5 in
      the source. None: all timesteps alike.

  Returns:
    "loss", "mse" (of the prediction, mean over dimensions, unweighted) and,
    with learned variance, "vlb" (bits per dimension of this timestep's term).

  Raises:
    ValueError: an unknown prediction or variance, or channels that do not fit.
  """
  output, variance_output = _split(model_output, x_t, variance)
  error = output.astype(jnp.float32) - target(
    schedule, x_start, noise, timesteps, prediction
  )
  mse = _mean_per_example(jnp.square(error))
  weighted = mse
  if min_snr_gamma is not None:
    weight = min_snr_weight(schedule, min_snr_gamma, prediction)
    weighted = mse * jnp.asarray(weight, jnp.float32)[timesteps]
  if variance_output is None:
    return {"loss": weighted, "mse": mse}
  vlb = vlb_terms(
    schedule,
    jnp.concatenate([jax.lax.stop_gradient(output), variance_output], axis=-1),
    x_start,
    x_t,
    timesteps,
    prediction=prediction,
    variance=variance,
  )
  loss = weighted + schedule.num_timesteps / 1000.0 * vlb
  return {"loss": loss, "mse": mse, "vlb": vlb}
