"""Saving and restoring: training steps, run configs, released models.

A thin facade over Orbax, whose types stay in this file. Orbax notices no
flipped bit and does not fall back from a damaged step, so every step folder
gets a manifest with two kinds of hashes: SHA-256 of each file, and a checksum
of each leaf, computed on the devices that hold it. A step is whole when its
manifest stands, which is written last; what is damaged is set aside, and the
step before is used.

  WORKDIR/config.json                      the run's config
  WORKDIR/.lock                            held while a run trains there
  WORKDIR/checkpoints/00000010/state/      Orbax's files
  WORKDIR/checkpoints/00000010/manifest.json
  WORKDIR/checkpoints/00000010.corrupt-1/  a step that was set aside

Leaves have the flat names of `utils.trees`, for example
"state.params.vision.block_0.attn.query.kernel".
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from unclip_jax import tensor_files
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import files, trees
from unclip_jax.utils.errors import UserError

PyTree = Any
Array = jax.Array | np.ndarray
PathLike = str | os.PathLike[str]

_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_BEST = "best.step"  # a leaf: best.Record
# Fields of a config that say where a run's arrays lie, and not what they are.
_PLACE = ("mesh", "sharding", "optimizer_sharding", "axis_rules", "parallel")
_STEP = re.compile(r"\d+")
# A step folder, or what Orbax makes of its name until the step is written.
_UNFINISHED = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")


class _CorruptError(Exception):
  """What is damaged in a step folder; the message names leaf or file."""


# --- Checksums of leaves ------------------------------------------------------


def _mix(x: jax.Array) -> jax.Array:
  """A one-to-one scrambling of uint32 (MurmurHash3's fmix32)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


@jax.jit
def _hash_sums(
  words: jax.Array, starts: jax.Array, strides: jax.Array
) -> jax.Array:
  """Two sums of hashed words of one shard, modulo 2**32.

  Word i of the whole leaf (in C order) is hashed with i. For a given i the hash
  is one-to-one, so a change of one word always changes both sums; plain
  multiples of i would let two flipped sign bits cancel. Addition modulo 2**32
  is exact in any order: the sums of the shards add up to those of the leaf,
  however it is laid out.

  Args:
    words: the shard; 8-byte types count as two words.
    starts: uint32 [ndim], the shard's place in the leaf.
    strides: uint32 [ndim], in words of the leaf.

  Returns:
    uint32 [2].
  """
  if words.dtype == jnp.bool_:
    words = words.astype(jnp.uint8)
  size = words.dtype.itemsize
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
  bits = jax.lax.bitcast_convert_type(words, unsigned).astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(words.ndim):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index += (iota + starts[axis]) * strides[axis]
  if size == 8:
    index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, words.ndim)
  return jnp.stack(
    [
      jnp.sum(_mix(bits + index * jnp.uint32(0x9E3779B1)), dtype=jnp.uint32),
      jnp.sum(_mix(bits ^ _mix(index + 1)), dtype=jnp.uint32),
    ]
  )


def _start_checksums(flat: Mapping[str, Array]) -> dict[str, list[jax.Array]]:
  """Dispatches the sums of the shards that this process owns.

  One small function by shard, each on the shard's own device: no collectives,
  and one compilation for each shape instead of a long one for the whole tree
  (1,200 leaves: 12 s).
  """
  pending = {}
  for name, leaf in flat.items():
    if isinstance(leaf, jax.Array):
      words_per_item = 2 if leaf.dtype.itemsize == 8 else 1
      shape = leaf.shape
      shards = [
        (s.data, [i.start or 0 for i in s.index])
        for s in leaf.addressable_shards
        if s.replica_id == 0
      ]
    else:
      # Viewed as words before jax sees them: it would cut 8-byte types.
      words_per_item = 1
      word = {1: np.uint8, 2: np.uint16}.get(leaf.dtype.itemsize, np.uint32)
      words = leaf.reshape(-1).view(word)
      shape = words.shape
      owned = jax.process_index() == 0
      shards = [(words, [0])] if owned else []
    strides = [
      math.prod(shape[axis + 1 :]) * words_per_item % 2**32
      for axis in range(len(shape))
    ]
    pending[name] = [
      _hash_sums(
        data,
        np.array([start % 2**32 for start in starts], np.uint32),
        np.array(strides, np.uint32),
      )
      for data, starts in shards
    ]
  return pending


