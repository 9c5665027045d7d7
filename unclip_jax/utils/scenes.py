"""Scenes of plain objects: what they are made of, and how they are drawn.

What the dataset (data/shapes.py), the reader of pictures (metrics/scene.py) and
the evaluator share. A scene has a background and a few objects, each with one
of 8 shapes, 8 colours and 3 sizes; shape and colour together are its kind.

Lengths and positions are fractions of the picture's side; x goes right and y
down. An object's centre is its centre of mass, and its radius that of the
smallest circle around this centre that holds it. Objects are never turned.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

SHAPES = (
  *("circle", "square", "triangle", "star"),
  *("heart", "cross", "ring", "crescent"),
)
# RGB. Any two, and any of both tables, are 30 or more apart in CIELAB.
COLOURS = {
  "red": (214, 32, 40),
  "orange": (255, 140, 20),
  "yellow": (248, 222, 40),
  "green": (30, 150, 50),
  "cyan": (40, 200, 215),
  "blue": (40, 70, 215),
  "purple": (130, 40, 160),
  "pink": (255, 130, 195),
}
BACKGROUNDS = {
  "white": (255, 255, 255),
  "silver": (196, 198, 202),
  "grey": (120, 122, 126),
  "black": (16, 16, 20),
}
SIZES = {"small": 0.1, "medium": 0.14, "large": 0.2}  # radii
CONVERSE = {
  "left of": "right of",
  "right of": "left of",
  "above": "below",
  "below": "above",
  "inside": "around",
  "around": "inside",
}

HOLE = 0.68  # radius of a ring's hole, in radii of the ring
_SAMPLES = 4  # a pixel and axis

Kind = tuple[str, str]  # colour, shape


@dataclasses.dataclass(frozen=True)
class Object:
  """One object.

  Fields:
    shape: of SHAPES.
    colour: of COLOURS.
    size: of SIZES.
    x: of the centre.
    y: of the centre.
    radius: in a scene of the dataset SIZES[size], in a picture what was read.
  """

  shape: str
  colour: str
  size: str
  x: float
  y: float
  radius: float

  @property
  def kind(self) -> Kind:
    return self.colour, self.shape


class Relation(NamedTuple):
  """Object `subject` is `name` (of CONVERSE) object `object`, by position."""

  subject: int
  name: str
  object: int


@dataclasses.dataclass(frozen=True)
class Scene:
  """What is in a picture.

  Fields:
    objects: in any order.
    background: of BACKGROUNDS.
    relations: those that are spoken of; more may hold.
  """

  objects: tuple[Object, ...]
  background: str
  relations: tuple[Relation, ...] = ()


def relation(a: Object, b: Object) -> str:
  """Which of CONVERSE holds of a and b; exactly one does.

  "inside": b is a ring, and a's centre is in its hole. Else the direction in
  which the centres are farther apart decides; "above" where both are equal.
  """
  dx, dy = a.x - b.x, a.y - b.y
  distance = math.hypot(dx, dy)
  if b.shape == "ring" and distance < HOLE * b.radius and a.radius < b.radius:
    return "inside"
  if a.shape == "ring" and distance < HOLE * a.radius and b.radius < a.radius:
    return "around"
  if abs(dx) > abs(dy):
    return "left of" if dx < 0 else "right of"
  return "above" if dy <= 0 else "below"


def render(scene: Scene, image_size: int) -> np.ndarray:
  """The picture of a scene, uint8 [image_size, image_size, 3].

  16 samples a pixel, averaged in sRGB.
  """
  picture = np.empty((image_size, image_size, 3))
  picture[:] = BACKGROUNDS[scene.background]
  for thing in scene.objects:
    rows, columns, alpha = coverage(
      thing.shape, thing.x, thing.y, thing.radius, image_size
    )
    alpha = alpha[..., None]
    colour = np.array(COLOURS[thing.colour], float)
    part = picture[rows, columns]
    picture[rows, columns] = part + alpha * (colour - part)
  return (picture + 0.5).astype(np.uint8)


def coverage(
  shape: str, x: float, y: float, radius: float, image_size: int
) -> tuple[slice, slice, np.ndarray]:
  """Which part of each pixel a shape covers.

  Returns:
    The rows and columns of the box around it, cut at the picture's edge, and
    the covered part of its pixels, float [rows, columns] in [0, 1].
  """
  bounds, samples = [], []
  for centre in (y, x):
    first = math.floor((centre - radius) * image_size)
    last = math.ceil((centre + radius) * image_size)
    first = min(max(first, 0), image_size)
    last = min(max(last, first), image_size)
    places = first + (np.arange((last - first) * _SAMPLES) + 0.5) / _SAMPLES
    bounds.append(slice(first, last))
    samples.append((places / image_size - centre) / radius)
  covered = _inside(shape, samples[1][None, :], samples[0][:, None])
  height, width = (b.stop - b.start for b in bounds)
  covered = covered.reshape(height, _SAMPLES, width, _SAMPLES)
  return *bounds, covered.mean(axis=(1, 3))


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Where a shape of radius 1 around the origin is: bool [H, W]."""
  if shape == "circle":
    return x**2 + y**2 <= 0.81
  if shape == "square":
    return np.maximum(abs(x), abs(y)) <= 0.7
  if shape == "triangle":
    return (y <= 0.5) & (abs(x) * math.sqrt(3) <= y + 1)
  if shape == "star":
    # A point of a pentagram is inside of all five lines but one at most.
    angles = [math.pi * (0.5 + 0.4 * i) for i in range(5)]
    sides = [math.cos(a) * x + math.sin(a) * y <= 0.309 for a in angles]
    return np.sum(sides, axis=0) >= 4
  if shape == "heart":
    # (x^2 + y^2 - 1)^3 <= x^2 y^3, upwards; moved and scaled to its centre.
    x, y = 1.289 * x, 0.2935 - 1.289 * y
    square = x**2 + y**2 - 1
    return square * square * square <= x**2 * (y * y * y)
  if shape == "cross":
    x, y = abs(x), abs(y)
    return (np.minimum(x, y) <= 0.28) & (np.maximum(x, y) <= 0.95)
  if shape == "ring":
    distance = x**2 + y**2
    return (distance >= HOLE**2) & (distance <= 1)
  assert shape == "crescent", shape
  x, y = 1.2385 * x - 0.3242, 1.2385 * y
  return (x**2 + y**2 <= 1) & ((x - 0.6) ** 2 + y**2 >= 0.5625)
