"""Reading scenes back, and what each score asks."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.ndimage

from unclip_jax.data import shapes
from unclip_jax.metrics import scene as scene_lib
from unclip_jax.utils import scenes
from unclip_jax.utils.scenes import Object, Relation, Scene


def picture(scene, size=64):
  return scenes.render(scene, size) / 127.5 - 1.0


def one(colour, shape, size="medium", x=0.5, y=0.5):
  return Object(shape, colour, size, x, y, scenes.SIZES[size])


PAIR = Scene(
  (one("red", "circle", x=0.25, y=0.3), one("blue", "square", x=0.75, y=0.4)),
  "white",
  (Relation(0, "left of", 1),),
)


def changed(scene, **fields):
  """The scene with fields of its objects set, `fields[name][i]` of object i."""
  objects = (
    dataclasses.replace(o, **{k: v[i] for k, v in fields.items()})
    for i, o in enumerate(scene.objects)
  )
  return dataclasses.replace(scene, objects=tuple(objects))


# Name -> (PAIR otherwise, scores that are not 1).
CHANGES = {
  "as it is": (PAIR, {}),
  "moved": (changed(PAIR, x=(0.2, 0.6), y=(0.6, 0.7)), {}),
  "another background": (dataclasses.replace(PAIR, background="grey"), {}),
  "colours swapped": (
    changed(PAIR, colour=("blue", "red")),
    {"object": 0, "relation": 0, "binding": 0, "scene": 0},
  ),
  "places swapped": (
    changed(PAIR, x=(0.75, 0.25)),
    {"relation": 0, "scene": 0},
  ),
  "one above the other": (
    changed(PAIR, x=(0.5, 0.5), y=(0.2, 0.8)),
    {"relation": 0, "scene": 0},
  ),
  "one colour wrong": (
    changed(PAIR, colour=("red", "pink")),
    {"object": 0.5, "colour": 0.5, "relation": 0, "scene": 0},
  ),
  "one shape twice": (
    changed(PAIR, shape=("circle", "circle")),
    {"object": 0.5, "shape": 0.5, "relation": 0, "binding": 0.5, "scene": 0},
  ),
  "one size wrong": (
    changed(PAIR, size=("medium", "large"), radius=(0.14, 0.2)),
    {"size": 0.5, "scene": 0},
  ),
  "one missing": (
    Scene(PAIR.objects[:1], "white"),
    {
      "number": 0, "object": 0.5, "colour": 0.5, "shape": 0.5, "size": 0.5,
      "relation": 0, "scene": 0,
    },
  ),
  "one too many": (
    Scene((*PAIR.objects, one("green", "star", "large", y=0.75)), "white"),
    {
      "number": 0, "object": 2 / 3, "colour": 2 / 3, "shape": 2 / 3,
      "size": 2 / 3, "scene": 0,
    },
  ),
  "nothing": (
    Scene((), "white"),
    dict.fromkeys(scene_lib.NAMES, 0) | {"binding": math.nan},
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_scores_of_known_mistakes(name):
  drawn, expected = CHANGES[name]
  scores = scene_lib.score(picture(drawn)[None], [PAIR])
  assert set(scores) == set(scene_lib.NAMES)
  for key in scene_lib.NAMES:
    np.testing.assert_allclose(scores[key], [expected.get(key, 1)], err_msg=key)


def test_what_has_no_answer_is_nan():
  single = Scene((one("red", "ring"),), "black")
  alike = changed(PAIR, shape=("circle", "circle"), colour=("red", "red"))
  same_shape = changed(PAIR, shape=("circle", "circle"))
  for scene in (single, alike):
    scores = scene_lib.compare(scene, dataclasses.replace(scene, relations=()))
    assert math.isnan(scores["relation"]) and math.isnan(scores["binding"])
    assert scores["scene"] == 1.0
  assert math.isnan(scene_lib.compare(same_shape, same_shape)["binding"])


def is_right(found, true):
  """All objects, and no others, are what and where they should be."""
  left = list(found.objects)
  for o in true.objects:
    near = [
      f
      for f in left
      if (f.kind, f.size) == (o.kind, o.size)
      and math.hypot(f.x - o.x, f.y - o.y) < 0.03
      and abs(f.radius / o.radius - 1) < 0.15
    ]
    if not near:
      return False
    left.remove(near[0])
  return not left and found.background == true.background


@pytest.mark.parametrize(
  ("split", "size", "count"),
  [
    ("train", 64, 100),
    ("unseen_pairs", 64, 100),
    ("unseen_bindings", 64, 100),
    ("validation", 32, 100),
    ("validation", 150, 15),
  ],
)
def test_clean_pictures_are_read_right(split, size, count):
  made = [shapes.make(0, split, i)[0] for i in range(count)]
  right = [is_right(scene_lib.read(picture(s, size)), s) for s in made]
  assert np.mean(right) >= 0.99


def test_soft_and_noisy_pictures_are_read_mostly_right():
  rng = np.random.default_rng(0)
  made = [shapes.make(0, "train", i)[0] for i in range(40)]
  soft = [
    scipy.ndimage.gaussian_filter(picture(s), (1.0, 1.0, 0.0)) for s in made
  ]
  noisy = [picture(s) + rng.normal(0, 0.2, (64, 64, 3)) for s in made]
  for images in (soft, noisy):
    scores = scene_lib.score(np.stack(images), made)
    assert scores["object"].mean() > 0.95 and scores["number"].mean() > 0.95


def test_objects_that_touch_are_told_apart_by_their_colours():
  touching = changed(PAIR, x=(0.4, 0.63), y=(0.5, 0.5))
  scores = scene_lib.compare(scene_lib.read(picture(touching)), touching)
  assert scores["object"] == 1.0 and scores["number"] == 1.0


@pytest.mark.parametrize("value", [-1.0, 0.3, math.nan])
def test_plain_pictures_have_no_objects(value):
  assert scene_lib.read(np.full((32, 32, 3), value)).objects == ()


def test_whatever_is_drawn_can_be_read():
  images = np.random.default_rng(0).normal(0, 1, (4, 32, 32, 3))
  images[0, :, 16:] = 1.0
  images[1] = scipy.ndimage.gaussian_filter(images[1], (3, 3, 0)) * 10
  images[2, 0, 0] = np.nan
  scores = scene_lib.score(images, [PAIR] * 4)
  assert all(np.nanmax(x) <= 1 and np.nanmin(x) >= 0 for x in scores.values())


def test_lab_of_known_colours():
  rgb = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0]], float)
  expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]]
  np.testing.assert_allclose(scene_lib.to_lab(rgb), expected, atol=0.01)


def test_colours_are_far_apart():
  colours = np.array([*scenes.COLOURS.values(), *scenes.BACKGROUNDS.values()])
  lab = scene_lib.to_lab(colours / 255)
  distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
  np.fill_diagonal(distances, np.inf)
  assert distances[:8].min() > 30
