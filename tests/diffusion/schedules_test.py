"""Noise schedules: published facts, and respacing as picking of entries."""

from __future__ import annotations

import numpy as np
import pytest

from unclip_jax.diffusion import schedules


def test_cosine_matches_the_published_tables():
  # Karlo's scheduler (squaredcos_cap_v2), Nichol & Dhariwal eq. 17.
  schedule = schedules.make_schedule("cosine", 1000)
  np.testing.assert_allclose(schedule.betas[0], 4.128e-5, rtol=1e-3)
  np.testing.assert_allclose(schedule.betas[999], 0.999, rtol=1e-9)
  np.testing.assert_allclose(schedule.alphas_cumprod[499], 0.49384, rtol=1e-5)


def test_cosine_is_the_formula_until_the_bound_on_beta_acts():
  schedule = schedules.make_schedule("cosine", 200)
  time = np.arange(201) / 200
  level = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
  np.testing.assert_allclose(
    schedule.alphas_cumprod[:-1], (level / level[0])[1:-1], rtol=1e-10
  )


def test_snr_scale_multiplies_every_signal_to_noise_ratio():
  def snr(schedule):
    return schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

  plain = schedules.make_schedule("cosine", 1000)
  scaled = schedules.make_schedule("cosine", 1000, snr_scale=0.25)
  np.testing.assert_allclose(snr(scaled), snr(plain) / 4, rtol=1e-9)
  with pytest.raises(ValueError, match="snr_scale"):
    schedules.make_schedule("cosine", 10, snr_scale=0.0)


def test_linear_is_evenly_spaced_and_keeps_the_total_noise():
  schedule = schedules.make_schedule("linear", 1000)
  np.testing.assert_allclose(schedule.betas[[0, -1]], [1e-4, 0.02], rtol=1e-9)
  np.testing.assert_allclose(
    np.diff(schedule.betas), (0.02 - 1e-4) / 999, rtol=1e-6
  )
  fewer = schedules.make_schedule("linear", 250)
  np.testing.assert_allclose(
    np.log(fewer.alphas_cumprod[-1]),
    np.log(schedule.alphas_cumprod[-1]),
    rtol=0.05,
  )


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000])
def test_tables_are_whole_for_any_number_of_timesteps(name, num_timesteps):
  schedule = schedules.make_schedule(name, num_timesteps)
  assert schedule.num_timesteps == num_timesteps
  for table in (
    schedule.betas,
    schedule.posterior_variance,
    schedule.posterior_log_variance_clipped,
    schedule.posterior_mean_coef_x_start,
    schedule.posterior_mean_coef_x_t,
  ):
    assert table.shape == (num_timesteps,) and table.dtype == np.float64
    assert np.all(np.isfinite(table))
  assert np.all((schedule.betas > 0) & (schedule.betas <= 0.999 + 1e-9))
  np.testing.assert_allclose(
    schedule.alphas_cumprod, np.cumprod(1 - schedule.betas), rtol=1e-10
  )


def test_log_variance_is_that_of_the_posterior_except_at_0():
  schedule = schedules.make_schedule("cosine", 50)
  assert schedule.posterior_variance[0] == 0
  expected = np.log(schedule.posterior_variance[[1, *range(1, 50)]])
  np.testing.assert_array_equal(
    schedule.posterior_log_variance_clipped, expected
  )


@pytest.mark.parametrize(
  "num_sample_steps, first, last",
  [
    (25, [0, 42], [916, 957, 999]),
    (50, [0, 20], [979, 999]),
    (7, [0, 166, 333, 500], [666, 832, 999]),
  ],
)
def test_placement_matches_karlo(num_sample_steps, first, last):
  placed = schedules.step_placement(1000, num_sample_steps)
  assert placed.dtype == np.int32 and len(placed) == num_sample_steps
  assert placed[: len(first)].tolist() == first
  assert placed[-len(last) :].tolist() == last


