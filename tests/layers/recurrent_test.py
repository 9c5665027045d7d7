"""The recurrent text encoder: padding, order, and what its cells compute."""

import jax
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import recurrent
from unclip_jax.utils import errors

V, L, D = 11, 6, 5
TOKENS = np.random.default_rng(0).integers(1, V, (3, L), np.int32)
MASK = np.arange(L) < np.asarray([[6], [3], [1]])


def _encoder(cell):
  return recurrent.TextEncoder(V, L, word_width=4, width=D, cell=cell)


@pytest.fixture(name="cell", scope="module", params=["lstm", "gru"])
def _cell(request):
  encoder = _encoder(request.param)
  variables = random_variables.like(encoder.init, TOKENS, MASK)
  variables["params"]["token_embed"]["embedding"] *= 3
  return request.param, jax.jit(encoder.apply), variables


def test_padding_does_not_change_the_state(cell):
  _, apply, variables = cell
  states, last = apply(variables, TOKENS, MASK)
  assert states.shape == (3, L, D) and last.shape == (3, D)
  other = np.where(MASK, TOKENS, V - TOKENS)
  np.testing.assert_array_equal(apply(variables, other, MASK)[1], last)
  for row, length in enumerate(MASK.sum(1)):
    np.testing.assert_array_equal(last[row], states[row, length - 1])
    one = slice(row, row + 1)
    alone = apply(variables, TOKENS[one, :length], MASK[one, :length])[1]
    np.testing.assert_allclose(alone[0], last[row], rtol=1e-5, atol=1e-6)
  # Each real token does.
  for i in range(3):
    changed = TOKENS.copy()
    changed[1, i] = (changed[1, i] + 1) % V
    assert np.abs(apply(variables, changed, MASK)[1] - last)[1].max() > 1e-4


def test_states_see_what_is_before_them(cell):
  _, apply, variables = cell
  changed = TOKENS.copy()
  changed[:, 3] = (changed[:, 3] + 1) % V
  moved = np.abs(
    apply(variables, changed, MASK)[0] - apply(variables, TOKENS, MASK)[0]
  )
  np.testing.assert_array_equal(moved[0].max(-1) > 0, np.arange(L) >= 3)


def test_cells_are_the_published_ones(cell):
  """The equations in numpy, gate by gate."""
  name, apply, variables = cell
  params = variables["params"]
  words = params["token_embed"]["embedding"][TOKENS]
  gates = params["rnn"]

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  def of(gate, x):
    p = gates[gate]
    return x @ p["kernel"] + p.get("bias", 0.0)

  h = c = np.zeros((3, D))
  states = []
  for i in range(L):
    x = words[:, i]
    if name == "lstm":
      i_, f, o = (sigmoid(of("i" + g, x) + of("h" + g, h)) for g in "ifo")
      c = f * c + i_ * np.tanh(of("ig", x) + of("hg", h))
      h = o * np.tanh(c)
    else:
      r, z = (sigmoid(of("i" + g, x) + of("h" + g, h)) for g in "rz")
      h = (1 - z) * np.tanh(of("in", x) + r * of("hn", h)) + z * h
    states.append(h)
  np.testing.assert_allclose(
    apply(variables, TOKENS, MASK)[0], np.stack(states, 1), rtol=1e-4, atol=1e-5
  )


def test_a_wrong_cell_and_a_long_text_are_errors():
  with pytest.raises(errors.UserError, match="cell 'rnn': use one of lstm"):
    _encoder("rnn").init(jax.random.key(0), TOKENS, MASK)
  encoder = _encoder("gru").clone(context_length=L - 1)
  with pytest.raises(errors.UserError, match="at most 5 tokens, not 6"):
    encoder.init(jax.random.key(0), TOKENS, MASK)
