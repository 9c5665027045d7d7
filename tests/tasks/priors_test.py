"""What the two priors share."""

import jax
import numpy as np

from tests import random_variables
from unclip_jax.tasks import priors


def test_the_candidate_nearest_to_its_own_text_is_kept():
  candidates = random_variables.normal(3, 4, 8)
  # A long vector has a large dot product; directions are what counts.
  candidates[:, 0] *= 100
  text_embed = random_variables.normal(3, 8)
  output = priors.keep_nearest(candidates.reshape(12, 8), text_embed)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  scores = np.einsum("bnd,bd->bn", unit(candidates), unit(text_embed))
  best = scores.argmax(1)
  assert len(set(best)) > 1
  np.testing.assert_array_equal(
    output["image_embed"], candidates[np.arange(3), best]
  )
  np.testing.assert_allclose(output["text_embed"], unit(text_embed), rtol=1e-5)


def test_rows_are_captions_by_candidates_then_as_many_dropped_ones():
  def encode(text_embed):
    return text_embed * 10

  condition = {"text_embed": np.asarray([1.0, 2.0])}
  null = {"text_embed": np.asarray([-1.0])}
  plain = priors.encode_rows(encode, condition, None, 2)
  np.testing.assert_array_equal(plain, [10, 10, 20, 20])
  guided = priors.encode_rows(encode, condition, null, 2)
  np.testing.assert_array_equal(guided, [10, 10, 20, 20, *[-10] * 4])


def test_each_candidate_has_its_own_key():
  keys = jax.random.split(jax.random.key(0), 2)
  split = priors.candidate_rngs(keys, 3)
  data = np.asarray(jax.random.key_data(split))
  assert len(np.unique(data, axis=0)) == 6
  np.testing.assert_array_equal(
    jax.random.key_data(priors.candidate_rngs(keys[1:], 3)), data[3:]
  )
  one = jax.random.key(0)
  assert priors.candidate_rngs(one, 3) is one
  assert priors.candidate_rngs(None, 3) is None
