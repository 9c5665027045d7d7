r"""Train the model that a config describes; the same command resumes it.

  unclip train --config configs/emoji/clip.py --workdir runs/clip
  unclip train --config configs/emoji/clip.py:smoke --workdir /tmp/smoke
  unclip train --config configs/emoji/clip.py --workdir runs/clip2 \
    --config.optim.learning_rate=3e-4

On several hosts the same command runs on each of them, with --distributed, or
with --coordinator, --num_processes and --process_id where no cluster tells.
"""

from __future__ import annotations

from absl import flags

from unclip_jax import distributed, timing, trainer
from unclip_jax.utils import programs

CONFIG = programs.config_flag()
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Run folder: checkpoints, metrics, pictures.", required=True
)
DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print the parameters, mesh and memory, and exit."
)
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "Resume although the stored config differs."
)
STRICT = flags.DEFINE_bool(
  "strict", False, "Stop at a corrupt checkpoint, take no older one."
)
PROFILE = flags.DEFINE_string(
  "profile",
  None,
  "START:COUNT: trace COUNT steps to WORKDIR/profile, after the first, which"
  " is compiled, and START others.",
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of many processes: the cluster tells which."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, where no cluster tells."
)
NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes there are."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is.")
PEER_TIMEOUT = flags.DEFINE_integer(
  "peer_timeout", 100, "Seconds until a silent process counts as stopped."
)


def main() -> None:
  programs.check_folder("workdir", WORKDIR.value)
  given = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  if DISTRIBUTED.value or any(x is not None for x in given):
    distributed.initialize(
      coordinator=COORDINATOR.value,
      num_processes=NUM_PROCESSES.value,
      process_id=PROCESS_ID.value,
      peer_timeout=PEER_TIMEOUT.value,
    )
  if DRY_RUN.value:
    print(trainer.describe(CONFIG.value))
    return
  trainer.train(
    CONFIG.value,
    WORKDIR.value,
    allow_config_change=ALLOW_CONFIG_CHANGE.value,
    strict=STRICT.value,
    profile=PROFILE.value,
    started=timing.process_started(),
  )


if __name__ == "__main__":
  programs.run(main)
