"""What every program shares: flags, the config flag, logging, exit codes.

A program is flags and one call:

  CONFIG = programs.config_flag()
  WORKDIR = flags.DEFINE_string("workdir", None, "...", required=True)

  def main() -> None:
    trainer.train(CONFIG.value, WORKDIR.value)

  if __name__ == "__main__":
    programs.run(main)

Exit codes: 0 done, 1 a bug (with a traceback), 2 the user's mistake (one line
on stderr, no traceback), 130 interrupted from the keyboard.
"""

from __future__ import annotations

import functools
import inspect
import logging as std_logging
import os
import re
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags, logging

from unclip_jax.utils import config as config_lib
from unclip_jax.utils.errors import UserError

# Flags defined below count as the calling program's own in its --help.
flags.disclaim_key_flags()

# Of the flag behind --NAME.FIELD=VALUE, after its name.
_OVERRIDE = "_override"
# Libraries whose progress messages (below a warning) are not for our users.
_NOISY = (
  "absl",
  "etils",
  "flax",
  "grain",
  "jax",
  "orbax",
  "tensorflow",
  "tensorflow_datasets",
)
# How absl words a missing flag.
_ABSL_REQUIRED = (
  r"flag --(\w+)=None: Flag --\1 must have a value other than None\."
)


class FieldsFlag:
  """What `--NAME.FIELD=VALUE` said, once or several times."""

  def __init__(self, name: str, help_text: str):
    self._name = name
    self._flag = flags.DEFINE_multi_string(f"{name}{_OVERRIDE}", [], help_text)

  @property
  def arguments(self) -> list[str]:
    """The flags as they were given, for another process."""
    return [f"--{self._name}.{item}" for item in self._flag.value]

  @property
  def value(self) -> dict[str, str]:
    """Field -> text."""
    items = [item.partition("=") for item in self._flag.value]
    return {name: text for name, _, text in items}


class ConfigFlag:
  """The value of `--config`, read once when it is first asked for."""

  def __init__(
    self,
    path: flags.FlagHolder[str],
    overrides: FieldsFlag,
  ):
    self._path = path
    self._overrides = overrides

  @property
  def arguments(self) -> list[str]:
    """The flags as they were given, for another process."""
    return [
      f"--config={self._path.value}",
      *self._overrides.arguments,
    ]

  @functools.cached_property
  def value(self) -> ml_collections.ConfigDict:
    """The config with the overrides put in, locked.

    Raises:
      UserError: as `config.load` and `config.apply_overrides`.
    """
    return self.over(config_lib.load(self._path.value))

  @property
  def path(self) -> str | None:
    """What `--config` is, argument included."""
    return self._path.value

  def over(
    self, config: ml_collections.ConfigDict
  ) -> ml_collections.ConfigDict:
    """A config with the overrides put in.

    Raises:
      UserError: as `config.apply_overrides`.
    """
    return config_lib.apply_overrides(config, self._overrides.value)


def check_folder(flag: str, path: str) -> None:
  """Raises UserError for an address, such as gs://bucket/run."""
  if "://" in path:
    raise UserError(
      f"--{flag} {path} is no folder: mount the bucket on every host (gcsfuse "
      "for Google Cloud Storage) and give the path of the mount"
    )


def config_flag(*, required: bool = True) -> ConfigFlag:
  """Defines `--config FILE.py[:arg]` and `--config.a.b=value`."""
  path = flags.DEFINE_string(
    "config",
    None,
    "Config file with its argument, FILE.py[:arg]; override single fields"
    " with --config.NAME=VALUE.",
    required=required,
  )
  overrides = FieldsFlag(
    "config", "NAME=VALUE; what --config.NAME=VALUE stands for."
  )
  return ConfigFlag(path, overrides)


def run(main: Callable[[], None], *, argument: str | None = None) -> None:
  """Parses the flags of `sys.argv`, sets logging up and calls `main`.

  Args:
    argument: the flag whose value may stand alone, before all flags.

  Returns when `main` has returned; else exits the process with a code of the
  module's docstring.
  """
  # On CPU the default convolutions of jax 0.10 are up to 77 % slower. XLA
  # reads this when the first array is made.
  os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
  )
  try:
    _parse_flags(sys.argv, argument)
    _set_up_logging()
    main()
  except (UserError, flags.Error) as e:
    line = " ".join(str(e).split())
    line = re.sub(_ABSL_REQUIRED, r"--\1=VALUE is required.", line)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _parse_flags(argv: Sequence[str], argument: str | None) -> None:
  if any(arg in ("--help", "-help", "-h", "--helpfull") for arg in argv[1:]):
    doc = inspect.cleandoc(sys.modules["__main__"].__doc__ or "")
    full = "--helpfull" in argv
    text = flags.FLAGS.get_help() if full else flags.FLAGS.main_module_help()
    print(f"{doc}\n\nflags:\n{text}")
    sys.exit(0)
  if argument and len(argv) > 1 and not argv[1].startswith("-"):
    argv = [argv[0], f"--{argument}={argv[1]}", *argv[2:]]
  rest = flags.FLAGS(_rewrite_overrides(argv))[1:]
  if rest:
    raise UserError(
      f"unexpected argument {rest[0]!r}: every option is --NAME=VALUE, and"
      " --help lists them"
    )


def _rewrite_overrides(argv: Sequence[str]) -> list[str]:
  """`--config.a.b=v`, `--config.a.b v` or `--config.a.b` (true) for absl."""
  known = [
    f.removesuffix(_OVERRIDE) for f in flags.FLAGS if f.endswith(_OVERRIDE)
  ]
  pattern = rf"--?({'|'.join(known)})\.([^=]+)(=.*)?$"
  rewritten: list[str] = []
  args = list(argv)
  while args:
    arg = args.pop(0)
    match = re.match(pattern, arg, re.DOTALL) if known else None
    if match:
      flag, name, value = match.groups()
      if value is None:
        takes_next = bool(args) and not args[0].startswith("--")
        value = "=" + (args.pop(0) if takes_next else "true")
      arg = f"--{flag}{_OVERRIDE}={name}{value}"
    rewritten.append(arg)
  return rewritten


class _Quiet(std_logging.Filter):
  """Drops what noisy libraries say below a warning."""

  def filter(self, record: std_logging.LogRecord) -> bool:
    if record.levelno >= std_logging.WARNING:
      return True
    # By what is installed, wherever that is: often below a folder of ours.
    installed = re.search(r"/(?:site|dist)-packages/(\w+)/", record.pathname)
    return installed is None or installed[1] not in _NOISY


def _set_up_logging() -> None:
  """Short lines on stderr: "I 12:30:59 message"."""
  logging.use_absl_handler()
  if flags.FLAGS["verbosity"].using_default_value:
    logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(
    std_logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S")
  )
  handler.addFilter(_Quiet())
