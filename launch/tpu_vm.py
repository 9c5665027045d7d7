r"""Trains on a Cloud TPU slice of its own: creates it, and deletes it.

  python launch/tpu_vm.py --name my-run --type v5litepod-256 \
    --zone us-west4-a --project P --spot -- \
    --config configs/paper/decoder.py --workdir /tmp/BUCKET/my-run

Actions, in the order given:
  create   asks for the slice as a queued resource, and waits for it
  copy     the source tree to all workers
  install  it there, in an environment of its own
  run      starts the training on all workers, detached; its log is train.log
  tail     follows worker 0's log until the training ends, fails if it failed
  delete   the slice and the request for it; nothing else does

A workdir on the slice's own disk goes with the slice. `--prepare` is shell text
that every worker runs at the end of `install`, such as

  mkdir -p /tmp/BUCKET && gcsfuse --implicit-dirs BUCKET /tmp/BUCKET

which gives the workers a bucket as a folder. A spot slice that was taken away
is deleted and created again by `--actions delete,create,copy,install,run,tail`;
the training goes on where it last saved.

The commands are those of gcloud (cloud.google.com/tpu/docs/queued-resources,
/spot, /runtimes).
"""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys
import time

from absl import flags, logging

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import jobs
from unclip_jax.utils.errors import UserError

_ACTIONS = ("create", "copy", "install", "run", "tail", "delete")

NAME = flags.DEFINE_string(
  "name", None, "Of the slice and of its request.", required=True
)
TYPE = flags.DEFINE_string(
  "type", None, "Accelerator type, v5litepod-256.", required=True
)
ZONE = flags.DEFINE_string("zone", None, "us-west4-a.", required=True)
PROJECT = flags.DEFINE_string(
  "project", None, "Of Google Cloud.", required=True
)
SPOT = flags.DEFINE_bool(
  "spot", False, "Cheaper capacity that may be taken away at any time."
)
RUNTIME_VERSION = flags.DEFINE_string(
  "runtime_version", None, "Default: that of the generation."
)
WAIT_MINUTES = flags.DEFINE_integer(
  "wait_minutes",
  120,
  "How long to wait for the slice; then the request ends.",
  1,
)
PREPARE = flags.DEFINE_string(
  "prepare", "", "Shell text that every worker runs after the installation."
)
ACTIONS = flags.DEFINE_list(
  "actions", list(_ACTIONS[:-1]), f"Of {','.join(_ACTIONS)}."
)
flags.adopt_module_key_flags(jobs)

# TPU7x is not in the Cloud TPU API, only in GKE.
_RUNTIME_VERSIONS = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
_LOST = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
_SECONDS_BETWEEN_LOOKS = 30

# Shell text; below $HOME of a worker.
_SOURCE = '"$HOME"/unclip_jax'
_VENV = '"$HOME"/unclip_jax_venv'
_LOG, _PID, _EXIT = (f'"$HOME"/train.{x}' for x in ("log", "pid", "exit"))


def gcloud(noun: str, verb: str, *arguments: str) -> list[str]:
  """`gcloud compute tpus NOUN VERB NAME ...` in the zone."""
  return [
    *("gcloud", "compute", "tpus", noun, verb),
    *arguments,
    f"--zone={ZONE.value}",
    f"--project={PROJECT.value}",
  ]


def on_workers(script: str, worker: str = "all") -> list[str]:
  """Runs shell text on workers."""
  return gcloud(
    *("tpu-vm", "ssh", NAME.value, f"--worker={worker}", f"--command={script}")
  )


def create_command(generation: str) -> list[str]:
  version = RUNTIME_VERSION.value or _RUNTIME_VERSIONS[generation]
  return gcloud(
    *("queued-resources", "create", NAME.value, f"--node-id={NAME.value}"),
    f"--accelerator-type={TYPE.value}",
    f"--runtime-version={version}",
    f"--valid-until-duration={WAIT_MINUTES.value}m",
    *(["--spot"] if SPOT.value else []),
  )


