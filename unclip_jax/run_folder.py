"""The folder of a run, beside its checkpoints: config, assets, lock.

WORKDIR/config.json                      the run's config
WORKDIR/assets/                          the tokenizer's files and the like
WORKDIR/.lock                            held while a run trains there
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterator, Mapping

import jax
import ml_collections
from absl import logging

from unclip_jax.utils import config as config_lib
from unclip_jax.utils import files
from unclip_jax.utils.errors import UserError

PathLike = str | os.PathLike[str]

_CONFIG = "config.json"
# Fields of a config that say where a run's arrays lie, and not what they are.
_PLACE = ("mesh", "sharding", "optimizer_sharding", "axis_rules", "parallel")


@contextlib.contextmanager
def lock(workdir: PathLike) -> Iterator[None]:
  """Keeps a second run out of a workdir, on this machine.

  The lock goes with the process, however that ends. Of the processes of one
  run, process 0 holds it.

  Raises:
    UserError: another run holds it; the message says which.
  """
  if jax.process_index() != 0:
    yield
    return
  path = pathlib.Path(workdir) / ".lock"
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a+", encoding="utf-8") as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      f.seek(0)
      raise UserError(
        f"{workdir} is in use by the run {f.read().strip() or '(unknown)'}:"
        " stop it, or choose another workdir"
      ) from e
    except OSError as e:
      # Some network file systems have no locks; the run is worth more.
      logging.warning("%s cannot be locked: %s", workdir, e)
    f.truncate(0)
    f.write(f"{os.getpid()}@{socket.gethostname()}\n")
    f.flush()
    try:
      yield
    finally:
      f.truncate(0)


def save_config(workdir: PathLike, config: ml_collections.ConfigDict) -> None:
  """Writes WORKDIR/config.json, on process 0."""
  if jax.process_index() != 0:
    return
  path = pathlib.Path(workdir) / _CONFIG
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_atomically(path, config_lib.to_json(config))


def save_assets(workdir: PathLike, assets: Mapping[str, PathLike]) -> None:
  """Copies files that belong to a model to WORKDIR/assets, once.

  Args:
    assets: file name -> the file to copy.
  """
  folder = pathlib.Path(workdir) / "assets"
  folder.mkdir(parents=True, exist_ok=True)
  for name, path in assets.items():
    if jax.process_index() == 0 and not (folder / name).exists():
      shutil.copyfile(path, folder / f".{name}.tmp")
      os.replace(folder / f".{name}.tmp", folder / name)


def load_config(workdir: PathLike) -> ml_collections.ConfigDict:
  """Reads config.json of a run or a model folder.

  Raises:
    UserError: there is none, or it is not a config.
  """
  path = pathlib.Path(workdir) / _CONFIG
  try:
    return config_lib.from_json(path.read_text(encoding="utf-8"))
  except (FileNotFoundError, NotADirectoryError) as e:
    raise UserError(f"there is no {path}: is this a run or a model?") from e
  except (UserError, UnicodeDecodeError) as e:
    raise UserError(f"{path} is damaged: {e}") from e


def check_config(
  workdir: PathLike,
  config: ml_collections.ConfigDict,
  allow_change: bool = False,
) -> None:
  """Refuses to go on with a run under another config.

  Where it runs (`_PLACE`) may change.

  Args:
    workdir: a run's folder; one without a config.json is new.
    config: that of this start.
    allow_change: warn about the differences instead.

  Raises:
    UserError: the stored config differs; the message says where.
  """
  if not (pathlib.Path(workdir) / _CONFIG).exists():
    return
  changes = [
    change
    for change in config_lib.diff(load_config(workdir), config)
    if re.match(r"\w+", change)[0] not in _PLACE
  ]
  if not changes:
    return
  text = "; ".join(changes)
  if not allow_change:
    raise UserError(
      f"the run in {workdir} has another config ({text}): choose another"
      " workdir, undo the change, or allow it with --allow_config_change"
    )
  logging.warning("the config of the run in %s changes: %s", workdir, text)
