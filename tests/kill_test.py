"""kill -9 at random moments: the run that goes on ends with the same bits.

UNCLIP_KILLS sets how often the run is killed (default 2, to be quick).
"""

import os
import random
import subprocess
import sys
import time

from unclip_jax import checkpoints

KILLS = int(os.environ.get("UNCLIP_KILLS", "2"))


def _command(workdir):
  return [
    sys.executable,
    "-m",
    "unclip_jax.train",
    "--config=configs/emoji/prior.py:smoke",
    f"--workdir={workdir}",
    "--config.num_steps=120",
    "--config.checkpoint.every_steps=3",
    "--config.eval_every_steps=30",
  ]


def _finished(workdir):
  steps = checkpoints.Checkpointer(workdir / "checkpoints").steps()
  return bool(steps) and steps[-1] == 120


def test_killed_runs_end_with_the_same_bits(tmp_path):
  env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
  run = dict(env=env, capture_output=True, text=True, timeout=300)
  whole = tmp_path / "whole"
  subprocess.run(_command(whole), check=True, **run)
  # The second start compiles nothing, so it is as quick as those to come.
  start = time.monotonic()
  subprocess.run(_command(tmp_path / "timed"), check=True, **run)
  seconds = time.monotonic() - start
  rng = random.Random(0)
  killed = [tmp_path / "killed_0"]
  kills = 0
  while kills < KILLS:
    if _finished(killed[-1]):
      killed.append(tmp_path / f"killed_{len(killed)}")
    process = subprocess.Popen(
      _command(killed[-1]),
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    # Between the imports and the end, mostly while steps are being saved.
    time.sleep(seconds * rng.uniform(0.3, 0.9))
    # One that resumed near its end may have ended by itself.
    kills += process.poll() is None
    process.kill()
    process.wait()
  last = subprocess.run(_command(killed[-1]), check=True, **run)
  assert "corrupt" not in last.stderr
  _, expected = checkpoints.Checkpointer(whole / "checkpoints").restore_flat()
  for folder in killed:
    _, found = checkpoints.Checkpointer(folder / "checkpoints").restore_flat()
    assert found.keys() == expected.keys()
    for name in expected:
      assert found[name].tobytes() == expected[name].tobytes(), name
