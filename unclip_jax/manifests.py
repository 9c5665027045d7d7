"""What makes damage show: checksums of leaves, and manifests of step folders.

Orbax notices no flipped bit. So a step folder has a manifest with two kinds of
hashes: SHA-256 of each file, and a checksum of each leaf, computed on the
devices that hold it. The manifest carries its own hash, too.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

Array = jax.Array | np.ndarray

NAME = "manifest.json"


class CorruptError(Exception):
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


def start_checksums(flat: Mapping[str, Array]) -> dict[str, list[jax.Array]]:
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


def finish_checksums(pending: Mapping[str, list[jax.Array]]) -> dict[str, str]:
  """Name -> 16 hex digits, the same on every process."""
  sums = np.zeros((len(pending), 2), np.uint32)
  for row, parts in zip(sums, jax.device_get(list(pending.values()))):
    for part in parts:
      row += part
  if jax.process_count() > 1:
    sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
  return {n: f"{a:08x}{b:08x}" for n, (a, b) in zip(pending, sums)}


# --- Manifests ----------------------------------------------------------------


def seal(body: Mapping[str, Any]) -> str:
  """JSON text that carries its own hash: any flipped bit in it shows."""
  digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
  return json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1)


def read(folder: pathlib.Path) -> dict[str, Any]:
  try:
    text = (folder / NAME).read_text(encoding="utf-8")
    body = json.loads(text)
    del body["sha256"]
    intact = seal(body) == text and body["step"] == int(folder.name)
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
    raise CorruptError(f"file {NAME} cannot be read") from e
  if not intact:
    raise CorruptError(f"file {NAME} has changed")
  return body


def _hash_file(path: pathlib.Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def hash_files(folder: pathlib.Path) -> dict[str, list[Any]]:
  """Relative path -> [bytes, SHA-256]."""
  paths = sorted(p for p in folder.rglob("*") if p.is_file())
  with concurrent.futures.ThreadPoolExecutor() as pool:
    digests = list(pool.map(_hash_file, paths))
  return {
    str(p.relative_to(folder)): [p.stat().st_size, digest]
    for p, digest in zip(paths, digests)
  }


def damaged_files(
  folder: pathlib.Path, files: Mapping[str, list[Any]]
) -> dict[str, str]:
  """File -> a phrase, for each that is not as it was written."""
  found = hash_files(folder)
  problems = {}
  for name, (size, digest) in files.items():
    if name not in found:
      problems[name] = f"file {name} is missing"
    elif found[name][0] != size:
      problems[name] = f"file {name} has {found[name][0]} bytes, not {size}"
    elif found[name][1] != digest:
      problems[name] = f"file {name} has changed"
  return problems
