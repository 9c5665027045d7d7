"""kill -9 at random moments: the run that goes on ends with the same bits.

Once while it starts, and then UNCLIP_KILLS times (default 2, to be quick).
UNCLIP_SLOW=1 has a run of each system killed.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from unclip_jax import checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("UNCLIP_KILLS", "2"))
NUM_STEPS, SAVED_EVERY = 60, 3
BASELINES = sorted(
  path.stem
  for path in (ROOT / "configs/baselines").glob("*.py")
  if path.stem != "cvae"
)
CVAE_STAGES = ("text", "image", "joint", "decoder")
OTHERS = [
  *(f"baselines/{name}.py:smoke" for name in BASELINES),
  *(f"baselines/cvae.py:stage={stage},smoke" for stage in CVAE_STAGES),
]


def _command(config, workdir):
  return [
    sys.executable,
    "-m",
    "unclip_jax.train",
    f"--config=configs/{config}",
    f"--workdir={workdir}",
    f"--config.num_steps={NUM_STEPS}",
    f"--config.checkpoint.every_steps={SAVED_EVERY}",
    "--config.eval_every_steps=30",
    "--config.checkpoint.best.patience=0",  # which would end it before
  ]


def _kill(process, workdir, step, seconds):
  """Kills a run so long after it saved a step, or after its start for step 0.

  Returns:
    False where it had ended by itself.
  """
  checkpointer = checkpoints.Checkpointer(workdir / "checkpoints")
  while process.poll() is None and (checkpointer.steps() or [0])[-1] < step:
    time.sleep(0.01)
  time.sleep(seconds)
  ended = process.poll() is not None
  process.kill()
  process.wait()
  return not ended


@pytest.mark.parametrize(
  "config",
  [
    "emoji/prior.py:smoke",
    *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS),
  ],
)
def test_killed_runs_end_with_the_same_bits(config, tmp_path):
  run = dict(check=True, capture_output=True, text=True, timeout=600)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  subprocess.run(_command(config, whole), **run)
  rng = random.Random(config)
  saved = range(SAVED_EVERY, NUM_STEPS // 2 + 1, SAVED_EVERY)
  timing = json.loads((whole / "timing.json").read_text())
  startup = timing["sessions"][0]["seconds"]["startup"]
  # At any moment of the steps up to the next checkpoint, or of its writing.
  moments = [
    (step, rng.uniform(0, 0.3)) for step in sorted(rng.choices(saved, k=KILLS))
  ]
  for step, seconds in [(0, rng.uniform(0, startup)), *moments]:
    process = subprocess.Popen(
      _command(config, killed),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    assert _kill(process, killed, step, seconds)
  last = subprocess.run(_command(config, killed), **run)
  assert "corrupt" not in last.stderr
  _, expected = checkpoints.Checkpointer(whole / "checkpoints").restore_flat()
  _, found = checkpoints.Checkpointer(killed / "checkpoints").restore_flat()
  assert found.keys() == expected.keys()
  for name in expected:
    assert found[name].tobytes() == expected[name].tobytes(), name