def _finish_checksums(pending: Mapping[str, list[jax.Array]]) -> dict[str, str]:
  """Name -> 16 hex digits, the same on every process."""
  sums = np.zeros((len(pending), 2), np.uint32)
  for row, parts in zip(sums, jax.device_get(list(pending.values()))):
    for part in parts:
      row += part
  if jax.process_count() > 1:
    sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
  return {n: f"{a:08x}{b:08x}" for n, (a, b) in zip(pending, sums)}


# --- Manifests ----------------------------------------------------------------


def _seal(body: Mapping[str, Any]) -> str:
  """JSON text that carries its own hash: any flipped bit in it shows."""
  digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
  return json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  try:
    text = (folder / _MANIFEST).read_text(encoding="utf-8")
    body = json.loads(text)
    del body["sha256"]
    intact = _seal(body) == text and body["step"] == int(folder.name)
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
    raise _CorruptError(f"file {_MANIFEST} cannot be read") from e
  if not intact:
    raise _CorruptError(f"file {_MANIFEST} has changed")
  return body


def _hash_file(path: pathlib.Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _hash_files(folder: pathlib.Path) -> dict[str, list[Any]]:
  """Relative path -> [bytes, SHA-256]."""
  paths = sorted(p for p in folder.rglob("*") if p.is_file())
  with concurrent.futures.ThreadPoolExecutor() as pool:
    digests = list(pool.map(_hash_file, paths))
  return {
    str(p.relative_to(folder)): [p.stat().st_size, digest]
    for p, digest in zip(paths, digests)
  }


def _damaged_files(
  folder: pathlib.Path, files: Mapping[str, list[Any]]
) -> dict[str, str]:
  """File -> a phrase, for each that is not as it was written."""
  found = _hash_files(folder)
  problems = {}
  for name, (size, digest) in files.items():
    if name not in found:
      problems[name] = f"file {name} is missing"
    elif found[name][0] != size:
      problems[name] = f"file {name} has {found[name][0]} bytes, not {size}"
    elif found[name][1] != digest:
      problems[name] = f"file {name} has changed"
  return problems


# --- Training steps -----------------------------------------------------------


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
      if _STEP.fullmatch(path.name) and (path / _MANIFEST).is_file()
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
    pending = _start_checksums(flat)
    finish = functools.partial(_finish_checksums, pending)
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
          body = {"step": step, "files": _hash_files(folder), "leaves": leaves}
          files.write_atomically(folder / _MANIFEST, _seal(body))
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
        whole = (path / _MANIFEST).is_file()
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
      except _CorruptError as e:
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
    self, step: int | None = None, names: str | None = None
  ) -> tuple[int, dict[str, np.ndarray]]:
    """Loads leaves to the host, without a template; changes no file.

    Args:
      step: None for the newest whole step that is not damaged.
      names: regex; only leaves whose flat name it finds (`re.search`) are
        loaded.

    Returns:
      (step, flat name -> array).

    Raises:
      UserError: there is no such step, or it is damaged.
    """
    pattern = re.compile(names or "")
    return self._restore_flat(
      step, lambda found: [n for n in found if pattern.search(n)]
    )

  def _restore_flat(
    self,
    step: int | None,
    select: Callable[[Iterable[str]], list[str]],
    *,
    shapes_only: bool = False,
  ) -> tuple[int, dict[str, np.ndarray]]:
    """`restore_flat`; of shapes, arrays of zeros that take no memory."""
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
      except _CorruptError as e:
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
        (self._folder(step) / _MANIFEST).unlink()
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
  """The manifest, or _CorruptError on all processes where 0 cannot read it."""
  problem = None
  manifest = {}
  try:
    manifest = _read_manifest(folder)
  except _CorruptError as e:
    problem = e
  if _agree(problem is not None):
    raise problem or _CorruptError(f"file {_MANIFEST} is damaged")
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
  checksums = _finish_checksums(_start_checksums(flat))
  return next((n for n in flat if checksums[n] != leaves[n][2]), None)


def _load_verified(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  wanted: Mapping[str, Any],
) -> dict[str, Any]:
  """Loads the wanted leaves, once the files are seen to be intact.

  Raises:
    _CorruptError: something is not as it was saved. A failure to load intact
      files (no memory, an impossible sharding) is raised as it is.
  """
  problems = {}
  if jax.process_index() == 0:
    problems = _damaged_files(folder, manifest["files"])
  if _agree(bool(problems)):
    summary = next(iter(problems.values()), "a file is damaged")
    if leaf := _damaged_leaf(folder, manifest, wanted, problems):
      summary = f"leaf {leaf!r} has changed ({summary})"
    raise _CorruptError(summary)
  flat = _load(folder, manifest, wanted)
  if leaf := _changed_leaf(flat, manifest["leaves"]):
    raise _CorruptError(f"leaf {leaf!r} has changed")
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


