"""Adapters as algebra, and which kernels they adapt."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from tests import random_variables
from unclip_jax import trainer
from unclip_jax.models import lora
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees

BASE = {
  "params": {
    "attn": {
      "query": {
        "kernel": random_variables.normal(6, 4),
        "bias": random_variables.normal(4),
      }
    },
    "conv": {"kernel": random_variables.normal(3, 3, 2, 5)},
  },
  "batch_stats": {"mean": random_variables.normal(5)},
}
ALL = lora.Model(rank=3, alpha=1.5, pattern="kernel")


def init(model, base=BASE):
  return model.init(jax.random.key(0), base)


def random(model):
  return random_variables.like_tree(init(model))


def test_fresh_adapters_change_nothing():
  adapted = ALL.apply(init(ALL), BASE)
  jax.tree.map(np.testing.assert_array_equal, adapted, BASE)


def test_what_is_added_is_a_scaled_product_of_that_rank():
  variables = random(ALL)
  adapted = trees.flatten(ALL.apply(variables, BASE))
  base, pairs = trees.flatten(BASE), trees.flatten(variables["params"])
  for name in ("attn.query.kernel", "conv.kernel"):
    added = adapted[f"params.{name}"] - base[f"params.{name}"]
    added = np.reshape(added, (-1, added.shape[-1]))
    expected = 0.5 * pairs[f"{name}.a"] @ pairs[f"{name}.b"]
    np.testing.assert_allclose(added, expected, atol=1e-5)
    assert np.linalg.matrix_rank(added, tol=1e-4) == 3
  for name in ("params.attn.query.bias", "batch_stats.mean"):
    np.testing.assert_array_equal(adapted[name], base[name])


def test_a_rank_as_high_as_the_kernel_adds_anything():
  model = dataclasses.replace(ALL, rank=5)
  variables = init(model)
  wanted = jax.tree.map(lambda x: np.flip(x).copy(), BASE["params"])
  for name in ("attn.query.kernel", "conv.kernel"):
    kernel = trees.flatten(BASE["params"])[name]
    delta = trees.flatten(wanted)[name] - kernel
    a, s, b = np.linalg.svd(
      delta.reshape(-1, kernel.shape[-1]), full_matrices=False
    )
    a, b = (np.pad(x, [(0, 0), (0, 5 - len(s))]) for x in (a, (s * b.T)))
    pair = {f"{name}.a": a, f"{name}.b": b.T * model.rank / model.alpha}
    variables["params"] = trees.overlay(variables["params"], pair)
  adapted = trees.flatten(model.apply(variables, BASE)["params"])
  for name in ("attn.query.kernel", "conv.kernel"):
    np.testing.assert_allclose(
      adapted[name], trees.flatten(wanted)[name], atol=1e-5
    )


def test_merged_equals_adapted():
  variables = random(ALL)
  merged = ALL.merge(variables, BASE)
  leaves = jax.tree.leaves(merged)
  assert all(type(x) is np.ndarray and x.dtype == np.float32 for x in leaves)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    merged,
    ALL.apply(variables, BASE),
  )
  jax.tree.map(np.testing.assert_array_equal, ALL.merge(init(ALL), BASE), BASE)


def test_adapters_start_with_the_variance_of_the_source():
  shape = jax.ShapeDtypeStruct((300, 64), np.float32)
  a = init(lora.Model(pattern="w"), {"params": {"w": shape}})["params"]["w"][
    "a"
  ]
  assert float(a.std()) == pytest.approx(900**-0.5, rel=0.05)


# Kernels of one block: query, key, value, out, with a context two more; the
# two of its MLP.
@pytest.mark.parametrize(
  "name, per_block",
  [("clip", {6}), ("prior", {6}), ("prior_ar", {6, 8}), ("decoder", {6})],
)
def test_the_default_adapts_attention_and_mlps(name, per_block):
  config = config_lib.load(f"configs/emoji/{name}.py:smoke")
  run = trainer.setup(config, abstract=True)
  state = trainer.state_shapes(
    run, {**run.frozen, **trainer._table_shapes(run)}
  )
  adapters = trees.flatten(
    init(lora.Model(), {"params": state.params})["params"]
  )
  adapted = {name.rpartition(".")[0] for name in adapters}
  layers = collections.Counter(x.rsplit(".", 3)[0] for x in adapted)
  assert set(layers.values()) == per_block
  named = {n.rsplit(".", 3)[1] for n in adapted}
  assert named <= {"attn", "mlp"}
  rest = {n for n in trees.flatten(state.params) if n not in adapted}
  assert not any(".attn." in n and n.endswith("kernel") for n in rest)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"pattern": "mlp"}, r"'mlp' is in no name .*attn\.query\.kernel"),
    ({"pattern": "bias"}, "'bias' is in no name of a kernel"),
    ({"pattern": "("}, "no regular expression"),
    ({"rank": 0}, "adapts nothing"),
  ],
)
def test_mistakes_are_named(fields, message):
  with pytest.raises(errors.UserError, match=message):
    init(lora.Model(**fields))
