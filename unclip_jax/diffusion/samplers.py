"""Samplers: a denoising network and a schedule in, data out.

Each is one `lax.scan` over the steps, for data of any rank, and knows the
network only as `denoise_fn(x_t, timesteps) -> model_output`, with x_t
[B, ...] float32 and timesteps int32 [B] as the network was trained on them
(`schedule.timestep_map`). Jit the caller: it then compiles once per shape.

Randomness: `rng` is one typed key, or typed keys [B], one per example, in
which case an example's draws do not depend on the batch that it is in. Step i
draws with fold_in(rng, i). `noise` replaces the draws.

In the formulas, a = alphas_cumprod[t] and a' = alphas_cumprod[t - 1] of the
respaced schedule, a' = 1 at the last step.

A network may also be given the x_start that the step before predicted, zeros at
the first: self-conditioning (Chen et al. 2022, arXiv 2208.04202). Wrapped in
`SelfConditioned` it goes wherever a `denoise_fn` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import draws, gaussian, schedules

DenoiseFn = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class SelfConditioned:
  """A network `fn(x_t, timesteps, x_start) -> model_output`."""

  fn: DenoiseFn

  def __call__(
    self, x_t: jax.Array, timesteps: jax.Array, x_start: jax.Array
  ) -> jax.Array:
    return self.fn(x_t, timesteps, x_start)


def as_conditioned(denoise_fn: DenoiseFn, fn: DenoiseFn) -> DenoiseFn:
  """`fn`, made of `denoise_fn`, as self-conditioned as that is."""
  if isinstance(denoise_fn, SelfConditioned):
    return SelfConditioned(fn)
  return fn


class Trace(NamedTuple):
  """What happened at each of the N steps, in the order of execution."""

  timesteps: jax.Array  # int32 [N], as the network was told
  x_t: jax.Array  # [N, B, ...], what the network saw
  x_start: jax.Array  # [N, B, ...], what it predicted (clipped, if asked for)


class _Step(NamedTuple):
  """What a sampler's update is given besides the network's output."""

  x_t: jax.Array
  timesteps: jax.Array  # int32 [B], into the respaced schedule
  noise: jax.Array | None
  coefs: dict[str, jax.Array]  # this step's entries of the sampler's tables


# (model_output, step, memory) -> (next x_t, predicted x_start, next memory).
# The memory is what a sampler carries of earlier steps; () for most.
_Memory = Any
_UpdateFn = Callable[
  [jax.Array, _Step, _Memory], tuple[jax.Array, jax.Array, _Memory]
]


def _scan_steps(
  update_fn: _UpdateFn,
  denoise_fn: DenoiseFn,
  schedule: schedules.NoiseSchedule,
  x: jax.Array,
  indices: np.ndarray,
  coefs: dict[str, np.ndarray],
  *,
  rng: jax.Array | None,
  noise: jax.Array | None,
  return_trace: bool,
  memory: _Memory = (),
) -> jax.Array | tuple[jax.Array, Trace]:
  """Runs the network at each of indices [N] into schedule, then update_fn.

  coefs are tables [N] in the order of execution, memory what the first update
  is given. With neither rng nor noise, the update gets None for its noise.
  """
  expected = (len(indices), *x.shape)
  if noise is not None and noise.shape != expected:
    raise ValueError(f"noise must be {expected}, got {noise.shape}")
  if rng is not None:
    draws.check(rng, x.shape)
  timestep_map = jnp.asarray(schedule.timestep_map)

  def body(
    carried: tuple[jax.Array, tuple, _Memory], scanned: tuple
  ) -> tuple[tuple[jax.Array, tuple, _Memory], Trace | None]:
    x_t, estimate, memory = carried
    i, index, step_noise, step_coefs = scanned
    timesteps = jnp.full(x_t.shape[:1], index)
    if noise is None and rng is not None:
      step_noise = draws.normal(draws.fold_in(rng, i), x_t.shape)
    model_output = denoise_fn(x_t, timestep_map[timesteps], *estimate)
    step = _Step(x_t, timesteps, step_noise, step_coefs)
    x_next, x_start, memory = update_fn(model_output, step, memory)
    trace = Trace(timestep_map[index], x_t, x_start) if return_trace else None
    estimate = (x_start,) if estimate else ()
    return (x_next, estimate, memory), trace

  scanned = (
    jnp.arange(len(indices)),
    jnp.asarray(indices, jnp.int32),
    noise,
    {name: jnp.asarray(c, jnp.float32) for name, c in coefs.items()},
  )
  x = x.astype(jnp.float32)
  is_self_conditioned = isinstance(denoise_fn, SelfConditioned)
  carried = (x, (jnp.zeros_like(x),) if is_self_conditioned else (), memory)
  (x, _, _), trace = jax.lax.scan(body, carried, scanned)
  return (x, trace) if return_trace else x


# (predicted x_start, the eps that with it makes up x_t, step, memory)
# -> (next x_t, next memory)
_SolveFn = Callable[
  [jax.Array, jax.Array, _Step, _Memory], tuple[jax.Array, _Memory]
]


def _solve_steps(
  solve_fn: _SolveFn,
  denoise_fn: DenoiseFn,
  schedule: schedules.NoiseSchedule,
  x: jax.Array,
  indices: np.ndarray,
  coefs: dict[str, np.ndarray],
  *,
  prediction: gaussian.Prediction,
  variance: gaussian.Variance,
  clip_x_start: gaussian.ClipXStart,
  return_trace: bool,
  rng: jax.Array | None = None,
  noise: jax.Array | None = None,
  memory: _Memory = (),
) -> jax.Array | tuple[jax.Array, Trace]:
  """`_scan_steps` for DDIM and its kin, which know only x_start and eps."""

  def update(
    model_output: jax.Array, step: _Step, memory: _Memory
  ) -> tuple[jax.Array, jax.Array, _Memory]:
    x_start = gaussian.p_mean_variance(
      schedule,
      model_output,
      step.x_t,
      step.timesteps,
      prediction=prediction,
      variance=variance,
      clip_x_start=clip_x_start,
    ).x_start
    eps = gaussian.predict_eps(
      schedule, x_start, step.x_t, step.timesteps, prediction="x_start"
    )
    x_next, memory = solve_fn(x_start, eps, step, memory)
    return x_next, x_start, memory

  return _scan_steps(
    update,
    denoise_fn,
    schedule,
    x,
    indices,
    coefs,
    rng=rng,
    noise=noise,
    return_trace=return_trace,
    memory=memory,
  )


def ddpm(
  denoise_fn: DenoiseFn,
  schedule: schedules.NoiseSchedule,
  x_T: jax.Array,
  rng: jax.Array | None,
  *,
  num_steps: int | Sequence[int],
  prediction: gaussian.Prediction,
  variance: gaussian.Variance,
  clip_x_start: gaussian.ClipXStart = None,
  num_resamples: int = 1,
  jump_length: int = 10,
  noise: jax.Array | None = None,
  return_trace: bool = False,
) -> jax.Array | tuple[jax.Array, Trace]:
  """Ancestral sampling: Ho et al. 2020 (arXiv 2006.11239), algorithm 2.

  With num_resamples it goes back to more noise and down again on the way, which
  lets what is drawn fit what is known when a part of x_start is given by
  clip_x_start: RePaint (Lugmayr et al. 2022, arXiv 2201.09865, section 4.2).

  Args:
    denoise_fn: the network, see the module's docstring.
    schedule: the schedule that the network was trained with.
    x_T: [B, ...] standard normal.
    rng: typed key or keys [B]; may be None if noise is given.
    num_steps: how many of the schedule's timesteps to use, evenly placed, or
      which ones, ascending (`NoiseSchedule.respace`).
    prediction: what the network predicts.
    variance: the variance of each step; "learned_range" takes it from the
      network's last C of 2C channels.
    clip_x_start: clips the predicted x_start to [-value, value]; or a function
      that is applied to it.
    num_resamples: how often each stretch of jump_length steps is done; 10 in
      RePaint.
    jump_length: steps that one way back undoes; 10 in RePaint.
    noise: [num_network_calls, B, ...] standard normal in place of draws; entry
      i is that of call i in the order of execution. The last entry is unused,
      for the last step returns the mean.
    return_trace: also return what every step saw and predicted.

  Returns:
    x_0 [B, ...] float32, or (x_0, Trace).

  Raises:
    ValueError: arguments that do not fit each other.
  """
  if rng is None and noise is None:
    raise ValueError("ddpm needs rng, or noise in its place")
  schedule = schedule.respace(num_steps)

  def update(
    model_output: jax.Array, step: _Step, memory: _Memory
  ) -> tuple[jax.Array, jax.Array, _Memory]:
    mean, log_variance, x_start = gaussian.p_mean_variance(
      schedule,
      model_output,
      step.x_t,
      step.timesteps,
      prediction=prediction,
      variance=variance,
      clip_x_start=clip_x_start,
    )
    # After the step, noise that leads back to where the next one starts: the
    # sum of both draws is one draw.
    kept = step.coefs["kept"]
    variance_next = kept * jnp.exp(log_variance) + 1.0 - kept
    sigma = step.coefs["is_noised"] * jnp.sqrt(variance_next)
    return jnp.sqrt(kept) * mean + sigma * step.noise, x_start, memory

  indices = _with_jumps(schedule.num_timesteps, num_resamples, jump_length)
  next_indices = np.append(indices[1:], -1)
  levels = np.append(schedule.alphas_cumprod, 1.0)  # entry -1: the data
  return _scan_steps(
    update,
    denoise_fn,
    schedule,
    x_T,
    indices,
    {
      "is_noised": indices > 0,
      "kept": levels[next_indices] / levels[indices - 1],
    },
    rng=rng,
    noise=noise,
    return_trace=return_trace,
  )


def _with_jumps(
  num_steps: int, num_resamples: int, jump_length: int
) -> np.ndarray:
  """Where the calls start: from num_steps - 1 down to 0, and back on the way.

  Raises:
    ValueError: a number that is not positive.
  """
  if num_resamples < 1 or jump_length < 1:
    raise ValueError(
      "num_resamples and jump_length must be at least 1, got"
      f" {num_resamples} and {jump_length}"
    )
  jumps = dict.fromkeys(
    range(0, num_steps - jump_length, jump_length), num_resamples - 1
  )
  indices, index = [], num_steps - 1
  while index >= 0:
    indices.append(index)
    index -= 1
    if jumps.get(index):
      jumps[index] -= 1
      index += jump_length
  return np.array(indices)


def ddim(
  denoise_fn: DenoiseFn,
  schedule: schedules.NoiseSchedule,
  x_T: jax.Array,
  rng: jax.Array | None,
  *,
  num_steps: int | Sequence[int],
  prediction: gaussian.Prediction,
  variance: gaussian.Variance,
  clip_x_start: gaussian.ClipXStart = None,
  eta: float = 0.0,
  noise: jax.Array | None = None,
  return_trace: bool = False,
) -> jax.Array | tuple[jax.Array, Trace]:
  """DDIM: Song et al. 2020 (arXiv 2010.02502), eq. 12 with sigma of eq. 16.

    x' = sqrt(a') x_start + sqrt(1 - a' - sigma^2) eps + sigma noise,
    sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

  Args:
    denoise_fn, schedule, x_T, num_steps, prediction, noise,
      return_trace: as for `ddpm`.
    rng: as for `ddpm`; not used, and may be None, when eta is 0.
    variance: says only whether the network's output has variance channels,
      which DDIM ignores.
    clip_x_start: as for `ddpm`; eps is then the one that fits the clipped
      x_start.
    eta: 0 is deterministic, 1 is `ddpm` with "fixed_small"; a Python float.

  Returns:
    x_0 [B, ...] float32, or (x_0, Trace).

  Raises:
    ValueError: arguments that do not fit each other.
  """
  if not 0.0 <= eta <= 1.0:
    raise ValueError(f"eta must be in [0, 1], got {eta}")
  if eta > 0 and rng is None and noise is None:
    raise ValueError("ddim with eta > 0 needs rng, or noise in its place")
  schedule = schedule.respace(num_steps)
  level = schedule.alphas_cumprod_prev
  sigma = eta * np.sqrt(schedule.posterior_variance)
  tables = {
    "x_start": np.sqrt(level),
    # Never negative but for rounding (sigma^2 <= 1 - level where eta <= 1).
    "eps": np.sqrt(np.maximum(1.0 - level - sigma**2, 0.0)),
    "noise": sigma,
  }

  def solve(
    x_start: jax.Array, eps: jax.Array, step: _Step, memory: _Memory
  ) -> tuple[jax.Array, _Memory]:
    x_next = step.coefs["x_start"] * x_start + step.coefs["eps"] * eps
    if eta > 0:
      x_next += step.coefs["noise"] * step.noise
    return x_next, memory

  return _solve_steps(
    solve,
    denoise_fn,
    schedule,
    x_T,
    np.arange(schedule.num_timesteps)[::-1],
    {name: table[::-1] for name, table in tables.items()},
    rng=rng if eta > 0 else None,
    noise=noise if eta > 0 else None,
    prediction=prediction,
    variance=variance,
    clip_x_start=clip_x_start,
    return_trace=return_trace,
  )


def ddim_inverse(
  denoise_fn: DenoiseFn,
  schedule: schedules.NoiseSchedule,
  x_start: jax.Array,
  *,
  num_steps: int | Sequence[int],
  prediction: gaussian.Prediction,
  variance: gaussian.Variance,
  clip_x_start: gaussian.ClipXStart = None,
  num_refinements: int = 0,
  return_trace: bool = False,
) -> jax.Array | tuple[jax.Array, Trace]:
  """DDIM inversion: Song et al. 2020 (arXiv 2010.02502), eq. 13 backwards.

  The x_T from which `ddim` with eta = 0 and the same num_steps gives x_start
  back, up to the error of a first-order solver. With s = sqrt((1 - a) / a),

    x / sqrt(a) = x' / sqrt(a') + (s - s') eps(x', t - 1)

  and for the step that leaves the data (a' = 1, s' = 0), where no network is
  trained, eps(x', 0). The exact inverse of `ddim`'s step has eps(x, t) in that
  place, of which this is the first guess: every refinement puts the x found
  last into it (the fixed-point iteration of Pan et al. 2023, arXiv 2309.04907,
  without their averaging).

  Args:
    denoise_fn, schedule, num_steps, prediction, variance, clip_x_start,
      return_trace: as for `ddim`; the trace has growing noise, and an entry
      for each refinement.
    x_start: [B, ...] data.
    num_refinements: calls of the network per step beside the first; they
      converge where a step is short for how fast the prediction changes.

  Returns:
    x_T [B, ...] float32, or (x_T, Trace).

  Raises:
    ValueError: arguments that do not fit each other.
  """
  schedule = schedule.respace(num_steps)
  # Step i goes from the level of index i - 1 to that of index i, in one call
  # of the network at i - 1 and the refinements at i.
  level_from, level_to = schedule.alphas_cumprod_prev, schedule.alphas_cumprod
  coef_x = np.sqrt(level_to / level_from)
  coef_eps = np.sqrt(1.0 - level_to) - coef_x * np.sqrt(1.0 - level_from)
  num_calls = 1 + num_refinements
  steps = np.arange(schedule.num_timesteps).repeat(num_calls)
  is_first = np.arange(len(steps)) % num_calls == 0

  def solve(
    x_start: jax.Array, eps: jax.Array, step: _Step, start: _Memory
  ) -> tuple[jax.Array, _Memory]:
    start = jnp.where(step.coefs["is_first"] > 0, step.x_t, start)
    x_next = step.coefs["x"] * start + step.coefs["eps"] * eps
    return x_next, start

  return _solve_steps(
    solve,
    denoise_fn,
    schedule,
    x_start,
    np.where(is_first, np.maximum(steps - 1, 0), steps),
    {"x": coef_x[steps], "eps": coef_eps[steps], "is_first": is_first},
    prediction=prediction,
    variance=variance,
    clip_x_start=clip_x_start,
    return_trace=return_trace,
    memory=jnp.zeros(x_start.shape, jnp.float32),
  )


def dpmpp_2m(
  denoise_fn: DenoiseFn,
  schedule: schedules.NoiseSchedule,
  x_T: jax.Array,
  rng: jax.Array | None = None,
  *,
  num_steps: int | Sequence[int],
  prediction: gaussian.Prediction,
  variance: gaussian.Variance,
  clip_x_start: gaussian.ClipXStart = None,
  noise: jax.Array | None = None,
  return_trace: bool = False,
) -> jax.Array | tuple[jax.Array, Trace]:
  """DPM-Solver++ 2M: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.

  With lambda = log(sqrt(a) / sqrt(1 - a)), h its growth in this step and h_p
  in the one before, and D = x_start + h / (2 h_p) (x_start - the previous one),

    x' = sqrt((1 - a') / (1 - a)) x + (sqrt(a') - the same ratio sqrt(a)) D

  The first step knows no previous x_start and the last one ends at h = inf:
  both take D = x_start, which is DDIM with eta = 0. Deviation: so does a step
  with h > 2 h_p, such as the one to timestep 0 under evenly placed timesteps,
  for which the line through two x_start is no guide.

  Args and returns: as for `ddim` with eta = 0; rng and noise are not used.
  """
  del rng, noise
  schedule = schedule.respace(num_steps)
  level, level_next = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
  log_snr = 0.5 * (np.log(level) - np.log1p(-level))  # lambda
  ratio = np.sqrt((1.0 - level_next) / (1.0 - level))
  extrapolation = np.zeros(len(level))
  if len(level) > 2:
    h = -np.diff(log_snr)  # h[i]: of the step from index i + 1 to index i
    growth = h[:-1] / h[1:]
    extrapolation[1:-1] = np.where(growth <= 2.0, growth / 2.0, 0.0)
  tables = {
    "x_t": ratio,
    "x_start": np.sqrt(level_next) - ratio * np.sqrt(level),
    "extrapolation": extrapolation,
  }

  def solve(
    x_start: jax.Array, eps: jax.Array, step: _Step, previous: _Memory
  ) -> tuple[jax.Array, _Memory]:
    coefs = step.coefs
    extrapolated = x_start + coefs["extrapolation"] * (x_start - previous)
    x_next = coefs["x_t"] * step.x_t + coefs["x_start"] * extrapolated
    return x_next, x_start

  return _solve_steps(
    solve,
    denoise_fn,
    schedule,
    x_T,
    np.arange(schedule.num_timesteps)[::-1],
    {name: table[::-1] for name, table in tables.items()},
    prediction=prediction,
    variance=variance,
    clip_x_start=clip_x_start,
    return_trace=return_trace,
    memory=jnp.zeros(x_T.shape, jnp.float32),
  )


def heun(
  denoise_fn: DenoiseFn,
  schedule: schedules.NoiseSchedule,
  x_T: jax.Array,
  rng: jax.Array | None = None,
  *,
  num_steps: int | Sequence[int],
  prediction: gaussian.Prediction,
  variance: gaussian.Variance,
  clip_x_start: gaussian.ClipXStart = None,
  noise: jax.Array | None = None,
  return_trace: bool = False,
) -> jax.Array | tuple[jax.Array, Trace]:
  """Heun's method on DDIM's differential equation, in exponential form.

  Every step but the last is a DDIM step with eta = 0 and its correction, for
  which x_start is taken to be linear in lambda = log(sqrt(a) / sqrt(1 - a))
  from its prediction at the start to that at the predicted end (the second-
  order exponential Runge-Kutta method: Hochbruck & Ostermann 2010, "Exponential
  integrators", eq. 2.39 with c_2 = 1). Plain Heun in sigma, as in Karras et al.
  2022 (arXiv 2206.00364), diverges on schedules that end near pure noise.

  num_steps = N calls the network 2 N - 1 times, in one scan.

  Args and returns: as for `ddim` with eta = 0 (which is Euler's method); rng
    and noise are not used. The trace has 2 N - 1 entries.
  """
  del rng, noise
  schedule = schedule.respace(num_steps)
  # Call 2k predicts the step from index N - 1 - k to the one before, call
  # 2k + 1, at the predicted point, corrects it.
  N = schedule.num_timesteps
  step_from = N - 1 - np.arange(2 * N - 1) // 2
  is_correction = np.arange(2 * N - 1) % 2 == 1
  level = schedule.alphas_cumprod[step_from]
  level_next = schedule.alphas_cumprod_prev[step_from]
  ratio = np.sqrt((1.0 - level_next) / (1.0 - level))
  decay = ratio * np.sqrt(level / level_next)  # exp(-h)
  weight = np.zeros(2 * N - 1)  # of the end's x_start
  h = -np.log(decay[is_correction])
  weight[is_correction] = 1.0 / (1.0 - decay[is_correction]) - 1.0 / h
  tables = {
    "x_t": ratio,
    "x_start": np.sqrt(level_next) - ratio * np.sqrt(level),
    "is_correction": is_correction,
    "weight": weight,
  }

  def solve(
    x_start: jax.Array, eps: jax.Array, step: _Step, start: _Memory
  ) -> tuple[jax.Array, _Memory]:
    coefs = step.coefs
    is_correction = coefs["is_correction"] > 0
    start_x_t, start_x_start = start  # of the step that is being corrected
    corrected = start_x_start + coefs["weight"] * (x_start - start_x_start)
    x_next = coefs["x_t"] * jnp.where(
      is_correction, start_x_t, step.x_t
    ) + coefs["x_start"] * jnp.where(is_correction, corrected, x_start)
    return x_next, (step.x_t, x_start)

  zeros = jnp.zeros(x_T.shape, jnp.float32)
  return _solve_steps(
    solve,
    denoise_fn,
    schedule,
    x_T,
    step_from - is_correction,
    tables,
    prediction=prediction,
    variance=variance,
    clip_x_start=clip_x_start,
    return_trace=return_trace,
    memory=(zeros, zeros),
  )


SAMPLERS: dict[str, Callable[..., Any]] = {
  "ddpm": ddpm,
  "ddim": ddim,
  "dpmpp_2m": dpmpp_2m,
  "heun": heun,
}


def num_network_calls(
  sampler: str,
  num_sample_steps: int,
  num_resamples: int = 1,
  jump_length: int = 10,
) -> int:
  """How often a sampler calls the network."""
  if sampler == "heun":
    return 2 * num_sample_steps - 1
  return len(_with_jumps(num_sample_steps, num_resamples, jump_length))
