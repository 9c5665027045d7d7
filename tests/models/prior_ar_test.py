"""The AR prior: what depends on what, and that the cache changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import prior_ar
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

L, K, V, DOTS, WIDTH = 5, 4, 7, 3, 16
MODEL = prior_ar.Model(
  embed_dim=6, text_width=10, context_length=L, num_codes=K, num_buckets=V,
  num_dot_buckets=DOTS, encoder_width=12, encoder_depth=2, encoder_num_heads=2,
  width=WIDTH, depth=2, num_heads=2,
)  # fmt: skip
KEEP = np.zeros(3, bool)
DROP = np.asarray([False, True, False])
INPUTS = {
  "codes": np.random.default_rng(0).integers(0, V, (3, K), np.int32),
  "dot_bucket": np.asarray([0, 1, 2], np.int32),
  "text_embed": random_variables.normal(3, 6),
  "text_encodings": random_variables.normal(3, L, 10),
  "text_mask": np.asarray([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5], bool),
}
TEXT = ("text_embed", "text_encodings", "text_mask")


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(MODEL.init, **INPUTS)


@functools.partial(jax.jit, static_argnames="model")
def _apply(variables, inputs, text_drop=None, model=MODEL):
  return model.apply(variables, **inputs, text_drop=text_drop)


@jax.jit
def _prefill(variables, text, dot_bucket, text_drop=None):
  text = MODEL.apply(
    variables, **text, text_drop=text_drop, method=MODEL.encode_text
  )
  return MODEL.apply(variables, text, dot_bucket, method=MODEL.prefill)


@jax.jit
def _decode_step(variables, codes, index, cache):
  return MODEL.apply(variables, codes, index, cache, method=MODEL.decode_step)


def _text():
  return {name: INPUTS[name] for name in TEXT}


@pytest.mark.parametrize("text_drop", [None, DROP])
def test_prefill_and_decode_steps_equal_the_whole(variables, text_drop):
  whole, _ = _apply(variables, INPUTS, text_drop)
  dot_bucket = INPUTS["dot_bucket"]
  if text_drop is not None:
    dot_bucket = np.where(text_drop, DOTS, dot_bucket)
  logits, cache = _prefill(variables, _text(), dot_bucket, text_drop)
  shapes = jax.tree.map(jnp.shape, cache)
  steps = [logits]
  for i in range(K - 1):
    codes = INPUTS["codes"][:, i]
    logits, cache = _decode_step(variables, codes, jnp.int32(i), cache)
    steps.append(logits)
  assert jax.tree.map(jnp.shape, cache) == shapes
  np.testing.assert_allclose(np.stack(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_decode_step_runs_one_position(variables):
  _, cache = _prefill(variables, _text(), INPUTS["dot_bucket"])
  program = _decode_step.trace(
    variables, INPUTS["codes"][:, 0], jnp.int32(0), cache
  )
  text = str(program.jaxpr)
  assert f"f32[3,1,{WIDTH}]" in text and "dynamic_update_slice" in text
  for length in (K + 1, L + K + 1):  # of the sequence, and with the text
    assert f"f32[3,{length},{WIDTH}]" not in text


def test_a_cache_that_is_not_yet_filled_does_not_matter(variables):
  _, cache = _prefill(variables, _text(), INPUTS["dot_bucket"])
  filled = L + prior_ar._NUM_GIVEN_POSITIONS
  dirty = cache._replace(
    layers=jax.tree.map(lambda x: x.at[:, :, filled:].set(9.0), cache.layers)
  )
  codes = INPUTS["codes"][:, 0]
  a, b = (
    _decode_step(variables, codes, jnp.int32(0), x)[0] for x in (cache, dirty)
  )
  np.testing.assert_array_equal(a, b)


def test_causality_by_gradient(variables):
  """Code j moves the logits of code i where j < i, and nowhere else."""
  table = np.asarray(variables["params"]["code_embed"]["embedding"])

  # One row of the embedding table per position, so that each has a gradient.
  model = dataclasses.replace(MODEL, num_buckets=K)
  own = {**variables["params"], "code_embed": {"embedding": table[:K]}}
  own["output"] = jax.tree.map(lambda x: x[..., :K], own["output"])
  inputs = {**INPUTS, "codes": np.tile(np.arange(K, dtype=np.int32), (3, 1))}

  @jax.jit
  @jax.jacobian
  def jacobian(embedding):
    params = {**own, "code_embed": {"embedding": embedding}}
    logits, _ = _apply({"params": params}, inputs, model=model)
    return (logits * random_variables.normal(K)).sum((0, 2))

  depends = np.abs(jacobian(table[:K])).sum(-1) > 0
  np.testing.assert_array_equal(depends, np.tri(K, k=-1, dtype=bool))


@jax.jit
def _gradients(variables, weights, text_drop):
  """Of the weighted logits of each code, by text and by parameters."""

  def total(text, variables):
    logits, _ = _apply(variables, {**INPUTS, **text}, text_drop)
    return jnp.einsum("bkv,k,v->", logits, weights, random_variables.normal(V))

  floats = {name: INPUTS[name] for name in TEXT[:2]}
  return jax.grad(total, argnums=(0, 1))(floats, variables)


def test_every_code_depends_on_all_real_text_and_on_no_padding(variables):
  for i in range(K):
    weights = np.eye(K, dtype=np.float32)[i]
    gradients, parameters = _gradients(variables, weights, KEEP)
    assert np.all(gradients["text_embed"] != 0)
    by_position = np.abs(gradients["text_encodings"]).sum(-1)
    np.testing.assert_array_equal(by_position > 0, INPUTS["text_mask"])
    dots = np.abs(parameters["params"]["dot_embed"]["embedding"]).sum(-1)
    np.testing.assert_array_equal(dots > 0, [True] * DOTS + [False])


def test_every_position_has_its_own_embedding(variables):
  _, parameters = _gradients(variables, np.ones(K, np.float32), KEEP)
  for name in ("position", "encoder_position"):
    assert np.all(np.any(parameters["params"][name], axis=-1)), name


def test_dropped_text_has_zero_gradient_and_null_does_not(variables):
  gradients, parameters = _gradients(variables, np.ones(K, np.float32), DROP)
  for name in ("text_embed", "text_encodings"):
    assert not np.any(gradients[name][DROP])
    assert np.all(gradients[name][~DROP].reshape(2, -1).any(-1))
  null = parameters["params"]
  assert np.any(null["null_text_encodings"]) and np.any(null["null_text_embed"])
  # The dropped row's dot product is replaced by the last one.
  dots = np.abs(null["dot_embed"]["embedding"]).sum(-1) > 0
  np.testing.assert_array_equal(dots, [True, False, True, True])


def test_dropped_text_does_not_depend_on_its_length(variables):
  longer = {**INPUTS, "text_mask": np.ones_like(INPUTS["text_mask"])}
  drop = np.ones(3, bool)
  np.testing.assert_array_equal(
    _apply(variables, INPUTS, drop)[0], _apply(variables, longer, drop)[0]
  )


def test_new_prior_gives_every_bucket_the_same_probability(variables):
  @jax.jit
  def init_output():
    return MODEL.init(jax.random.key(0), **INPUTS)["params"]["output"]

  new = {"params": {**variables["params"], "output": init_output()}}
  logits, out = _apply(new, INPUTS)
  assert logits.shape == (3, K, V) and logits.dtype == jnp.float32
  np.testing.assert_array_equal(logits, 0)
  assert out["encodings"].shape == (3, K + 1, WIDTH)
  assert out["text_encodings"].shape == (3, L, 12)


def test_bfloat16_is_close_to_float32(variables):
  model = dataclasses.replace(MODEL, dtype="bfloat16", remat="dots", scan=True)
  exact, _ = _apply(variables, INPUTS)
  rounded, out = _apply(variables, INPUTS, model=model)
  assert out["encodings"].dtype == jnp.bfloat16
  assert rounded.dtype == jnp.float32
  error = np.linalg.norm(rounded - exact)
  assert 0 < error < 0.03 * np.linalg.norm(exact)


def test_scanned_stacks_change_nothing(variables):
  traced = _apply.trace(variables, INPUTS, DROP, MODEL.clone(scan=True))
  assert str(traced.jaxpr).count(" scan[") == 2
  scanned, _ = traced.lower().compile()(variables, INPUTS, DROP)
  logits, _ = _apply(variables, INPUTS, DROP)
  np.testing.assert_allclose(scanned, logits, rtol=1e-5, atol=1e-5)


def test_parameters_of_the_paper():
  config = config_lib.load("configs/paper/prior_ar.py")
  model = config_lib.instantiate(config.model_name, "Model", config.model)
  variables = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0),
      jnp.zeros((1, 319), jnp.int32),
      jnp.zeros(1, jnp.int32),
      jnp.zeros((1, 1024)),
      text_tokens=jnp.zeros((1, 256), jnp.int32),
    )
  )
  counts = {"encoder": 0, "decoder": 0}
  of_encoder = ("encoder_", "null_text_encodings")
  for name, leaves in variables["params"].items():
    part = "encoder" if name.startswith(of_encoder) else "decoder"
    counts[part] += sum(x.size for x in jax.tree.leaves(leaves))
  # As in the config's docstring.
  assert counts == {"encoder": 1_310_316_544, "decoder": 967_305_216}


def test_another_context_length_is_an_error():
  short = {
    **INPUTS,
    "text_encodings": INPUTS["text_encodings"][:, :4],
    "text_mask": INPUTS["text_mask"][:, :4],
  }
  with pytest.raises(errors.UserError, match="5 text states, not 4"):
    jax.eval_shape(functools.partial(MODEL.init, jax.random.key(0), **short))


def test_tokens_take_the_place_of_text_states():
  model = dataclasses.replace(MODEL, text_width=None, vocab_size=9)
  given = {k: v for k, v in INPUTS.items() if k != "text_encodings"}
  tokens = jnp.asarray(np.arange(3 * L).reshape(3, L) % 9)
  shapes = jax.eval_shape(
    functools.partial(model.init, jax.random.key(0)),
    **given,
    text_tokens=tokens,
  )
  variables = random_variables.like_tree(shapes)
  embedded = variables["params"]["encoder_token_embed"]["embedding"][tokens]
  by_states = dataclasses.replace(MODEL, text_width=embedded.shape[-1])
  params = dict(variables["params"])
  del params["encoder_token_embed"]
  width = embedded.shape[-1]
  params["text_encodings_proj"] = {
    "kernel": jnp.eye(width),
    "bias": jnp.zeros(width),
  }
  logits, _ = model.apply(variables, **given, text_tokens=tokens)
  expected, _ = by_states.apply(
    {"params": params}, **given, text_encodings=embedded
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(errors.UserError, match="text_tokens: pass it"):
    model.apply(variables, **INPUTS)
  both = dataclasses.replace(MODEL, vocab_size=9)
  with pytest.raises(errors.UserError, match="either text_width"):
    both.init(jax.random.key(0), **INPUTS)
