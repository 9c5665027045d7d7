"""Dotted names of the leaves of a tree, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax import train_state
from unclip_jax.utils import trees


@pytest.fixture
def state():
  params = {"dense": {"kernel": jnp.ones((2, 3))}, "scale": jnp.ones(())}
  tx = optax.multi_transform(
    {"adam": optax.adamw(1e-3), "off": optax.set_to_zero()},
    {"dense": "adam", "scale": "off"},
  )
  return train_state.TrainState(
    step=jnp.int32(0),
    params=params,
    model_state={},
    opt_state=tx.init(params),
    ema_params=None,
  )


def test_names(state):
  """They are those of saved checkpoints: a change makes old ones useless."""
  adam = "opt_state.inner_states.adam.inner_state.0"
  assert set(trees.flatten(state)) == {
    "step",
    "params.dense.kernel",
    "params.scale",
    f"{adam}.count",
    f"{adam}.mu.dense.kernel",
    f"{adam}.nu.dense.kernel",
  }


def test_round_trip(state):
  flat = trees.flatten(state)
  changed = {name: leaf + 1 for name, leaf in flat.items()}
  back = trees.unflatten_like(state, changed)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(back)):
    np.testing.assert_array_equal(after, before + 1)


def test_unflatten_needs_no_template():
  tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  assert trees.unflatten(trees.flatten(tree)) == tree


def test_missing_leaf(state):
  flat = trees.flatten(state)
  del flat["params.scale"]
  with pytest.raises(KeyError, match=r"params\.scale"):
    trees.unflatten_like(state, flat)