# --- The run's folder ---------------------------------------------------------


@contextlib.contextmanager
def workdir_lock(workdir: PathLike) -> Iterator[None]:
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


# --- Released models ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """What `load_model` finds.

  Attributes:
    config: that of the run that trained it.
    variables: {"params": ..., "batch_stats"...: ...}, nested dicts of numpy
      arrays (or of shapes).
    tables: name -> array or dict of arrays.
    assets_dir: the folder that holds the tokenizer and other files.
    fingerprint: see `fingerprint`.
  """

  config: ml_collections.ConfigDict
  variables: dict[str, PyTree]
  tables: dict[str, PyTree]
  assets_dir: str
  fingerprint: str


def fingerprint(variables: Mapping[str, PyTree]) -> str:
  """16 hex digits of SHA-256 over names, shapes, dtypes and bytes of params.

  A run and the model folder saved from it have the same one.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(trees.flatten(variables["params"]).items()):
    _add_to_fingerprint(digest, name, np.asarray(leaf))
  return digest.hexdigest()[:16]


def _add_to_fingerprint(digest: Any, name: str, array: np.ndarray) -> None:
  digest.update(f"{name} {list(array.shape)} {array.dtype}\n".encode())
  digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def save_model(
  directory: PathLike,
  config: ml_collections.ConfigDict,
  variables: Mapping[str, PyTree],
  tables: Mapping[str, PyTree],
  assets: Mapping[str, PathLike],
) -> None:
  """Writes a model folder: config.json, model.safetensors, asset files.

  Args:
    directory: is made where needed; files of the same names are replaced.
    config: that of the run.
    variables: {"params": ..., and other collections}.
    tables: arrays or dicts of arrays, by name.
    assets: file name in the folder -> the file to copy.

  Raises:
    UserError: an asset is missing.
  """
  folder = pathlib.Path(directory)
  for name, path in assets.items():
    if not os.path.isfile(path):
      raise UserError(f"there is no file {path} for the asset {name!r}")
  folder.mkdir(parents=True, exist_ok=True)
  flat = trees.flatten({**variables, "tables": dict(tables)})
  save_arrays(folder, {n: tensor_files.lazy(v) for n, v in flat.items()})
  save_config(folder, config)
  for name, path in assets.items():
    if (folder / name).resolve() != pathlib.Path(path).resolve():
      shutil.copyfile(path, folder / name)


def save_arrays(
  folder: pathlib.Path, arrays: Mapping[str, tensor_files.LazyArray]
) -> str:
  """Writes model.safetensors, one array in memory at a time.

  Args:
    arrays: by their flat names, "params..." and "tables...".

  Returns:
    The fingerprint of the parameters.
  """
  digest = hashlib.sha256()

  def add(name: str, array: np.ndarray) -> None:
    if name.startswith("params."):
      _add_to_fingerprint(digest, name.removeprefix("params."), array)

  blank = {"fingerprint": "0" * 16}  # known when all has been written
  with tensor_files.SafetensorsWriter(
    folder / _WEIGHTS, arrays, blank
  ) as writer:
    writer.write_all(add)
    found = digest.hexdigest()[:16]
    writer.metadata["fingerprint"] = found
  return found


class OpenModel(NamedTuple):
  """What `open_model` finds."""

  config: ml_collections.ConfigDict
  arrays: dict[str, tensor_files.LazyArray]  # by their flat names
  assets_dir: str
  fingerprint: str | None  # as stored; a run stores none


def open_model(path: PathLike) -> OpenModel:
  """Opens a model folder, or the best or newest step of a run's workdir.

  The best is taken where the run has kept one (best.py), and of a run the
  averaged parameters where there are any. A model folder's arrays are loaded
  one by one, a run's all at the first.

  Raises:
    UserError: the folder holds neither, or what it holds is damaged.
  """
  folder = pathlib.Path(path)
  if (folder / _WEIGHTS).is_file():
    arrays, metadata = tensor_files.read_safetensors(folder / _WEIGHTS)
    stored, assets_dir = metadata.get("fingerprint"), folder
  elif (folder / "checkpoints").is_dir():
    arrays = _open_run(folder / "checkpoints")
    stored, assets_dir = None, folder / "assets"
  else:
    raise UserError(
      f"there is no model in {path}: looked for {_WEIGHTS} (a model folder) and"
      " checkpoints/ (a run)"
    )
  if not any(name.startswith("params.") for name in arrays):
    raise UserError(f"the model in {path} has no parameters")
  return OpenModel(load_config(folder), arrays, str(assets_dir), stored)


