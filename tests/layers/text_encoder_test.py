"""GLIDE's text encoder: what depends on what."""

import jax
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import text_encoder
from unclip_jax.utils import errors

ENCODER = text_encoder.TextEncoder(
  vocab_size=20, context_length=6, width=12, depth=2, num_heads=2
)
TOKENS = np.asarray([[1, 5, 2, 0, 0], [1, 6, 7, 8, 2]], np.int32)
MASK = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
VARIABLES = random_variables.like(ENCODER.init, TOKENS, MASK)


@jax.jit
def encode(tokens, mask, variables=VARIABLES):
  return ENCODER.apply(variables, tokens, mask)


def test_every_state_depends_on_every_token_and_on_no_id_of_padding():
  states = encode(TOKENS, MASK)
  assert states.shape == (2, 5, 12)
  for position in range(5):
    other = TOKENS.copy()
    other[:, position] = 9
    changed = np.abs(encode(other, MASK) - states).max(-1) > 1e-4
    assert np.all(changed == MASK[:, position : position + 1])


def test_padding_has_an_embedding_of_its_own_at_every_position():
  gradients = jax.grad(
    lambda variables: (
      encode(TOKENS, MASK, variables) * random_variables.normal(2, 5, 12)
    ).sum()
  )(VARIABLES)["params"]
  used = {
    name: np.any(gradients[name], axis=-1) for name in ("padding", "position")
  }
  np.testing.assert_array_equal(used["padding"], [0, 0, 0, 1, 1, 0])
  np.testing.assert_array_equal(used["position"], [1, 1, 1, 1, 1, 0])


def test_a_scanned_stack_changes_nothing():
  scanned = jax.jit(ENCODER.clone(scan=True).apply).trace(
    VARIABLES, TOKENS, MASK
  )
  assert " scan[" in str(scanned.jaxpr)
  np.testing.assert_allclose(
    scanned.lower().compile()(VARIABLES, TOKENS, MASK),
    encode(TOKENS, MASK),
    rtol=1e-5,
    atol=1e-5,
  )


def test_a_caption_that_is_too_long_is_refused():
  long = np.ones((1, 7), np.int32)
  with pytest.raises(errors.UserError, match="at most 6 tokens, not 7"):
    ENCODER.apply(VARIABLES, long, long > 0)
