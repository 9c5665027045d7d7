"""Shapes, how they are drawn, and relations."""

import itertools

import numpy as np
import pytest

from unclip_jax.utils import scenes
from unclip_jax.utils.scenes import Object, Scene


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_shape_is_centred_and_within_its_radius(shape):
  rows, columns, covered = scenes.coverage(shape, 0.5, 0.5, 0.25, 400)
  assert covered.min() == 0 and covered.max() == 1
  places = (np.arange(400) + 0.5) / 100 - 2  # in radii
  y, x = places[rows][:, None], places[columns][None, :]
  assert abs((covered * x).sum() / covered.sum()) < 0.005
  assert abs((covered * y).sum() / covered.sum()) < 0.005
  farthest = np.sqrt((x**2 + y**2)[covered > 0].max())
  assert 0.89 < farthest < 1.01


def test_silhouettes_differ():
  """By a twelfth of what they cover, at the least, when small at 32 pixels."""
  masks = [
    scenes.coverage(s, 0.5, 0.5, scenes.SIZES["small"], 32)[2]
    for s in scenes.SHAPES
  ]
  for a, b in itertools.combinations(masks, 2):
    assert abs(a - b).sum() > (a.sum() + b.sum()) / 12


def test_a_shape_covers_as_much_at_every_size():
  for shape in scenes.SHAPES:
    areas = [
      scenes.coverage(shape, 0.51, 0.48, 0.2, S)[2].sum() / S**2
      for S in (32, 64, 256)
    ]
    np.testing.assert_allclose(areas, areas[-1], rtol=0.03)


def test_shapes_are_cut_at_the_edge():
  thing = Object("circle", "red", "large", 0.05, 1.2, 0.2)
  far = Object("square", "blue", "large", -2.0, 0.5, 0.2)
  picture = scenes.render(Scene((thing, far), "white"), 32)
  assert picture.shape == (32, 32, 3)
  assert (picture != 255).any(axis=-1).sum() < 20


def test_edges_are_mixtures():
  thing = Object("circle", "red", "large", 0.5, 0.5, 0.2)
  picture = scenes.render(Scene((thing,), "black"), 64).astype(float)
  np.testing.assert_array_equal(picture[32, 32], scenes.COLOURS["red"])
  np.testing.assert_array_equal(picture[0, 0], scenes.BACKGROUNDS["black"])
  mean = picture[..., 0].mean()
  part = np.pi * 0.18**2
  assert mean == pytest.approx(214 * part + 16 * (1 - part), rel=0.01)


def test_one_relation_holds_and_its_converse_the_other_way():
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(500):
    a, b = (
      Object(
        ("ring", "heart")[rng.integers(2)], "red", size, *rng.random(2), radius
      )
      for size, radius in (("small", 0.1), ("large", 0.4))
    )
    seen.add(scenes.relation(a, b))
    assert scenes.relation(b, a) == scenes.CONVERSE[scenes.relation(a, b)]
  assert seen == set(scenes.CONVERSE) - {"around"}