def test_placement_of_one_and_of_all_steps():
  assert schedules.step_placement(1000, 1).tolist() == [999]
  assert schedules.step_placement(37, 37).tolist() == list(range(37))
  for n in range(2, 38):
    placed = schedules.step_placement(37, n)
    assert np.all(np.diff(placed) > 0) and placed[0] == 0 and placed[-1] == 36


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_respaced_levels_are_the_full_schedules(name):
  full = schedules.make_schedule(name, 1000)
  kept = [0, 3, 250, 700, 999]
  respaced = full.respace(kept)
  np.testing.assert_array_equal(
    respaced.alphas_cumprod, full.alphas_cumprod[kept]
  )
  np.testing.assert_array_equal(respaced.timestep_map, kept)
  # Nichol & Dhariwal, eq. 19; and one long step is many short ones.
  for i in range(1, len(kept)):
    short_steps = full.betas[kept[i - 1] + 1 : kept[i] + 1]
    np.testing.assert_allclose(
      1 - respaced.betas[i], np.prod(1 - short_steps), rtol=1e-7
    )


def test_respacing_to_all_timesteps_changes_nothing():
  full = schedules.make_schedule("cosine", 100)
  same = full.respace(100)
  np.testing.assert_array_equal(same.alphas_cumprod, full.alphas_cumprod)
  np.testing.assert_array_equal(same.betas, full.betas)
  np.testing.assert_array_equal(same.timestep_map, np.arange(100))


def test_respacing_twice_keeps_the_original_timesteps():
  twice = (
    schedules.make_schedule("cosine", 1000).respace(25).respace([0, 2, 24])
  )
  assert twice.timestep_map.tolist() == [0, 83, 999]


def test_tables_cannot_be_written():
  schedule = schedules.make_schedule("cosine", 10)
  with pytest.raises(ValueError, match="read-only"):
    schedule.alphas_cumprod[0] = 0.5


def test_a_schedule_owns_its_tables():
  levels = np.array([0.9, 0.5])
  schedule = schedules.NoiseSchedule(levels, np.arange(2))
  levels[0] = 0.1
  assert schedule.alphas_cumprod[0] == 0.9


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda s: schedules.make_schedule("cosin"), "unknown noise schedule"),
    (lambda s: schedules.make_schedule("cosine", 0), "at least 1"),
    (lambda s: s.respace(11), r"in \[1, 10\]"),
    (lambda s: s.respace(0), r"in \[1, 10\]"),
    (lambda s: s.respace([3, 2]), "strictly ascending"),
    (lambda s: s.respace([2, 2]), "strictly ascending"),
    (lambda s: s.respace([0, 10]), "strictly ascending"),
    (lambda s: s.respace([-1, 3]), "strictly ascending"),
    (lambda s: s.respace([]), "strictly ascending"),
    (lambda s: s.respace([0.5, 3.0]), "strictly ascending"),
    (lambda s: schedules.step_placement(10, 5, "even"), "step placement"),
    (lambda s: schedules.NoiseSchedule.from_betas([0.1, 1.0]), "decrease"),
    (lambda s: schedules.NoiseSchedule.from_betas([0.1, 0.0]), "decrease"),
    (lambda s: schedules.NoiseSchedule([0.9, 0.5], [0]), r"both be \[T\]"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make(schedules.make_schedule("cosine", 10))


def test_fast27_is_glide_s_placement():
  # space_timesteps(1000, "fast27") of GLIDE's released code.
  kept = schedules.step_placement(1000, 27, "fast27")
  assert kept[:10].tolist() == [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
  assert kept[-7:].tolist() == [400, 500, 599, 600, 799, 800, 997]
  plain = schedules.step_placement(1000, 27, "10,10,3,2,2")
  assert plain[-1] == 999 and np.array_equal(plain[:-1], kept[:-1])


def test_a_lone_step_of_a_section_is_its_first():
  kept = schedules.step_placement(10, 4, "3,1")
  assert kept.tolist() == [0, 2, 4, 5]


def test_trailing_steps_are_equally_long_and_end_at_the_last():
  kept = schedules.step_placement(1000, 10, "trailing")
  assert kept.tolist() == list(range(99, 1000, 100))
  assert len(set(schedules.step_placement(1000, 999, "trailing"))) == 999


@pytest.mark.parametrize(
  "count, kind, message",
  [
    (10, "leading", "unknown step placement"),
    (10, "5,4", "has 9 steps"),
    (11, "9,2", "cannot be placed"),
    (26, "fast27", "has 27 steps"),
  ],
)
def test_placements_that_do_not_fit_are_named(count, kind, message):
  size = 16 if kind == "9,2" else 1000
  with pytest.raises(ValueError, match=message):
    schedules.step_placement(size, count, kind)
