"""The loop: pinned steps, microbatches, resuming, stopping, refusing."""

import json
import math
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax import checkpoints, evaluation, run_folder, trainer
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees

TASKS = ["clip", "prior", "prior_ar", "decoder", "upsampler"]


def smoke(name, **overrides):
  config = config_lib.load(f"configs/emoji/{name}.py:smoke")
  return config_lib.apply_overrides(
    config, {k.replace("__", "."): str(v) for k, v in overrides.items()}
  )


def one_step(config, num_microbatches=1):
  """(state before, state after, metrics) of the first step of a config."""
  run = trainer.setup(config)
  batches = run.data.eval_batches("train", 8, 16)
  # In a fresh CLIP every picture has the same embedding, up to rounding.
  upstream = random_variables.like_tree(run.frozen)
  frozen = {**upstream, **run.task.prepare(upstream, batches)}
  batch = next(run.data.train_batches(0, config.batch_size))
  init = jax.jit(lambda *args: trainer.init_state(run.task, run.tx, *args))
  before = init(jax.random.key(0), batch, frozen)
  step = trainer.make_train_step(
    run.task, run.tx, ema_decay=0.9, num_microbatches=num_microbatches
  )
  after, metrics = jax.jit(step)(before, frozen, batch, jax.random.key(1))
  return before, after, jax.device_get(metrics)


# Loss and gradient norm of the first step of each `:smoke`. A change here
# means that the same config now trains something else: if that is what you
# want, say so in CHANGELOG.md and put the new numbers (the test prints them).
PINNED = {
  "clip": (2.326347, 71.441544),
  "prior": (1.353669, 0.649111),
  "prior_ar": (2.079442, 0.686787),
  "decoder": (23.386826, 9.973594),
  "upsampler": (0.767285, 3.541177),
}


@pytest.mark.parametrize("name", TASKS)
def test_first_step_is_pinned(name):
  before, after, metrics = one_step(smoke(name))
  found = float(metrics["loss"]), float(metrics["grad_norm"])
  print(f'"{name}": ({found[0]:.6f}, {found[1]:.6f}),')
  np.testing.assert_allclose(found, PINNED[name], rtol=2e-3)
  assert int(after.step) == 1
  moved = jax.tree.map(
    lambda a, b: bool(jnp.any(a != b)), before.params, after.params
  )
  assert any(jax.tree.leaves(moved))


def test_microbatches_give_the_gradient_of_the_whole_batch():
  # SGD: Adam would amplify rounding. With draws: tests/gradients_test.py.
  class Task:
    batch_coupled = False

    def loss(self, variables, frozen, batch, rng, *, step, train):
      error = batch["x"] @ variables["params"]["w"] - batch["y"]
      loss = jnp.sum(error**2, axis=-1)
      return trainer.tasks_base.LossOutput(loss, {"twice": 2 * loss}, {})

  tx, _ = trainer.optim.make_optimizer(
    config_lib.from_json('{"learning_rate": 0.1, "name": "sgd"}'), 10
  )
  rng = np.random.default_rng(0)
  batch = {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=(8, 2))}
  batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
  params = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
  state = trainer.TrainState(
    jnp.zeros((), jnp.int32), params, {}, tx.init(params), params
  )
  results = []
  for n in (1, 2, 4):
    step = trainer.make_train_step(
      Task(), tx, ema_decay=0.5, num_microbatches=n
    )
    after, metrics = step(state, {}, batch, jax.random.key(0))
    assert math.isclose(metrics["twice"], 2 * metrics["loss"], rel_tol=1e-5)
    results.append(after.params["w"])
  np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
  np.testing.assert_allclose(results[2], results[0], rtol=1e-5)
  assert np.abs(results[0] - params["w"]).max() > 1e-3


def test_a_nonfinite_gradient_changes_nothing_and_is_counted():
  config = smoke("upsampler")
  run = trainer.setup(config)
  batch = next(run.data.train_batches(0, config.batch_size))
  state = trainer.init_state(run.task, run.tx, jax.random.key(0), batch, {})
  step = jax.jit(trainer.make_train_step(run.task, run.tx, ema_decay=0.9))
  bad = {**batch, "image": batch["image"].copy()}
  bad["image"][0, 0, 0, 0] = np.nan
  skipped, metrics = step(state, {}, bad, jax.random.key(0))
  assert int(metrics["nonfinite_updates"]) == 1
  jax.tree.map(np.testing.assert_array_equal, skipped.params, state.params)
  after, metrics = step(skipped, {}, batch, jax.random.key(0))
  assert int(metrics["nonfinite_updates"]) == 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