def wait_until_active() -> None:
  """Returns when the slice is there; exits with 1 when it will not be."""
  command = gcloud(
    *("queued-resources", "describe", NAME.value, "--format=value(state.state)")
  )
  bound = f"until ACTIVE, at most {WAIT_MINUTES.value} minutes"
  jobs.show(f"{shlex.join(command)}  # again and again {bound}")
  if jobs.DRY_RUN.value:
    return
  deadline = time.monotonic() + 60 * WAIT_MINUTES.value
  state = None
  while True:
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
      sys.exit(f"error: gcloud failed with exit code {result.returncode}")
    if result.stdout.strip() != state:
      state = result.stdout.strip()
      logging.info("%s is %s", NAME.value, state)
    if state == "ACTIVE":
      return
    if state in _LOST or time.monotonic() > deadline:
      sys.exit(
        f"error: {NAME.value} is {state} and not ACTIVE: --actions delete ends"
        " the request; try another zone, or later"
      )
    time.sleep(_SECONDS_BETWEEN_LOOKS)


def copy_commands() -> list[list[str]]:
  """The source on all workers; what runs wrote there stays."""
  archive = jobs.ROOT / "build" / f"{NAME.value}.tar.gz"
  return [
    *jobs.archive_commands(archive),
    gcloud(
      *("tpu-vm", "scp", str(archive), f"{NAME.value}:unclip_jax.tar.gz"),
      "--worker=all",
    ),
    on_workers(
      f"mkdir -p {_SOURCE} && cd {_SOURCE}"
      " && find . -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} +"
      ' && tar -xzf "$HOME"/unclip_jax.tar.gz'
    ),
  ]


def install_command() -> list[str]:
  # The images' own Python is 3.10; uv brings one.
  return on_workers(
    f"cd {_SOURCE} && python3 -m pip install --user --quiet uv"
    f" && python3 -m uv venv --allow-existing --python 3.11 {_VENV}"
    f" && python3 -m uv pip install --quiet --python {_VENV}/bin/python"
    " -c constraints.txt -e '.[tpu]'"
    + (f" && {{ {PREPARE.value}; }}" if PREPARE.value else "")
  )


def run_command(generation: str, arguments: list[str]) -> list[str]:
  """Starts the training on all workers; refuses where one is running."""
  variables = jobs.environment(generation, arguments)
  train = shlex.join(
    jobs.with_env(variables, ["unclip", "train", *arguments, "--distributed"])
  )
  detached = f"PATH={_VENV}/bin:$PATH; {train}; echo $? > {_EXIT}"
  return on_workers(
    f'if kill -0 "$(cat {_PID})" 2> /dev/null; then'
    " echo 'error: a training is running here' >&2; exit 1; fi;"
    f" cd {_SOURCE} && rm -f {_EXIT} &&"
    f" {{ nohup bash -c {shlex.quote(detached)} > {_LOG} 2>&1 < /dev/null &"
    f" echo $! > {_PID}; }}"
  )


def tail_command() -> list[str]:
  return on_workers(
    f'tail -n +1 -F --pid="$(cat {_PID})" {_LOG}; exit "$(cat {_EXIT})"', "0"
  )


def main(arguments: list[str]) -> None:
  jobs.check_name(NAME.value)
  generation = jobs.tpu_generation(TYPE.value)
  if generation not in _RUNTIME_VERSIONS:
    raise UserError(f"{TYPE.value} is to be had in GKE only: launch/gke.py")
  unknown = [action for action in ACTIONS.value if action not in _ACTIONS]
  if unknown:
    raise UserError(
      f"--actions are of {','.join(_ACTIONS)}, not {unknown[0]!r}"
    )
  # All commands are made before the first is run: a mistake costs nothing.
  commands = {
    "create": lambda: [create_command(generation)],
    "copy": copy_commands,
    "install": lambda: [install_command()],
    "run": lambda: [run_command(generation, arguments)],
    "tail": lambda: [tail_command()],
    "delete": lambda: [
      gcloud(*("queued-resources", "delete", NAME.value, "--force", "--quiet"))
    ],
  }
  planned = [(action, commands[action]()) for action in ACTIONS.value]
  jobs.require("gcloud")
  for action, steps in planned:
    jobs.execute(steps)
    if action == "create":
      wait_until_active()


if __name__ == "__main__":
  jobs.run(main)
