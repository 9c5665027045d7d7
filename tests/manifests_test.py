"""Checksums of leaves: every bit counts, wherever a leaf lies."""

import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import manifests


@pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "int8", "bool", "int64", "float16"]
)
def test_host_and_device_agree_and_every_bit_counts(dtype):
  rng = np.random.default_rng(0)
  array = rng.integers(0, 2, (3, 5)).astype(jnp.dtype(dtype))

  def checksum(leaf):
    pending = manifests.start_checksums({"x": leaf})
    return manifests.finish_checksums(pending)["x"]

  if dtype != "int64":
    assert checksum(jnp.asarray(array)) == checksum(array)
  seen = {checksum(array)}
  bits = 1 if dtype == "bool" else 8
  for byte in range(array.nbytes):
    for bit in range(bits):
      other = array.copy()
      other.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
      seen.add(checksum(other))
  assert len(seen) == 1 + array.nbytes * bits


def test_changes_that_cancel_in_plain_sums_show():
  base = np.arange(1, 101, dtype=np.float32)
  leaves = {name: base.copy() for name in ("base", "swap", "sign", "shift")}
  leaves["swap"][[3, 70]] = base[[70, 3]]
  leaves["sign"][[3, 70]] *= -1
  leaves["shift"] = np.roll(base, 1)
  pending = manifests.start_checksums(leaves)
  sums = manifests.finish_checksums(pending)
  for half in (slice(0, 8), slice(8, 16)):  # each sum by itself
    assert len({digits[half] for digits in sums.values()}) == len(leaves)