def _final_leaves(workdir):
  _, flat = checkpoints.Checkpointer(workdir / "checkpoints").restore_flat()
  return flat


def _assert_same_leaves(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].tobytes() == b[name].tobytes(), name


def test_resumed_equals_uninterrupted(tmp_path):
  """Also the tables, the moments and the average, bit for bit."""
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  config = smoke("prior", num_steps=6, checkpoint__every_steps=2)
  trainer.train(config, str(whole))
  trainer.train(config, str(parts))
  # Forget the last steps, as if the run had died after step 2.
  shutil_steps = sorted((parts / "checkpoints").iterdir())
  assert [path.name for path in shutil_steps] == ["00000004", "00000006"]
  _remove_tree(shutil_steps[-1])
  state = trainer.train(config, str(parts))
  assert int(state.step) == 6
  _assert_same_leaves(_final_leaves(whole), _final_leaves(parts))
  rows = [json.loads(x) for x in (parts / "metrics.jsonl").open()]
  steps = [row["step"] for row in rows if "train/loss" in row]
  assert steps == [1, 2, 3, 4, 5, 6]


def _remove_tree(path):
  import shutil

  shutil.rmtree(path)


def _start(workdir, *args):
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "unclip_jax.train",
      "--config=configs/emoji/upsampler.py:smoke",
      f"--workdir={workdir}",
      *args,
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _wait_for_row(workdir, process, seconds=120):
  deadline = time.monotonic() + seconds
  path = workdir / "metrics.jsonl"
  while time.monotonic() < deadline and process.poll() is None:
    if path.exists() and path.read_text().count("\n") >= 2:
      return
    time.sleep(0.05)
  pytest.fail(f"the run wrote no metrics: {process.communicate()}")


def test_sigterm_saves_the_step_and_exits_0(tmp_path):
  many = "--config.num_steps=100000", "--config.checkpoint.every_steps=100000"
  process = _start(tmp_path, *many)
  _wait_for_row(tmp_path, process)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]
  last = max(row["step"] for row in rows)
  steps = checkpoints.Checkpointer(tmp_path / "checkpoints").steps()
  assert steps[-1] >= last > 0
  account = json.loads((tmp_path / "timing.json").read_text())
  assert account["sessions"][-1]["last_step"] == steps[-1]


def test_a_second_run_in_a_folder_is_refused(tmp_path):
  with (
    run_folder.lock(tmp_path),
    pytest.raises(errors.UserError, match="in use"),
  ):
    trainer.train(smoke("upsampler"), str(tmp_path))


def test_a_run_under_another_config_is_refused(tmp_path):
  trainer.train(smoke("upsampler", num_steps=2), str(tmp_path))
  other = smoke("upsampler", num_steps=2, optim__learning_rate=0.5)
  with pytest.raises(errors.UserError, match=r"optim\.learning_rate"):
    trainer.train(other, str(tmp_path))
  trainer.train(other, str(tmp_path), allow_config_change=True)


def test_an_upstream_model_that_changed_is_refused(tmp_path):
  for seed in (0, 1):
    trainer.train(smoke("clip", seed=seed), str(tmp_path / f"clip{seed}"))
  configs = []
  for seed in (0, 1):
    config = smoke("prior")
    with config.unlocked():
      config.frozen.clip = dict(path=str(tmp_path / f"clip{seed}"))
    configs.append(config)
  trainer.train(configs[0], str(tmp_path / "prior"))
  with pytest.raises(errors.UserError, match="fingerprint"):
    trainer.train(configs[1], str(tmp_path / "prior"))


def test_a_batch_size_that_does_not_divide_is_refused():
  with pytest.raises(errors.UserError, match="multiple of 3"):
    trainer.setup(smoke("upsampler", num_microbatches=3))


def test_describe_counts_the_parameters():
  config = smoke("decoder")
  text = trainer.describe(config)
  _, after, _ = one_step(config)
  count = sum(x.size for x in trees.flatten(after.params).values())
  assert f"total: {count:,} parameters" in text
  assert "mesh: data 1, fsdp 1, tensor 1" in text
  # params and EMA float32, two moments float32, step and counters.
  assert f"{16 * count / 2**20:,.1f} MiB state" in text


def test_an_evaluator_is_switched_off():
  config = smoke("clip", evals__zero_shot="{}")
  built = evaluation.build(trainer.setup(config))
  assert set(built) == set(config.evals) - {"zero_shot"}
