"""Standardised embeddings: moments, inverses, and the published kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.utils import embedding_space


@pytest.fixture
def embeds():
  rng = np.random.default_rng(0)
  return jnp.asarray(3 + 5 * rng.normal(size=(2000, 8)), jnp.float32)


def test_mean_std_gives_zero_mean_and_unit_variance(embeds):
  table = embedding_space.fit("mean_std", embeds)
  x = embedding_space.encode(table, embeds)
  np.testing.assert_allclose(x.mean(0), 0, atol=1e-4)
  np.testing.assert_allclose(x.std(0), 1, atol=1e-4)
  np.testing.assert_allclose(
    embedding_space.decode(table, x), embeds, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  "kind, norm", [("unit_sqrt_d", 8**0.5), ("scaled", 17.2)]
)
def test_unit_kinds_have_one_length_and_decode_to_unit_vectors(
  embeds, kind, norm
):
  table = embedding_space.fit(kind, embeds)
  x = embedding_space.encode(table, embeds)
  np.testing.assert_allclose(jnp.linalg.norm(x, axis=1), norm, rtol=1e-5)
  back = embedding_space.decode(table, x)
  np.testing.assert_allclose(jnp.linalg.norm(back, axis=1), 1, rtol=1e-5)
  cosine = jnp.sum(back * embeds, 1) / jnp.linalg.norm(embeds, axis=1)
  np.testing.assert_allclose(cosine, 1, rtol=1e-5)


def test_a_coordinate_that_never_varies_stays_finite():
  table = embedding_space.fit("mean_std", jnp.ones((4, 2)))
  assert np.isfinite(embedding_space.encode(table, jnp.ones((1, 2)))).all()


@pytest.mark.parametrize("kind", embedding_space.KINDS)
def test_tables_are_traceable_arrays_of_one_structure(embeds, kind):
  shapes = jax.eval_shape(lambda x: embedding_space.fit(kind, x), embeds)
  other = embedding_space.fit("mean_std", embeds)
  assert jax.tree.structure(shapes) == jax.tree.structure(other)
  assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
    lambda x: x.shape, other
  )


def test_an_unknown_kind_is_an_error(embeds):
  with pytest.raises(ValueError, match="whiten"):
    embedding_space.fit("whiten", embeds)
