"""The causal transformer over a picture: causality, and its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import completion
from unclip_jax.utils import errors

B, P, V, D = 2, 9, 7, 12
SIZES = dict(image_size=6, patch_size=2, width=16, depth=2, num_heads=2)
INPUTS = {
  "token": np.random.default_rng(0).integers(0, V, (B, P), np.int32),
  "pixel": random_variables.normal(B, P, D),
}


@pytest.fixture(name="case", scope="module", params=INPUTS)
def _case(request):
  num_codes = V if request.param == "token" else None
  model = completion.Model(**SIZES, num_codes=num_codes)
  x = INPUTS[request.param]
  return model, random_variables.like(model.init, x), x


def test_causality_by_gradient(case):
  """Part j moves the prediction of part i where j < i, and nowhere else."""
  model, variables, x = case
  params = variables["params"]
  if model.num_codes is None:
    own, table = params, None
  else:
    # One row of the embedding table per position, so that each has a gradient.
    model = model.clone(num_codes=P)
    table = random_variables.normal(P, 16)
    own = {k: v for k, v in params.items() if k != "code_embed"}
    own["output"] = jax.tree.map(
      lambda a: np.resize(a, (*a.shape[:-1], P)), own["output"]
    )
    x = np.tile(np.arange(P, dtype=np.int32), (B, 1))

  @jax.jit
  @jax.jacrev
  def jacobian(given):
    if table is None:
      output, _ = model.apply({"params": own}, jnp.tile(given, (B, 1, 1)))
    else:
      params = {**own, "code_embed": {"embedding": given}}
      output, _ = model.apply({"params": params}, x)
    return (output[0] * random_variables.normal(output.shape[-1])).sum(-1)

  given = INPUTS["pixel"][0] if table is None else table
  depends = np.any(jacobian(given) != 0, axis=-1)
  np.testing.assert_array_equal(depends, np.tri(P, k=-1, dtype=bool))


def test_prefill_and_decode_steps_equal_the_whole(case):
  model, variables, x = case
  whole, out = jax.jit(model.apply)(variables, x)
  assert whole.shape == (B, P, model.num_codes or D)
  assert out["encodings"].shape == (B, P, 16)

  @jax.jit
  def first(variables):
    return model.apply(variables, B, method=model.prefill)

  @jax.jit
  def step(variables, part, i, cache):
    return model.apply(variables, part, i, cache, method=model.decode_step)

  prediction, cache = first(variables)
  # What is not yet filled does not matter.
  cache = jax.tree.map(lambda a: a.at[:, :, 1:].set(9.0), cache)
  steps = [prediction]
  for i in range(P - 1):
    prediction, cache = step(variables, x[:, i], jnp.int32(i), cache)
    steps.append(prediction)
  np.testing.assert_allclose(np.stack(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_wrong_size_is_an_error():
  model = completion.Model(**{**SIZES, "image_size": 7}, num_codes=V)
  with pytest.raises(errors.UserError, match="7 is not a multiple of"):
    jax.eval_shape(model.init, jax.random.key(0), INPUTS["token"])
