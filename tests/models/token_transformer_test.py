"""DALL-E's transformer: what depends on what, and that the cache is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import sparse_masks
from unclip_jax.models import token_transformer
from unclip_jax.utils import errors

L, S, K, V, TEXT_V = 4, 3, 9, 9, 6
MODEL = token_transformer.Model(
  vocab_size=TEXT_V, context_length=L, num_codes=V, grid_size=S, image_size=6,
  width=8, depth=3, num_heads=2, attention_types=("row", "column"),
  kernel_size=3,
)  # fmt: skip
INPUTS = {
  "text_tokens": np.asarray([[2, 4, 3, 0], [2, 5, 4, 3]], np.int32),
  "text_mask": np.asarray([[1, 1, 1, 0], [1, 1, 1, 1]], bool),
  "image_tokens": np.random.default_rng(0).integers(0, V, (2, K), np.int32),
}
TEXT = {name: INPUTS[name] for name in ("text_tokens", "text_mask")}


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(MODEL.init, **INPUTS)


@pytest.fixture(name="whole", scope="module")
def _whole(variables):
  return jax.jit(MODEL.apply)(variables, **INPUTS)


def _jacobian(model, variables):
  """[L - 1 + K, ...] bool: which logits depend on which positions' inputs."""
  # Every position has a row of its own, so that each has a gradient.
  one = {k: v[:1] for k, v in INPUTS.items()}
  one["image_tokens"] = np.arange(K, dtype=np.int32)[None]
  params = variables["params"]

  @jax.jit
  @jax.jacobian
  def jacobian(tables):
    code, position, padding = tables
    changed = {
      **params,
      "image_embed": {**params["image_embed"], "code": {"embedding": code}},
      "text_embed": {
        **params["text_embed"],
        "position": position,
        "padding": padding,
      },
    }
    logits, out = model.apply({"params": changed}, **one)
    parts = [
      (x[0] * random_variables.normal(x.shape[-1])).sum(-1)
      for x in (out["text_logits"], logits)
    ]
    return jnp.concatenate(parts)

  tables = (
    params["image_embed"]["code"]["embedding"],
    params["text_embed"]["position"],
    params["text_embed"]["padding"],
  )
  code, position, padding = (np.abs(x).sum(-1) > 0 for x in jacobian(tables))
  return code, np.where(one["text_mask"][0], position, padding)


@pytest.mark.parametrize("attention_type", sparse_masks.TYPES)
def test_one_layer_depends_on_what_its_mask_allows(attention_type, variables):
  """By gradient: logits i come from position i - 1, or from the start."""
  model = MODEL.clone(
    depth=1, attention_types=(attention_type,), last_attention_type=None
  )
  code, text = _jacobian(model, variables)
  expected = np.zeros((K, K), bool)
  expected[1:] = sparse_masks.image_mask(attention_type, S, 3)[:-1]
  assert not np.any(np.triu(code[L - 1 :]))  # d logits_i / d token_j, j >= i
  np.testing.assert_array_equal(code[L - 1 :], expected)
  assert not np.any(code[: L - 1])  # text does not see the picture
  # The text's own logits are causal, the picture's see all of it.
  np.testing.assert_array_equal(text[: L - 1], np.tri(L - 1, L, dtype=bool))
  assert np.all(text[L - 1 :])


def test_layers_of_different_masks_are_causal_together(variables):
  code, text = _jacobian(MODEL, variables)
  np.testing.assert_array_equal(code[L - 1 :], np.tri(K, k=-1, dtype=bool))
  assert not np.any(code[: L - 1]) and not np.any(np.triu(text[: L - 1], 1))


def test_prefill_and_decode_steps_equal_the_whole(variables, whole):
  prefill = jax.jit(lambda v, t: MODEL.apply(v, **t, method=MODEL.prefill))
  step = jax.jit(lambda v, *a: MODEL.apply(v, *a, method=MODEL.decode_step))
  logits, cache = prefill(variables, TEXT)
  assert all(kv.key.shape[2] == L + K for kv in cache)
  # What is not yet filled does not matter.
  cache = jax.tree.map(lambda x: x.at[:, :, L + 1 :].set(9.0), cache)
  steps = [logits]
  for i in range(K - 1):
    logits, cache = step(
      variables, INPUTS["image_tokens"][:, i], jnp.int32(i), cache
    )
    steps.append(logits)
  np.testing.assert_allclose(np.stack(steps, 1), whole[0], rtol=1e-4, atol=1e-4)


def test_scanned_and_rematerialised_layers_change_nothing(variables, whole):
  model = MODEL.clone(scan=True, remat=True)
  logits, out = jax.jit(model.apply)(variables, **INPUTS)
  np.testing.assert_allclose(logits, whole[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
    out["text_logits"], whole[1]["text_logits"], rtol=1e-4, atol=1e-4
  )


def test_padding_hides_the_tokens_behind_it(variables, whole):
  other = {**INPUTS, "text_tokens": INPUTS["text_tokens"].copy()}
  other["text_tokens"][0, 3] = 5
  logits, _ = jax.jit(MODEL.apply)(variables, **other)
  np.testing.assert_array_equal(logits, whole[0])


def test_a_new_network_gives_every_token_the_same_probability(whole):
  @jax.jit
  def init_outputs():
    params = MODEL.init(jax.random.key(0), **INPUTS)["params"]
    return params["text_output"], params["image_output"]

  assert not any(np.any(leaf) for leaf in jax.tree.leaves(init_outputs()))
  assert np.any(whole[0])


def test_too_long_a_text_is_an_error(variables):
  longer = {k: np.concatenate([v, v], 1) for k, v in TEXT.items()}
  with pytest.raises(errors.UserError, match="at most 4 text tokens, not 8"):
    MODEL.apply(variables, **longer, method=MODEL.prefill)
