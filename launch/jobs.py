"""What the launchers share: their arguments, and commands that are shown.

A launcher is flags, and a list of commands; what stands behind `--` is the
training's own. With --dry_run the commands are printed and not run, and what
is printed is a shell script that does the same.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from absl import flags

from launch import platform_flags
from unclip_jax.utils import programs
from unclip_jax.utils.errors import UserError

DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print the commands, and run none of them."
)
ENV = flags.DEFINE_multi_string(
  "env",
  [],
  "NAME=VALUE for the training, in place of what is recommended for the"
  " platform. Commands are shown and logged: no secrets here.",
)
CACHE_DIR = flags.DEFINE_string(
  "cache_dir",
  None,
  "Where compiled programs are kept, for all hosts. Default:"
  " WORKDIR/jax_cache.",
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
Command = Sequence[str]

# How accelerator types of Google Cloud begin -> generation.
_GENERATIONS = {
  "v4": "v4",
  "v5litepod": "v5e",
  "v5p": "v5p",
  "v6e": "v6e",
  "tpu7x": "tpu7x",
}
# Not copied to other machines: all that does not belong to the source.
_NO_SOURCE = (
  *("./.git", "./.venv", "./runs", "./build", "./dist"),
  *("__pycache__", ".*_cache", ".hypothesis", "*.egg-info"),
)


def run(main: Callable[[list[str]], None]) -> None:
  """`programs.run` of a main that gets what stands behind `--`."""
  arguments: list[str] = []
  if "--" in sys.argv:
    at = sys.argv.index("--")
    arguments = sys.argv[at + 1 :]
    del sys.argv[at:]
  programs.run(lambda: main(arguments))


def workdir(arguments: Sequence[str]) -> str:
  """The run folder that the training's arguments name.

  Raises:
    UserError: they name no config or no run folder, or a bucket.
  """
  values = {}
  for i, argument in enumerate(arguments):
    name, equals, value = argument.partition("=")
    if name in ("--config", "--workdir") and (equals or i + 1 < len(arguments)):
      values[name] = value if equals else arguments[i + 1]
  for name in ("--config", "--workdir"):
    if not values.get(name):
      raise UserError(
        f"the training's arguments lack {name}: they stand behind --, as in"
        " `-- --config configs/emoji/clip.py --workdir runs/clip`"
      )
  programs.check_folder("workdir", values["--workdir"])
  return values["--workdir"]


def environment(
  platform: str, arguments: Sequence[str], *, simulated_devices: int = 0
) -> dict[str, str]:
  """The training's environment: what is recommended, then --env.

  Raises:
    UserError: an --env that is not NAME=VALUE, or as `workdir`.
  """
  cache_dir = CACHE_DIR.value or f"{workdir(arguments).rstrip('/')}/jax_cache"
  return {
    **platform_flags.environment(
      platform, cache_dir=cache_dir, simulated_devices=simulated_devices
    ),
    **env_flag(),
  }


def env_flag() -> dict[str, str]:
  """What --env says.

  Raises:
    UserError: one is not NAME=VALUE.
  """
  variables = {}
  for item in ENV.value:
    name, equals, value = item.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
      raise UserError(f"--env must be NAME=VALUE, not {item!r}")
    variables[name] = value
  return variables


def with_env(variables: Mapping[str, str], command: Command) -> list[str]:
  """The command in an environment with the variables beside the usual ones."""
  return ["env", *(f"{k}={v}" for k, v in variables.items()), *command]


def train_command(arguments: Sequence[str]) -> list[str]:
  """`unclip train` by this very Python."""
  return [sys.executable, "-m", "unclip_jax", "train", *arguments]


def tpu_generation(accelerator_type: str) -> str:
  """ "v5litepod-256" -> "v5e".

  Raises:
    UserError: there is no such type.
  """
  match = re.fullmatch(r"([a-z]\w*)-\d+(x\d+)*", accelerator_type)
  if not match or match[1] not in _GENERATIONS:
    known = ", ".join(f"{prefix}-N" for prefix in _GENERATIONS)
    raise UserError(
      f"there is no accelerator type {accelerator_type!r} (there are: {known})"
    )
  return _GENERATIONS[match[1]]


def check_name(name: str) -> str:
  """The name of a job, if clouds and clusters take it.

  Raises:
    UserError: they do not.
  """
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,37}[a-z0-9])?", name):
    raise UserError(
      f"--name must be at most 39 small letters, digits and hyphens, the first"
      f" a letter and the last no hyphen, not {name!r}"
    )
  return name


def archive_commands(archive: pathlib.Path) -> list[list[str]]:
  """Packs the source tree, without its history, runs and caches."""
  return [
    ["mkdir", "-p", str(archive.parent)],
    [
      *("tar", "-czf", str(archive), "-C", str(ROOT)),
      *(f"--exclude={pattern}" for pattern in _NO_SOURCE),
      ".",
    ],
  ]


def execute(commands: Iterable[Command]) -> None:
  """Shows each command, and runs it unless --dry_run; exits where one fails.

  Raises:
    UserError: a tool is missing; before anything runs.
  """
  commands = list(commands)
  require(*(command[0] for command in commands))
  for command in commands:
    show(shlex.join(command))
    if not DRY_RUN.value:
      code = subprocess.run(command, check=False).returncode
      if code:
        sys.exit(f"error: {command[0]} failed with exit code {code}")


def become(command: Command) -> None:
  """Shows a command and goes on as it, so that it gets all signals itself."""
  require(command[0])
  show(shlex.join(command))
  if not DRY_RUN.value:
    os.execvp(command[0], command)


def require(*tools: str) -> None:
  """Checks that there are tools; with --dry_run none is needed.

  Raises:
    UserError: one is not on PATH.
  """
  missing = [tool for tool in tools if shutil.which(tool) is None]
  if missing and not DRY_RUN.value:
    raise UserError(
      f"{missing[0]} is not on PATH: install it, or see with --dry_run what"
      " would run"
    )


def show(text: str) -> None:
  """Prints what is run, or with --dry_run would be."""
  print(text if DRY_RUN.value else f"$ {text}", flush=True)


def is_finished(folder: str | os.PathLike[str]) -> bool:
  """Whether a run folder holds its last step, or that at which it ended early.

  A training that SIGTERM stopped saves and exits with 0: its exit code does not
  tell.
  """
  folder = pathlib.Path(folder)
  try:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  except FileNotFoundError:
    return False
  if (folder / "checkpoints" / f"{config['num_steps']:08d}").exists():
    return True
  patience = config["checkpoint"].get("best", {}).get("patience", 0)
  if not patience:
    return False
  # Here, since it takes seconds to import.
  from unclip_jax import checkpoints

  checkpointer = checkpoints.Checkpointer(folder / "checkpoints")
  if not checkpointer.steps():
    return False
  _, flat = checkpointer.restore_flat(names=r"^best\.stale$")
  return int(flat["best.stale"]) >= patience
