"""Trees like a training's, to save and compare, and how to damage files."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax


@flax.struct.dataclass
class State:
  """The fields of a training state."""

  step: jax.Array
  params: dict
  model_state: dict
  opt_state: optax.OptState
  ema_params: dict | None


def make_tree(seed=0, ema=True, width=5):
  rng = np.random.default_rng(seed)
  params = {
    "dense": {
      "kernel": jnp.asarray(rng.normal(size=(8, width)), jnp.float32),
      "bias": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
    },
    "scale": jnp.float32(rng.normal()),
  }
  tx = optax.multi_transform(
    {
      "adam": optax.adamw(optax.linear_schedule(1e-3, 0, 9)),
      "off": optax.sgd(0),
    },
    {"dense": "adam", "scale": "off"},
  )
  state = State(
    step=jnp.int32(seed),
    params=params,
    model_state={"batch_stats": {"mean": jnp.arange(3.0) + seed}},
    opt_state=tx.init(params),
    ema_params=jax.tree.map(lambda x: x + 1, params) if ema else None,
  )
  tables = {
    "space": {"mean": jnp.ones(4) * seed, "is_unit": jnp.asarray(True)},
    "ids": np.arange(6, dtype=np.int64) * 2**40,
    "flags": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
  }
  return {"state": state, "tables": tables}


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def flip_bit(path, bit):
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)
