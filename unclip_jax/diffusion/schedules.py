"""Noise schedules as float64 tables, and the choice of sampling steps.

A schedule is its cumulative signal level alphas_cumprod[t], as in
  x_t = sqrt(alphas_cumprod[t]) x_start + sqrt(1 - alphas_cumprod[t]) noise
(Ho et al. 2020, arXiv 2006.11239, eq. 4); everything else follows from it, so
that sampling with fewer steps is no more than picking entries: with
S = the steps kept, beta_{S_i} = 1 - alphas_cumprod[S_i] / alphas_cumprod[S_i-1]
(Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 19).

T diffusion timesteps; timestep 0 has the least noise, T - 1 the most.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

MAX_BETA = 0.999  # a step with beta = 1 would forget x_t and has no inverse


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
  """The tables of a discrete Gaussian diffusion, each float64 [T], read-only.

  Attributes:
    alphas_cumprod: signal level (squared) of x_t, in (0, 1), decreasing.
    timestep_map: int32 [T], the timestep that the network is told, which
      differs from the index after `respace`.

  Raises:
    ValueError: the tables are not as described.
  """

  alphas_cumprod: np.ndarray
  timestep_map: np.ndarray

  def __post_init__(self) -> None:
    alphas_cumprod = np.array(self.alphas_cumprod, np.float64)
    timestep_map = np.array(self.timestep_map, np.int32)
    if alphas_cumprod.ndim != 1 or alphas_cumprod.shape != timestep_map.shape:
      raise ValueError(
        "alphas_cumprod and timestep_map must both be [T], got"
        f" {alphas_cumprod.shape} and {timestep_map.shape}"
      )
    levels = np.concatenate([[1.0], alphas_cumprod])
    if len(levels) < 2 or levels[-1] <= 0 or np.any(np.diff(levels) >= 0):
      raise ValueError("alphas_cumprod must decrease strictly from 1 towards 0")
    alphas_cumprod.setflags(write=False)
    timestep_map.setflags(write=False)
    object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
    object.__setattr__(self, "timestep_map", timestep_map)

  @classmethod
  def from_betas(cls, betas: np.ndarray) -> NoiseSchedule:
    """The schedule with noise variances `betas` [T], each in (0, 1)."""
    alphas_cumprod = np.cumprod(1.0 - np.asarray(betas, np.float64))
    return cls(alphas_cumprod, np.arange(len(alphas_cumprod)))

  @property
  def num_timesteps(self) -> int:
    return len(self.alphas_cumprod)

  @functools.cached_property
  def alphas_cumprod_prev(self) -> np.ndarray:
    """alphas_cumprod one step nearer to the data; 1 before timestep 0."""
    return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

  @functools.cached_property
  def betas(self) -> np.ndarray:
    """Variance of the noise that the step to t adds."""
    return 1.0 - self.alphas_cumprod / self.alphas_cumprod_prev

  @functools.cached_property
  def sqrt_alphas_cumprod(self) -> np.ndarray:
    return np.sqrt(self.alphas_cumprod)

  @functools.cached_property
  def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
    return np.sqrt(1.0 - self.alphas_cumprod)

  @functools.cached_property
  def posterior_variance(self) -> np.ndarray:
    """Variance of q(x_{t-1} | x_t, x_start); 0 at t = 0 (Ho et al., eq. 7)."""
    remaining = (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
    return remaining * self.betas

  @functools.cached_property
  def posterior_log_variance_clipped(self) -> np.ndarray:
    """Log of posterior_variance, with the 0 at t = 0 replaced by its successor.

    A schedule of one step has no successor: beta stands in.
    """
    variance = self.posterior_variance.copy()
    variance[0] = variance[1] if self.num_timesteps > 1 else self.betas[0]
    return np.log(variance)

  @functools.cached_property
  def posterior_mean_coef_x_start(self) -> np.ndarray:
    """Weight of x_start in the posterior's mean (Ho et al., eq. 7)."""
    return (
      np.sqrt(self.alphas_cumprod_prev)
      * self.betas
      / (1.0 - self.alphas_cumprod)
    )

  @functools.cached_property
  def posterior_mean_coef_x_t(self) -> np.ndarray:
    """Weight of x_t in the posterior's mean (Ho et al., eq. 7)."""
    remaining = (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
    return np.sqrt(1.0 - self.betas) * remaining

  def respace(
    self, timesteps: int | Sequence[int] | np.ndarray
  ) -> NoiseSchedule:
    """The schedule over some of the timesteps; the network sees their numbers.

    Args:
      timesteps: indices into this schedule, strictly ascending; or how many,
        placed by `step_placement`.

    Raises:
      ValueError: the indices are out of range or not ascending.
    """
    if isinstance(timesteps, (int, np.integer)):
      timesteps = step_placement(self.num_timesteps, int(timesteps))
    kept = np.asarray(timesteps)
    if (
      kept.ndim != 1
      or not len(kept)
      or not np.issubdtype(kept.dtype, np.integer)
      or kept[0] < 0
      or kept[-1] >= self.num_timesteps
      or np.any(np.diff(kept) <= 0)
    ):
      raise ValueError(
        "timesteps must be strictly ascending integers in"
        f" [0, {self.num_timesteps}), got {timesteps}"
      )
    return NoiseSchedule(self.alphas_cumprod[kept], self.timestep_map[kept])


def make_schedule(
  name: str, num_timesteps: int = 1000, snr_scale: float = 1.0
) -> NoiseSchedule:
  """A named schedule.

  Args:
    name: "cosine" (Nichol & Dhariwal, eq. 17, s = 0.008) or "linear" (Ho et
      al., section 4: beta from 1e-4 to 0.02 at 1000 timesteps; for another
      number, scaled so that the total noise stays about the same, as in
      Nichol & Dhariwal's released code).
    num_timesteps: T. Every beta is held below `MAX_BETA`, which for "linear"
      matters only when T is about 20 or less.
    snr_scale: factor on the signal-to-noise ratio of every timestep; below 1
      training and sampling spend more of their steps where the noise hides
      the detail (Hoogeboom et al. 2023, arXiv 2301.11093, section 3.1: their
      shift is log snr_scale).

  Raises:
    ValueError: an unknown name, T < 1, or snr_scale <= 0.
  """
  if num_timesteps < 1:
    raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
  if snr_scale <= 0:
    raise ValueError(f"snr_scale must be positive, got {snr_scale}")
  if name == "cosine":
    time = np.arange(num_timesteps + 1) / num_timesteps
    level = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = 1.0 - level[1:] / level[:-1]
  elif name == "linear":
    scale = 1000 / num_timesteps
    betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps)
  else:
    raise ValueError(
      f"unknown noise schedule {name!r}: use 'cosine' or 'linear'"
    )
  schedule = NoiseSchedule.from_betas(np.minimum(betas, MAX_BETA))
  if snr_scale == 1.0:
    return schedule
  snr = snr_scale * schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
  return NoiseSchedule(snr / (1.0 + snr), schedule.timestep_map)


