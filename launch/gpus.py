"""Trains on all GPUs of this machine, or on its CPU as several devices.

  python launch/gpus.py -- --config configs/paper/decoder.py --workdir runs/x
  python launch/gpus.py --simulated_devices 8 -- \
    --config configs/emoji/clip.py:smoke --workdir /tmp/x

One process sees all GPUs, which is what jax does by itself; this adds the flags
of launch/platform_flags.py. Simulated devices are for trying a mesh out: they
share the cores, and are no faster.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import jobs

SIMULATED_DEVICES = flags.DEFINE_integer(
  "simulated_devices", 0, "Train on the CPU, as so many devices.", 0
)
flags.adopt_module_key_flags(jobs)


def main(arguments: list[str]) -> None:
  count = SIMULATED_DEVICES.value
  variables = jobs.environment(
    "cpu" if count else "gpu", arguments, simulated_devices=count
  )
  jobs.become(jobs.with_env(variables, jobs.train_command(arguments)))


if __name__ == "__main__":
  jobs.run(main)
