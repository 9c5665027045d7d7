"""Saving and restoring the steps of a training.

A thin facade over Orbax, whose types stay in this file. Orbax does not fall
back from a damaged step: here a step is whole when its manifest stands
(manifests.py), which is written last; what is damaged is set aside, and the
step before is used.

  WORKDIR/checkpoints/00000010/state/      Orbax's files
  WORKDIR/checkpoints/00000010/manifest.json
  WORKDIR/checkpoints/00000010.corrupt-1/  a step that was set aside

Leaves have the flat names of `utils.trees`, for example
"state.params.vision.block_0.attn.query.kernel".
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from unclip_jax import manifests
from unclip_jax.utils import files, trees
from unclip_jax.utils.errors import UserError

PyTree = Any
Array = jax.Array | np.ndarray
PathLike = str | os.PathLike[str]

_STEP = re.compile(r"\d+")
# A step folder, or what Orbax makes of its name until the step is written.
_UNFINISHED = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")


class Checkpointer:
  """The steps of one run: `save` in the background, `restore` with checks.

  In a run of several processes, all of them call `save`, `wait`, `close`,
  `restore` and `clean_incomplete` together; process 0 writes, renames and
  deletes.
  """

  def __init__(
    self,
    directory: PathLike,
    *,
    keep: int = 2,
    keep_every: int = 0,
    strict: bool = False,
  ):
    """Opens a folder of steps, which need not exist yet.

    Args:
      directory: WORKDIR/checkpoints.
      keep: how many of the newest steps stay.
      keep_every: steps that this number divides stay too; 0 is off.
      strict: a damaged step is an error instead of being set aside.
    """
    if keep < 1:
      raise UserError(f"at least one checkpoint must be kept, not {keep}")
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._keep_every = keep_every
    self._strict = strict
    self._keep_step: int | None = None
    self._thread: threading.Thread | None = None
    self._failure: tuple[int, BaseException] | None = None

  def steps(self) -> list[int]:
    """The whole steps, oldest first."""
    if not self._directory.is_dir():
      return []
    return sorted(
      int(path.name)
      for path in self._directory.iterdir()
      if _STEP.fullmatch(path.name) and (path / manifests.NAME).is_file()
    )

  def save(
    self, step: int, tree: PyTree, *, keep_step: int | None = None
  ) -> None:
    """Starts saving; a step that is there already is left alone.

    Returns when the leaves may be donated or overwritten. Waits first for a
    save that is still under way.

    Args:
      step: counts up; names the folder.
      tree: any tree of jax and numpy arrays and numbers.
      keep_step: a step that stays beside the newest, until another is named.

    Raises:
      UserError: the save before could not be written.
    """
    self.wait()
    self._keep_step = keep_step
    if step in self.steps():
      logging.info("the checkpoint of step %d is there already", step)
      return
    # A host array may change as soon as we return, hence the copy.
    flat = {
      name: leaf if isinstance(leaf, jax.Array) else np.array(leaf)
      for name, leaf in trees.flatten(tree).items()
    }
    folder = self._folder(step)
    if jax.process_index() == 0:
      self._directory.mkdir(parents=True, exist_ok=True)
      for unfinished in self._directory.glob(f"{folder.name}*"):
        if _UNFINISHED.fullmatch(unfinished.name):
          shutil.rmtree(unfinished)
    _sync("checkpoint_begin")
    pending = manifests.start_checksums(flat)
    finish = functools.partial(manifests.finish_checksums, pending)
    if jax.process_count() > 1:
      # Talks to the other processes, so it must not leave this thread.
      checksums = finish()
      finish = functools.partial(dict, checksums)
    shapes = {
      n: [list(leaf.shape), str(leaf.dtype)] for n, leaf in flat.items()
    }
    # Orbax stores no arrays of size zero; the manifest says all about them.
    response = ocp.save_async(folder, {n: v for n, v in flat.items() if v.size})

    def complete() -> None:
      try:
        response.result()
        checksums = finish()
        if jax.process_index() == 0:
          leaves = {n: [*shapes[n], checksums[n]] for n in shapes}
          hashes = manifests.hash_files(folder)
          body = {"step": step, "files": hashes, "leaves": leaves}
          files.write_atomically(folder / manifests.NAME, manifests.seal(body))
          self._delete_old()
      except BaseException as e:
        self._failure = (step, e)

    self._thread = threading.Thread(target=complete, name="checkpoint")
    self._thread.start()

  def wait(self) -> None:
    """Returns when no save is under way.

    Raises:
      UserError: the disk is full or not writable. Any other failure of the
        background save is raised as it was.
    """
    if self._thread is None:
      return
    self._thread.join()
    self._thread = None
    if self._failure is not None:
      (step, error), self._failure = self._failure, None
      text = " ".join(str(error).split())
      if isinstance(error, OSError) or "RESOURCE_EXHAUSTED" in text:
        raise UserError(
          f"the checkpoint of step {step} could not be written to"
          f" {self._directory}: {text}"
        ) from error
      raise error
    _sync("checkpoint_end")

  def close(self) -> None:
    """Waits for the last save."""
    self.wait()

  def clean_incomplete(self) -> None:
    """Removes what a run that was killed while saving has left.

    Only for the owner of the workdir: what another run is just saving is
    incomplete too.
    """
    self.wait()
    if jax.process_index() == 0 and self._directory.is_dir():
      for path in self._directory.iterdir():
        whole = (path / manifests.NAME).is_file()
        if _UNFINISHED.fullmatch(path.name) and not whole:
          shutil.rmtree(path)
    _sync("checkpoint_clean")

  def restore(self, template: PyTree) -> tuple[int, PyTree] | None:
    """Loads the newest whole step, on any mesh and number of processes.

    A damaged step is renamed to "<step>.corrupt-N" with a warning that names
    the damaged leaf (or file, where no leaf can be named), and the one before
    is used.

    Args:
      template: the tree that was saved, with arrays or
        `jax.ShapeDtypeStruct`s as leaves; their sharding is that of the
        result. Leaves that are numpy arrays are loaded as such.

    Returns:
      (step, tree), or None where nothing was ever saved.

    Raises:
      UserError: a leaf has another shape or dtype than in the template, or is
        missing or left over (nothing is set aside then); a step is damaged and
        `strict` is on; or all steps are damaged.
    """
    self.wait()
    expected = {
      n: _as_abstract(leaf) for n, leaf in trees.flatten(template).items()
    }
    for step in reversed(self.steps()):
      folder = self._folder(step)
      try:
        manifest = _agreed_manifest(folder)
        _check_fits(expected, manifest["leaves"], folder)
        flat = _load_verified(folder, manifest, expected)
        return step, trees.unflatten_like(template, flat)
      except manifests.CorruptError as e:
        if self._strict:
          raise UserError(f"the checkpoint {folder} is damaged: {e}") from e
        self._set_aside(folder, str(e))
    damaged = self._damaged_folders()
    if damaged:
      raise UserError(
        "every checkpoint of this run is damaged, delete them to start anew:"
        f" {', '.join(str(path) for path in damaged)}"
      )
    return None

  def restore_flat(
    self,
    step: int | None = None,
    names: str | Callable[[Iterable[str]], list[str]] = "",
    *,
    shapes_only: bool = False,
  ) -> tuple[int, dict[str, np.ndarray]]:
    """Loads leaves to the host, without a template; changes no file.

    Args:
      step: None for the newest whole step that is not damaged.
      names: regex; only leaves whose flat name it finds (`re.search`) are
        loaded. Or a function that takes all names and returns those.
      shapes_only: give zeros that take no memory, and read no leaf.

    Returns:
      (step, flat name -> array).

    Raises:
      UserError: there is no such step, or it is damaged.
    """
    select = names if callable(names) else functools.partial(_found, names)
    self.wait()
    known = self.steps()
    if step is not None and step not in known:
      raise UserError(
        f"{self._directory} has no whole checkpoint of step {step}, there are:"
        f" {', '.join(map(str, known)) or 'none'}"
      )
    problems = []
    for candidate in reversed(known) if step is None else [step]:
      folder = self._folder(candidate)
      try:
        manifest = _agreed_manifest(folder)
        leaves = manifest["leaves"]
        wanted = {}
        for name in select(leaves):
          shape, dtype, _ = leaves[name]
          zero = np.zeros((), jnp.dtype(dtype))
          wanted[name] = np.broadcast_to(zero, shape)  # takes no memory
        if shapes_only:
          return candidate, wanted
        return candidate, _load_verified(folder, manifest, wanted)
      except manifests.CorruptError as e:
        problems.append(f"{folder}: {e}")
        if self._strict or step is not None:
          break
        logging.warning(
          "the checkpoint %s is damaged (%s), using the one before", folder, e
        )
    if problems:
      raise UserError(f"no checkpoint is intact: {'; '.join(problems)}")
    raise UserError(f"there is no whole checkpoint in {self._directory}")

  def _folder(self, step: int) -> pathlib.Path:
    return self._directory / f"{step:08d}"

  def _delete_old(self) -> None:
    """Keeps the newest steps; runs only when the new one is whole."""
    for step in self.steps()[: -self._keep]:
      if step != self._keep_step and (
        not self._keep_every or step % self._keep_every
      ):
        # Without its manifest, a half-deleted folder is not a step.
        (self._folder(step) / manifests.NAME).unlink()
        shutil.rmtree(self._folder(step))

  def _damaged_folders(self) -> list[pathlib.Path]:
    if not self._directory.is_dir():
      return []
    return sorted(self._directory.glob("*.corrupt-*"))

  def _set_aside(self, folder: pathlib.Path, problem: str) -> None:
    number = 1
    while (
      aside := folder.with_name(f"{folder.name}.corrupt-{number}")
    ).exists():
      number += 1
    _sync("checkpoint_set_aside")
    if jax.process_index() == 0:
      folder.rename(aside)
    logging.warning(
      "the checkpoint of step %d is damaged: %s. It was set aside as %s, and"
      " the one before is used.",
      int(folder.name),
      problem,
      aside,
    )
    _sync("checkpoint_was_set_aside")


def _found(pattern: str, names: Iterable[str]) -> list[str]:
  return [name for name in names if re.search(pattern, name)]


def _sync(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _as_abstract(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
  """What Orbax takes as the description of a leaf."""
  if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return np.asarray(leaf)
  sharding = leaf.sharding
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _agreed_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest, or CorruptError on all processes where 0 cannot read it."""
  problem = None
  manifest = {}
  try:
    manifest = manifests.read(folder)
  except manifests.CorruptError as e:
    problem = e
  if _agree(problem is not None):
    raise problem or manifests.CorruptError(f"file {manifests.NAME} is damaged")
  return manifest


