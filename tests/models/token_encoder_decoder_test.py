"""The encoder-decoder in both directions: causality, the cache, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import token_encoder_decoder
from unclip_jax.utils import errors

L, S, K, V, TEXT_V = 4, 2, 4, 5, 6
MODELS = {
  direction: token_encoder_decoder.Model(
    vocab_size=TEXT_V, context_length=L, num_codes=V, grid_size=S,
    image_size=4, width=8, encoder_depth=1, depth=2, num_heads=2,
    direction=direction,
  )
  for direction in token_encoder_decoder.DIRECTIONS
}  # fmt: skip
INPUTS = {
  "text_tokens": np.asarray([[2, 4, 3, 0], [2, 5, 4, 3]], np.int32),
  "text_mask": np.asarray([[1, 1, 1, 0], [1, 1, 1, 1]], bool),
  "image_tokens": np.asarray([[0, 4, 2, 1], [3, 3, 0, 2]], np.int32),
}


@pytest.fixture(
  name="ready", scope="module", params=token_encoder_decoder.DIRECTIONS
)
def _ready(request):
  """(model, variables, logits, out)."""
  model = MODELS[request.param]
  variables = random_variables.like(model.init, **INPUTS)
  return model, variables, *jax.jit(model.apply)(variables, **INPUTS)


def test_prefill_and_decode_steps_equal_the_whole(ready):
  model, variables, whole, _ = ready
  if model.direction == "text_to_image":
    args = (INPUTS["text_tokens"], INPUTS["text_mask"])
    tokens, prefill = INPUTS["image_tokens"], model.prefill
  else:
    args = (INPUTS["image_tokens"], INPUTS["text_tokens"][:, 0])
    tokens, prefill = INPUTS["text_tokens"][:, 1:], model.prefill_text
  step = jax.jit(lambda v, *a: model.apply(v, *a, method=model.decode_step))
  logits, cache = jax.jit(lambda v, *a: model.apply(v, *a, method=prefill))(
    variables, *args
  )
  steps = [logits]
  for i in range(tokens.shape[1] - 1):
    logits, cache = step(variables, tokens[:, i], jnp.int32(i), cache)
    steps.append(logits)
  assert np.stack(steps, 1).shape == whole.shape
  np.testing.assert_allclose(np.stack(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_causality_by_gradient(ready):
  """Tokens of the target move later logits only."""
  model, variables, whole, out = ready
  params = variables["params"]
  # One position a token: its embedding is that position's alone.
  table = "code" if model.direction == "text_to_image" else "token"
  length = whole.shape[1]
  inputs = {k: v[:1] for k, v in INPUTS.items()}
  target = np.arange(length + (table == "token"), dtype=np.int32)[None]
  key = "image_tokens" if table == "code" else "text_tokens"
  source = out["context"][:1]
  assert source.shape[1] == (L if table == "code" else K)

  @jax.jit
  @jax.jacobian
  def jacobian(embedding):
    embed = {**params["embed"], table: {"embedding": embedding}}
    logits, _ = model.apply(
      {"params": {**params, "embed": embed}}, **{**inputs, key: target}
    )
    return (logits[0] * random_variables.normal(logits.shape[-1])).sum(-1)

  depends = np.abs(jacobian(params["embed"][table]["embedding"])).sum(-1) > 0
  k = -1 if table == "code" else 0  # text i + 1 is predicted at text i
  expected = np.tri(length, target.shape[1], k=k, dtype=bool)
  np.testing.assert_array_equal(depends[:, : target.shape[1]], expected)


def test_every_logit_depends_on_every_position_of_the_source(ready):
  model, variables, whole, _ = ready
  name = (
    "text_encoder" if model.direction == "text_to_image" else "image_encoder"
  )
  source = "text_tokens" if name == "text_encoder" else "image_tokens"
  apply = jax.jit(model.apply)
  for position in range(INPUTS[source].shape[1]):
    other = {**INPUTS, source: INPUTS[source].copy()}
    other[source][:, position] = (other[source][:, position] + 1) % V
    changed = np.abs(apply(variables, **other)[0] - whole).max(-1) > 0
    if source == "text_tokens":  # row 0 has padding there, which hides it
      assert changed[0].all() == (position < 3)
      changed = changed[1:]
    assert changed.all(), position


def test_a_new_network_gives_every_token_the_same_probability(ready):
  model, _, whole, _ = ready

  @jax.jit
  def init_output():
    return model.init(jax.random.key(0), **INPUTS)["params"]["output"]

  assert not any(np.any(leaf) for leaf in init_output().values())
  assert np.any(whole)


def test_an_unknown_direction_is_an_error():
  model = MODELS["text_to_image"].clone(direction="sideways")
  with pytest.raises(errors.UserError, match="'sideways'"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), **INPUTS))