def step_placement(
  num_timesteps: int, num_sample_steps: int, kind: str = "uniform"
) -> np.ndarray:
  """Which of T timesteps to sample with: ascending int32 [num_sample_steps].

  Args:
    num_timesteps: T.
    num_sample_steps: N, at most T.
    kind: "uniform": round(i (T - 1) / (N - 1)), ties to even, which holds both
      0 and T - 1 (the rule of Karlo's samplers); [T - 1] for N = 1.
      "trailing": round((i + 1) T / N) - 1, which holds T - 1 and makes the
      last step as long as the others (Lin et al. 2023, arXiv 2305.08891,
      section 3.3).
      Counts as in "10,10,3,2,2", N together: cuts the timesteps into equal
      sections, the first with the least noise, and places so many in each,
      uniformly from its first to its last (GLIDE's released code).
      "fast27": those counts, and T - 3 in place of T - 1 (GLIDE's upsampler).

  Raises:
    ValueError: N is not in [1, T], counts that do not fit, an unknown kind.
  """
  if not 1 <= num_sample_steps <= num_timesteps:
    raise ValueError(
      f"num_sample_steps must be in [1, {num_timesteps}] (the schedule's"
      f" number of timesteps), got {num_sample_steps}"
    )
  if kind == "uniform":
    return _uniform(num_timesteps, num_sample_steps)
  if kind == "trailing":
    fractions = np.arange(1, num_sample_steps + 1) / num_sample_steps
    return np.round(fractions * num_timesteps).astype(np.int32) - 1
  if kind == "fast27":
    kept = _sectioned(num_timesteps, num_sample_steps, "10,10,3,2,2")
    kept[-1] = num_timesteps - 3
    return kept
  return _sectioned(num_timesteps, num_sample_steps, kind)


def _uniform(size: int, count: int) -> np.ndarray:
  if count == 1:
    return np.array([size - 1], np.int32)
  return np.round(np.arange(count) * (size - 1) / (count - 1)).astype(np.int32)


def _sectioned(
  num_timesteps: int, num_sample_steps: int, counts: str
) -> np.ndarray:
  try:
    sizes = [int(count) for count in counts.split(",")]
  except ValueError:
    raise ValueError(
      f"unknown step placement {counts!r}: use 'uniform', 'trailing', 'fast27'"
      " or counts such as '10,10,3,2,2'"
    ) from None
  if sum(sizes) != num_sample_steps:
    raise ValueError(
      f"the step placement {counts!r} has {sum(sizes)} steps:"
      f" num_sample_steps must be that, not {num_sample_steps}"
    )
  kept, start = [], 0
  for i, count in enumerate(sizes):
    size = num_timesteps // len(sizes) + (i < num_timesteps % len(sizes))
    if not 1 <= count <= size:
      raise ValueError(
        f"section {i} of the step placement {counts!r} has {size} timesteps,"
        f" {count} cannot be placed in it"
      )
    # A lone step stands at its section's start, as in GLIDE.
    placed = _uniform(size, count) if count > 1 else np.zeros(1, np.int32)
    kept.append(start + placed)
    start += size
  return np.concatenate(kept).astype(np.int32)