def _agree(flag: bool) -> bool:
  """What process 0 says."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def _check_fits(
  expected: Mapping[str, Any],
  leaves: Mapping[str, list[Any]],
  folder: pathlib.Path,
) -> None:
  """Refuses a checkpoint of another model: Orbax would cast dtypes silently."""
  problems = []
  for name in [*expected, *(n for n in leaves if n not in expected)]:
    want, found = "no such leaf", "no such leaf"
    if name in expected:
      leaf = expected[name]
      want = f"{leaf.dtype}{list(leaf.shape)}"
    if name in leaves:
      shape, dtype, _ = leaves[name]
      found = f"{dtype}{shape}"
    if want != found:
      problems.append(f"leaf {name!r}: expected {want}, found {found}")
  if problems:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise UserError(
      f"the checkpoint {folder} does not fit this config: {problems[0]}{more}"
    )


def _load(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  wanted: Mapping[str, Any],
) -> dict[str, Any]:
  """Loads the wanted leaves and nothing else."""
  stored = [
    n for n, (shape, *_) in manifest["leaves"].items() if 0 not in shape
  ]
  request = {n: wanted.get(n, ocp.PLACEHOLDER) for n in stored}
  loaded = {}
  if any(n in wanted for n in stored):
    loaded = ocp.load(folder, request)
  flat = {}
  for name, leaf in wanted.items():
    if name in request:
      flat[name] = loaded[name]
    elif isinstance(leaf, jax.ShapeDtypeStruct):
      flat[name] = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    else:
      flat[name] = np.zeros(leaf.shape, leaf.dtype)
  return flat


def _changed_leaf(
  flat: Mapping[str, Array], leaves: Mapping[str, list[Any]]
) -> str | None:
  """The first leaf whose checksum is not the one in the manifest."""
  checksums = manifests.finish_checksums(manifests.start_checksums(flat))
  return next((n for n in flat if checksums[n] != leaves[n][2]), None)


def _load_verified(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  wanted: Mapping[str, Any],
) -> dict[str, Any]:
  """Loads the wanted leaves, once the files are seen to be intact.

  Raises:
    CorruptError: something is not as it was saved. A failure to load intact
      files (no memory, an impossible sharding) is raised as it is.
  """
  problems = {}
  if jax.process_index() == 0:
    problems = manifests.damaged_files(folder, manifest["files"])
  if _agree(bool(problems)):
    summary = next(iter(problems.values()), "a file is damaged")
    if leaf := _damaged_leaf(folder, manifest, wanted, problems):
      summary = f"leaf {leaf!r} has changed ({summary})"
    raise manifests.CorruptError(summary)
  flat = _load(folder, manifest, wanted)
  if leaf := _changed_leaf(flat, manifest["leaves"]):
    raise manifests.CorruptError(f"leaf {leaf!r} has changed")
  return flat


def _damaged_leaf(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  wanted: Mapping[str, Any],
  problems: Mapping[str, str],
) -> str | None:
  """A leaf that damaged files have cost; None if no leaf can be named.

  Orbax packs many leaves into a file, so they are loaded and compared: a
  flipped bit in a leaf's values loads without an error.
  """
  holds_leaves = any("d" in pathlib.PurePath(n).parts for n in problems)
  if not holds_leaves or jax.process_count() > 1:
    return None
  try:
    return _changed_leaf(_load(folder, manifest, wanted), manifest["leaves"])
  except Exception:
    return None  # the damage is to what the leaves share