def load_model(
  path: PathLike, *, abstract: bool = False, lazy: bool = False
) -> LoadedModel:
  """Loads a model folder, or the best or newest step of a run's workdir.

  Args:
    abstract: give `jax.ShapeDtypeStruct`s in place of arrays, and "" as the
      fingerprint; no weights are read.
    lazy: variables of a model folder are `LazyArray`s, whose bytes nobody has
      compared with the fingerprint.

  Raises:
    UserError: as `open_model`, or the parameters are not those that were saved.
  """
  config, arrays, assets_dir, stored = open_model(path)
  flat: dict[str, Any] = arrays
  if abstract:
    flat = {
      n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()
    }
    stored = ""
  elif stored is None or not lazy:
    flat, stored = _load_all(arrays, stored, str(path))
  variables = trees.unflatten(flat)
  tables = tensor_files.loaded(variables.pop("tables", {}))
  return LoadedModel(config, variables, tables, assets_dir, stored)


def load_variables(
  model: LoadedModel | Any, where: str, convert: Callable[[np.ndarray], Any]
) -> dict[str, PyTree]:
  """The variables of a model that was loaded with `lazy`, one by one.

  Args:
    model: has `variables` and the `fingerprint` that they must have.
    where: what a message calls its folder.
    convert: what is kept of each array.

  Raises:
    UserError: the parameters are not those that were saved.
  """
  flat, _ = _load_all(
    trees.flatten(model.variables), model.fingerprint, where, convert
  )
  return trees.unflatten(flat)


def _load_all(
  arrays: Mapping[str, Any],
  stored: str | None,
  where: str,
  convert: Callable[[np.ndarray], Any] = lambda array: array,
) -> tuple[dict[str, Any], str]:
  """Loads arrays that may be lazy, and compares their fingerprint."""
  digest = hashlib.sha256()
  flat = {}
  for name in sorted(arrays):
    array = tensor_files.loaded(arrays[name])
    if name.startswith("params."):
      _add_to_fingerprint(digest, name.removeprefix("params."), array)
    flat[name] = convert(array)
  found = digest.hexdigest()[:16]
  if stored not in (None, found):
    raise UserError(
      f"{pathlib.Path(where) / _WEIGHTS} is damaged: its parameters have the"
      f" fingerprint {found}, but were saved with {stored}"
    )
  return flat, found


def _open_run(directory: pathlib.Path) -> dict[str, tensor_files.LazyArray]:
  """The variables and tables of one step, by the names of a model."""
  read = functools.cache(functools.partial(_read_run, directory))
  return {
    name: tensor_files.LazyArray(
      zeros.shape, zeros.dtype, functools.partial(lambda n: read()[n], name)
    )
    for name, zeros in _read_run(directory, shapes_only=True).items()
  }


def _read_run(
  directory: pathlib.Path, *, shapes_only: bool = False
) -> dict[str, np.ndarray]:
  ema, plain = "state.ema_params.", "state.params."
  others = {"state.model_state.": "", "tables.": "tables."}

  def select(names: Iterable[str]) -> list[str]:
    names = list(names)
    params = ema if any(n.startswith(ema) for n in names) else plain
    return [n for n in names if n.startswith((params, *others))]

  checkpointer = Checkpointer(directory)
  _, flat = checkpointer._restore_flat(
    _best_step(checkpointer), select, shapes_only=shapes_only
  )
  prefixes = {ema: "params.", plain: "params.", **others}
  return {
    new + name.removeprefix(old): leaf
    for name, leaf in flat.items()
    for old, new in prefixes.items()
    if name.startswith(old)
  }


def _best_step(checkpointer: Checkpointer) -> int | None:
  """The step that the newest one names as the best; None: it names none."""
  steps = checkpointer.steps()
  if not steps:
    return None
  with contextlib.suppress(_CorruptError):
    manifest = _read_manifest(checkpointer._folder(steps[-1]))
    if _BEST not in manifest["leaves"]:
      return None
  _, flat = checkpointer.restore_flat(names=rf"^{re.escape(_BEST)}$")
  return int(flat[_BEST]) or None if _BEST in flat else None
