r"""Trains on GPU nodes of a SLURM cluster: writes a batch script, submits it.

  python launch/slurm.py --name my-run --nodes 2 --gpus_per_node 8 \
    --option partition=gpu --option time=24:00:00 -- \
    --config configs/paper/decoder.py --workdir /shared/runs/my-run

The script and the job's log lie beside the run folder, which has to be on a
shared file system, as this source tree and its Python have.

One process a GPU: under SLURM, `jax.distributed.initialize` gives each process
the one device of its number on the node (SLURM_LOCALID), so that a process a
node would use one GPU of them. Each process must see all GPUs for that.

A job that is preempted, or nears its time limit, gets SIGTERM; the training
saves, and the job queues again until the last step is there.
"""

from __future__ import annotations

import pathlib
import shlex
import sys

from absl import flags

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import jobs
from unclip_jax.utils.errors import UserError

NAME = flags.DEFINE_string("name", None, "Of the job.", required=True)
NODES = flags.DEFINE_integer("nodes", 1, "Nodes.", 1)
GPUS_PER_NODE = flags.DEFINE_integer("gpus_per_node", 8, "GPUs a node.", 1)
OPTION = flags.DEFINE_multi_string(
  "option", [], "A further option of sbatch, partition=gpu."
)
flags.adopt_module_key_flags(jobs)

_SECONDS_TO_SAVE = 180
_END_OF_SCRIPT = "END_OF_SCRIPT"


def options(log: pathlib.Path) -> list[str]:
  """Of sbatch, without their hyphens; the user's come last and win."""
  for option in OPTION.value:
    if option.startswith("-") or set(option) & set("\n\r"):
      raise UserError(f"--option must be as in partition=gpu, not {option!r}")
  return [
    f"job-name={NAME.value}",
    f"nodes={NODES.value}",
    f"ntasks-per-node={GPUS_PER_NODE.value}",
    f"gpus-per-node={GPUS_PER_NODE.value}",
    f"output={shlex.quote(str(log))}",
    "open-mode=append",
    "requeue",
    f"signal=TERM@{_SECONDS_TO_SAVE}",
    *OPTION.value,
  ]


def script(arguments: list[str], log: pathlib.Path) -> str:
  """The batch script."""
  variables = jobs.environment("gpu", arguments)
  exports = [f"export {k}={shlex.quote(v)}" for k, v in variables.items()]
  train = [*jobs.train_command(arguments), "--distributed"]
  finished = [
    *("env", f"PYTHONPATH={jobs.ROOT}", sys.executable, "-c"),
    "import sys; from launch import jobs;"
    " sys.exit(not jobs.is_finished(sys.argv[1]))",
    jobs.workdir(arguments),
  ]
  lines = [
    "#!/usr/bin/env bash",
    *(f"#SBATCH --{option}" for option in options(log)),
    "set -euo pipefail",
    f"cd {shlex.quote(str(pathlib.Path.cwd()))}",
    *exports,
    f"srun --kill-on-bad-exit=1 --gpu-bind=none {shlex.join(train)}",
    "# A training that was told to stop has saved, and ends with 0 as well.",
    f'{shlex.join(finished)} || scontrol requeue "$SLURM_JOB_ID"',
  ]
  return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
  jobs.check_name(NAME.value)
  workdir = jobs.workdir(arguments)
  folder = pathlib.Path(workdir).absolute().parent
  path = folder / f"{NAME.value}.sbatch"
  text = script(arguments, folder / f"{NAME.value}.log")
  jobs.require("sbatch")
  jobs.execute([["mkdir", "-p", str(folder)]])
  jobs.show(f"cat > {shlex.quote(str(path))} << '{_END_OF_SCRIPT}'")
  print(f"{text}{_END_OF_SCRIPT}", flush=True)
  if not jobs.DRY_RUN.value:
    path.write_text(text, encoding="utf-8")
  jobs.execute([["sbatch", str(path)]])


if __name__ == "__main__":
  jobs.run(main)
