"""The prior: what depends on what, and that the cache changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import prior
from unclip_jax.utils import errors

MODEL = prior.Model(
  embed_dim=6, text_width=10, context_length=5, width=16, depth=2, num_heads=2
)
TOKEN_MODEL = MODEL.clone(text_width=None, vocab_size=20)
KEEP = np.zeros(3, bool)
DROP = np.asarray([False, True, False])
INPUTS = {
  "x_t": random_variables.normal(3, 6),
  "timesteps": np.asarray([0, 500, 999], np.int32),
  "text_embed": random_variables.normal(3, 6)[::-1].copy(),
  "text_encodings": random_variables.normal(3, 5, 10),
  "text_mask": np.asarray([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5], bool),
}
STEP = ("x_t", "timesteps")
TEXT = ("text_embed", "text_encodings", "text_mask")


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(MODEL.init, **INPUTS)


@pytest.fixture(name="token_inputs", scope="module")
def _token_inputs():
  inputs = {k: v for k, v in INPUTS.items() if k != "text_encodings"}
  tokens = np.random.default_rng(0).integers(1, 20, (3, 5), np.int32)
  return {**inputs, "text_tokens": tokens}


@functools.partial(jax.jit, static_argnames="model")
def _apply(variables, inputs, text_drop=None, model=MODEL):
  return model.apply(variables, **inputs, text_drop=text_drop)


@functools.partial(jax.jit, static_argnames="model")
def _prefill(variables, text, text_drop=None, model=MODEL):
  return model.apply(
    variables, **text, text_drop=text_drop, method=model.prefill
  )


@functools.partial(jax.jit, static_argnames="model")
def _denoise(variables, step, cache, model=MODEL):
  return model.apply(variables, **step, cache=cache, method=model.denoise)


def _pick(names):
  return {name: INPUTS[name] for name in names}


@jax.jit
def _weighted_gradients(variables, output_weight, encodings_weight, text_drop):
  """Of a weighted sum, by the float inputs and by the parameters."""
  floats = ("x_t", "text_embed", "text_encodings")

  def total(inputs, variables):
    output, out = _apply(variables, {**INPUTS, **inputs}, text_drop)
    encodings = (out["encodings"] * encodings_weight).sum()
    return (output * output_weight).sum() + encodings

  inputs, variables = jax.grad(total, argnums=(0, 1))(_pick(floats), variables)
  return inputs, variables["params"]


def _output_gradients(variables, text_drop=KEEP):
  weight = random_variables.normal(3, 6)
  return _weighted_gradients(
    variables, weight, np.zeros((3, 9, 16), np.float32), text_drop
  )


def _encodings_gradients(variables, row, position):
  weight = np.zeros((3, 9, 16), np.float32)
  weight[row, position] = random_variables.normal(16)
  gradients, _ = _weighted_gradients(
    variables, np.zeros((3, 6), np.float32), weight, KEEP
  )
  return gradients


@pytest.mark.parametrize(
  ("length", "size", "depth", "expected"),
  # Karlo stores a mean and a standard deviation where we have null embeddings.
  [(77, 768, 20, 1_022_030_080), (256, 1024, 24, 1_225_927_680)],
)
def test_parameters_of_karlo_and_the_paper(length, size, depth, expected):
  model = prior.Model(size, size, length, width=2048, depth=depth, num_heads=32)
  embed = jnp.zeros((1, size))
  count = random_variables.count(
    model.init,
    embed,
    jnp.zeros(1, jnp.int32),
    embed,
    jnp.zeros((1, length, size)),
    jnp.ones((1, length), bool),
  )
  assert count == expected


def test_outputs(variables):
  output, out = _apply(variables, INPUTS)
  assert output.shape == (3, 6) and output.dtype == jnp.float32
  assert out["encodings"].shape == (3, 5 + 4, 16)


def test_new_prior_predicts_zero(variables):
  @jax.jit
  def init_output():  # only this layer, or it compiles for long
    return MODEL.init(jax.random.key(0), **INPUTS)["params"]["output"]

  variables = {"params": {**variables["params"], "output": init_output()}}
  output, out = _apply(variables, INPUTS)
  np.testing.assert_array_equal(output, 0)
  assert np.all(out["encodings"] != 0)


def test_output_depends_on_everything_real_and_on_no_padding(variables):
  gradients, _ = _output_gradients(variables)
  assert np.all(gradients["x_t"] != 0)
  assert np.all(gradients["text_embed"] != 0)
  by_position = np.abs(gradients["text_encodings"]).sum(-1)
  np.testing.assert_array_equal(by_position > 0, INPUTS["text_mask"])


def test_output_depends_on_the_timestep(variables):
  output, _ = _apply(variables, INPUTS)
  later = {**INPUTS, "timesteps": INPUTS["timesteps"] // 2 + 1}
  difference = np.abs(_apply(variables, later)[0] - output)
  assert np.all(difference.max(-1) > 1e-3)


def test_every_position_has_its_own_embedding(variables):
  _, gradients = _output_gradients(variables)
  assert np.all(np.any(gradients["position"], axis=-1))


@pytest.mark.parametrize(
  ("position", "depends_on"),
  [
    (4, {"text_encodings"}),
    (5, {"text_encodings", "text_embed"}),
    (6, {"text_encodings", "text_embed"}),  # the timestep
    (7, {"text_encodings", "text_embed", "x_t"}),
    (8, {"text_encodings", "text_embed", "x_t"}),  # the query
  ],
)
def test_causality(variables, position, depends_on):
  gradients = _encodings_gradients(variables, slice(None), position)
  assert {k for k, v in gradients.items() if np.any(v)} == depends_on


def test_text_states_depend_on_no_later_text_state(variables):
  gradients = _encodings_gradients(variables, 2, 2)
  by_position = np.abs(gradients["text_encodings"][2]).sum(-1)
  np.testing.assert_array_equal(by_position > 0, [1, 1, 1, 0, 0])


@pytest.mark.parametrize("text_drop", [None, DROP])
def test_prefill_and_denoise_equal_the_whole(variables, text_drop):
  output, _ = _apply(variables, INPUTS, text_drop)
  cache = _prefill(variables, _pick(TEXT), text_drop)
  cached = _denoise(variables, _pick(STEP), cache)
  np.testing.assert_allclose(cached, output, rtol=1e-5, atol=1e-5)


def test_one_cache_serves_all_timesteps(variables):
  cache = _prefill(variables, _pick(TEXT))
  step = {
    "x_t": INPUTS["x_t"][::-1].copy(),
    "timesteps": np.asarray([3, 7, 400], np.int32),
  }
  output, _ = _apply(variables, {**_pick(TEXT), **step})
  cached = _denoise(variables, step, cache)
  np.testing.assert_allclose(cached, output, rtol=1e-5, atol=1e-5)


def test_denoise_runs_three_positions(variables):
  cache = _prefill(variables, _pick(TEXT))
  program = _denoise.trace(variables, _pick(STEP), cache)
  assert "f32[3,3,16]" in str(program.jaxpr)
  # 3 examples of 9 positions would be the whole sequence.
  assert "f32[3,9,16]" not in str(program.jaxpr)


def test_dropped_text_has_zero_gradient_and_null_does_not(variables):
  gradients, null = _output_gradients(variables, DROP)
  for name in ("text_embed", "text_encodings"):
    assert not np.any(gradients[name][DROP])
    assert np.all(gradients[name][~DROP].reshape(2, -1).any(-1))
  assert np.all(gradients["x_t"] != 0)
  assert np.any(null["null_text_encodings"]) and np.any(null["null_text_embed"])


def test_dropped_text_does_not_depend_on_its_length(variables):
  longer = {**INPUTS, "text_mask": np.ones_like(INPUTS["text_mask"])}
  drop = np.ones(3, bool)
  np.testing.assert_array_equal(
    _apply(variables, INPUTS, drop)[0], _apply(variables, longer, drop)[0]
  )


def test_bfloat16_is_close_to_float32(variables):
  model = dataclasses.replace(MODEL, dtype="bfloat16", remat="dots", scan=True)
  exact, _ = _apply(variables, INPUTS)
  rounded, out = _apply(variables, INPUTS, model=model)
  assert out["encodings"].dtype == jnp.bfloat16
  assert rounded.dtype == jnp.float32
  error = np.linalg.norm(rounded - exact)
  assert 0 < error < 0.03 * np.linalg.norm(exact)


def test_a_scanned_stack_changes_nothing(variables):
  traced = _apply.trace(variables, INPUTS, DROP, MODEL.clone(scan=True))
  assert " scan[" in str(traced.jaxpr)
  scanned, _ = traced.lower().compile()(variables, INPUTS, DROP)
  output, _ = _apply(variables, INPUTS, DROP)
  np.testing.assert_allclose(scanned, output, rtol=1e-5, atol=1e-5)


def test_another_context_length_is_an_error():
  short = {
    **INPUTS,
    "text_encodings": INPUTS["text_encodings"][:, :4],
    "text_mask": INPUTS["text_mask"][:, :4],
  }
  with pytest.raises(errors.UserError, match="5 text states, not 4"):
    jax.eval_shape(functools.partial(MODEL.init, jax.random.key(0), **short))


def test_a_prior_that_encodes_the_caption_itself(token_inputs):
  variables = random_variables.like(TOKEN_MODEL.init, **token_inputs)
  assert "text_encodings_proj" not in variables["params"]
  output, _ = _apply(variables, token_inputs, DROP, TOKEN_MODEL)
  # The cache has all of the text; `_denoise` sees no token.
  text = {k: v for k, v in token_inputs.items() if k not in STEP}
  cache = _prefill(variables, text, DROP, TOKEN_MODEL)
  cached = _denoise(variables, _pick(STEP), cache, TOKEN_MODEL)
  np.testing.assert_allclose(cached, output, rtol=1e-5, atol=1e-5)

  tokens = token_inputs["text_tokens"]
  changes = {
    "padding": np.where(INPUTS["text_mask"], tokens, 19),
    "dropped": np.where(DROP[:, None], 19, tokens),
    "real": np.where(INPUTS["text_mask"], 19, tokens),
  }
  difference = {
    name: np.abs(
      _apply(variables, {**token_inputs, "text_tokens": x}, DROP, TOKEN_MODEL)[
        0
      ]
      - output
    ).max(-1)
    for name, x in changes.items()
  }
  assert not np.any(difference["padding"]) and not np.any(difference["dropped"])
  np.testing.assert_array_equal(difference["real"] > 1e-3, ~DROP)


def test_a_prior_takes_states_or_tokens(token_inputs):
  def init(model, inputs):
    jax.eval_shape(functools.partial(model.init, jax.random.key(0), **inputs))

  for model in (MODEL.clone(vocab_size=20), MODEL.clone(text_width=None)):
    with pytest.raises(errors.UserError, match="either text_width"):
      init(model, INPUTS)
  with pytest.raises(errors.UserError, match="conditioned on text_encodings"):
    init(MODEL, token_inputs)
  with pytest.raises(errors.UserError, match="conditioned on text_tokens"):
    init(TOKEN_MODEL, INPUTS)
