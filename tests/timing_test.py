"""Accounts of time, by a clock that only the tests move; and a real trace."""

import json
import math

import pytest

from unclip_jax import flops, timing, trainer
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


class Clock:
  """Seconds that pass when told to."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now

  def add(self, seconds):
    self.now += seconds


def spend(clock, context, seconds):
  with context:
    clock.add(seconds)


def run_session(workdir, first, seconds_of_steps, peak_steps_per_second=None):
  """A timer after 5 s of start-up, of which 2 are the first step, and steps.

  Around each step but the first: 1 s for data, 0.5 s for the rest.
  """
  clock = Clock()
  timer = timing.Timer(workdir, started=clock.now - 1, clock=clock)
  clock.add(2)
  timer.begin(
    first,
    batch_size=8,
    num_devices=2,
    peak_steps_per_second=peak_steps_per_second,
  )
  spend(clock, timer.step(), 2)
  for seconds in seconds_of_steps:
    spend(clock, timer.part("data_wait"), 1)
    spend(clock, timer.step(), seconds)
    clock.add(0.5)
  return clock, timer


def test_every_second_is_in_one_part(tmp_path):
  clock, timer = run_session(tmp_path, 0, [3, 4])
  spend(clock, timer.part("evaluation"), 7)
  with timer.part("checkpoint"):
    clock.add(1)
    spend(clock, timer.part("data_wait"), 0.25)
    clock.add(1)
  with pytest.raises(KeyError), timer.part("evaluation"):
    clock.add(2)
    raise KeyError
  clock.add(0.125)
  session = timer.session()
  assert session["seconds"] == {
    "startup": 5,
    "step": 7,
    "data_wait": 2.25,
    "evaluation": 9,
    "checkpoint": 2,
    "other": 1.125,
  }
  assert tuple(session["seconds"]) == timing.PARTS
  assert sum(session["seconds"].values()) == session["wall_seconds"]
  assert session["wall_seconds"] == clock.now - 99
  assert math.isclose(sum(session["shares"].values()), 1)
  assert (session["first_step"], session["last_step"]) == (0, 3)


def test_rates_are_of_the_steps_since_the_last_call(tmp_path):
  clock, timer = run_session(tmp_path, 0, [], peak_steps_per_second=2.0)
  # What the first step took is start-up: it says nothing of the rate.
  assert timer.scalars().keys() == {"timing/peak_memory_gib", "timing/goodput"}
  for _ in range(4):
    spend(clock, timer.part("data_wait"), 1)
    spend(clock, timer.step(), 3)
  spend(clock, timer.part("evaluation"), 100)
  values = timer.scalars()
  assert values.pop("timing/peak_memory_gib") > 0
  assert values == {
    "timing/seconds_per_step": 4,
    "timing/examples_per_second": 2,
    "timing/examples_per_second_per_device": 1,
    "timing/data_wait_share": 0.25,
    "timing/model_flops_utilization": 0.125,
    "timing/goodput": 12 / 121,
  }
  spend(clock, timer.step(), 1)
  assert timer.scalars()["timing/seconds_per_step"] == 1


def test_steps_a_second(tmp_path):
  # A step ends with the device's: data and the rest before it are its own.
  _, timer = run_session(tmp_path, 0, [1] * 8 + [0.5, 9])
  session = timer.session()
  assert session["steps_per_second"] == {"median": 1 / 2.5, "p90": 1 / 2.5}
  seconds = 1 * 8 + 0.5 + 9 + 10 * 1 + 9 * 0.5
  assert session["examples_per_second_per_device"] == 4 * 10 / seconds
  assert "model_flops_utilization" not in session


def test_a_resumed_run_adds_a_session(tmp_path):
  path = tmp_path / "timing.json"
  # Steps 0 to 4, on record at the checkpoint and again at the end.
  _, timer = run_session(tmp_path, 0, [10, 10, 10])
  timer.save()
  timer.finish()
  (first,) = json.loads(path.read_text())["sessions"]
  # The checkpoint of step 4 was lost: of four steps, one is done again.
  _, timer = run_session(tmp_path, 3, [10])
  timer.finish()
  report = json.loads(path.read_text())
  assert report["sessions"][0] == first
  assert [x["last_step"] for x in report["sessions"]] == [4, 5]
  good = 30 * 3 / 4 + 10
  assert math.isclose(report["goodput"], good / (39.5 + 16.5))


def test_a_damaged_account_is_begun_anew(tmp_path):
  (tmp_path / "timing.json").write_text("{")
  run_session(tmp_path, 0, [1])[1].finish()
  report = json.loads((tmp_path / "timing.json").read_text())
  assert len(report["sessions"]) == 1


def test_a_start_that_fails_leaves_no_account(tmp_path):
  timing.Timer(tmp_path).finish()
  assert not list(tmp_path.iterdir())


def test_process_started_before_this_module_was_run():
  assert timing.process_started() < timing.time.monotonic() - 0.1


@pytest.mark.parametrize("spec", ["", "3", "1:0", "-1:2", "a:b", "1:2:3"])
def test_a_bad_profile_is_refused(tmp_path, spec):
  with pytest.raises(errors.UserError, match="START:COUNT") as e:
    trainer.train(smoke(), str(tmp_path / "run"), profile=spec)
  assert "\n" not in str(e.value)
  assert not (tmp_path / "run").exists()


def test_a_profile_beyond_the_end_is_refused():
  profile = timing.Profile("1:2", "run")
  with pytest.raises(errors.UserError, match=r"takes 4 steps .* 3 are left"):
    profile.wrap(lambda: None, 7, 10)


def smoke():
  return config_lib.load("configs/emoji/prior.py:smoke")


def test_a_run_is_traced_and_accounted_for(tmp_path, monkeypatch):
  # A device whose peak is known, which counts the model's FLOPs too.
  monkeypatch.setitem(flops.PEAK_FLOPS, "cpu", 1e12)
  config = config_lib.apply_overrides(smoke(), {"num_steps": "4"})
  with config.unlocked():
    config.evals = {}
  trainer.train(config, str(tmp_path), profile="1:2")
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  for name in (b"step_num", b"data_wait"):
    assert name in trace.read_bytes()
  assert list((tmp_path / "profile").rglob("*.trace.json.gz"))

  (session,) = json.loads((tmp_path / "timing.json").read_text())["sessions"]
  assert (session["first_step"], session["last_step"]) == (0, 4)
  for name, seconds in session["seconds"].items():
    assert (seconds == 0) == (name == "evaluation"), name
  # The first row is of the first step, which has no rate.
  rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()][1:]
  assert len(rows) == 3
  count = trainer.model_flops(config)
  for row in rows:
    expected = count / row["timing/seconds_per_step"] / 1e12
    found = row["timing/model_flops_utilization"]
    assert math.isclose(found, expected, rel_tol=1e-6)
    assert 0 < row["timing/goodput"] < 1
