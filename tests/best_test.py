"""The best step is kept, and a run ends for want of a better one."""

import shutil

import numpy as np
import pytest

from launch import jobs
from tests import logged
from unclip_jax import best, checkpoints, model_folder, trainer
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees

METRIC = "eval/loss/loss"


def updates(watch, values):
  """The record after one evaluation at each of the steps 1, 2, ..."""
  record = watch.record()
  for step, value in enumerate(values, 1):
    record = watch.update(record, step, "loss", {"loss": value})
  return record


def test_record_holds_the_best_value_and_how_long_ago_it_was():
  record = updates(best.Best(METRIC), [3.0, 2.0, 2.0, 2.5])["best"]
  assert (record["value"], record["step"], record["stale"]) == (2.0, 2, 2)
  record = updates(best.Best(METRIC, mode="max"), [3.0, 2.0, 4.0])["best"]
  assert (record["value"], record["step"], record["stale"]) == (4.0, 3, 0)


def test_a_value_that_is_not_a_number_is_no_better():
  record = updates(best.Best(METRIC), [3.0, float("nan")])["best"]
  assert (record["value"], record["step"]) == (3.0, 1)


def test_patience_counts_evaluations_without_a_better_value():
  watch = best.Best(METRIC, patience=2)
  assert not watch.is_over(updates(watch, [1.0, 2.0]))
  assert watch.is_over(updates(watch, [1.0, 2.0, 1.0]))
  assert not watch.is_over(updates(watch, [1.0, 2.0, 0.5]))
  assert not best.Best(METRIC).is_over(updates(watch, [1.0] * 9))


def test_other_evaluators_change_nothing():
  watch = best.Best(METRIC)
  record = updates(watch, [1.0])
  assert watch.update(record, 2, "fid", {"loss": 0.0}) == record
  assert best.Best().record() == {}


def test_wrong_fields_are_refused():
  with pytest.raises(errors.UserError, match="min or max"):
    best.Best(METRIC, mode="least")
  with pytest.raises(errors.UserError, match="metric"):
    best.Best(patience=3)
  with pytest.raises(errors.UserError, match="eval/loss/"):
    best.Best("eval/los/loss").check(["loss"])
  with pytest.raises(errors.UserError, match="gives mse"):
    best.Best(METRIC).update({}, 1, "loss", {"mse": 1.0})


def config_of(**fields):
  config = config_lib.load("configs/emoji/upsampler.py:smoke")
  overrides = {
    "num_steps": 12,
    "eval_every_steps": 1,
    "checkpoint.every_steps": 2,
    "checkpoint.best.metric": METRIC,
    **fields,
  }
  config = config_lib.apply_overrides(
    config, {k: str(v) for k, v in overrides.items()}
  )
  with config.unlocked():
    config.evals = {"loss": config.evals.loss}
    config.evals.loss.use_ema = False
    config.evals.at_end = {**config.evals.loss, "every_steps": 12}
  return config


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """A run whose loss soon rises: it ends two evaluations after its best."""
  workdir = tmp_path_factory.mktemp("run")
  config = config_of(
    **{"checkpoint.best.patience": 2, "optim.learning_rate": 0.3}
  )
  trainer.train(config, str(workdir))
  return workdir, config


def losses(workdir):
  return logged.values(workdir, METRIC)


def test_the_run_ends_two_evaluations_after_its_best(stopped):
  workdir, _ = stopped
  found = losses(workdir)
  least = min(found, key=found.get)
  assert max(found) == least + 2 < 12
  kept = checkpoints.Checkpointer(workdir / "checkpoints").steps()
  assert least in kept and max(found) in kept


def test_at_the_end_the_best_step_is_evaluated(stopped):
  workdir, _ = stopped
  found, end = losses(workdir), max(losses(workdir))
  for name in ("loss", "at_end"):
    assert logged.values(workdir, f"best/{name}/loss") == {
      end: min(found.values())
    }
  assert found[end] > min(found.values())
  assert not logged.values(workdir, "eval/at_end/loss")


def test_a_last_step_may_be_the_best(tmp_path):
  config = config_of(num_steps=2)
  trainer.train(config, str(tmp_path))
  found = losses(tmp_path)
  assert found[2] < found[1]
  assert logged.values(tmp_path, "best/loss/loss") == {2: found[2]}


def test_whoever_loads_the_run_gets_the_best_step(stopped):
  workdir, _ = stopped
  found = losses(workdir)
  checkpointer = checkpoints.Checkpointer(workdir / "checkpoints")
  _, flat = checkpointer.restore_flat(min(found, key=found.get))
  loaded = model_folder.load_model(workdir).variables["params"]
  _, newest = checkpointer.restore_flat()
  for name, value in trees.flatten(loaded).items():
    np.testing.assert_array_equal(value, flat[f"state.ema_params.{name}"])
  assert (value != newest[f"state.ema_params.{name}"]).any()


def test_launchers_know_that_it_is_finished(stopped, tmp_path):
  workdir, _ = stopped
  assert jobs.is_finished(workdir)
  parts = tmp_path / "parts"
  shutil.copytree(workdir, parts)
  shutil.rmtree(parts / "checkpoints" / f"{max(losses(workdir)):08d}")
  assert not jobs.is_finished(parts)


def test_a_run_that_is_over_takes_no_further_step(stopped):
  workdir, config = stopped
  before = losses(workdir)
  state = trainer.train(config, str(workdir))
  assert int(state.step) == max(before)
  assert losses(workdir) == before


def test_resumed_decides_as_uninterrupted(stopped, tmp_path):
  workdir, config = stopped
  parts = tmp_path / "parts"
  shutil.copytree(workdir, parts)
  found = losses(workdir)
  steps = checkpoints.Checkpointer(parts / "checkpoints").steps()
  assert steps[-1] == max(found)
  # As if the run had died before its last checkpoint.
  shutil.rmtree(parts / "checkpoints" / f"{steps[-1]:08d}")
  trainer.train(config, str(parts))
  assert losses(parts) == found
  _, whole = checkpoints.Checkpointer(workdir / "checkpoints").restore_flat()
  _, again = checkpoints.Checkpointer(parts / "checkpoints").restore_flat()
  assert again.keys() == whole.keys() and "best.step" in whole
  for name in whole:
    assert again[name].tobytes() == whole[name].tobytes(), name
