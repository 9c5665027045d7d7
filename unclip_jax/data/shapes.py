"""Source `shapes`: captioned scenes of one to three objects, made on the fly.

A scene is a function of (seed, split, index); nothing is stored but the
tokenizer. utils/scenes.py says what scenes are made of. It is for questions
that emoji cannot answer: whether a model puts together what it never saw
together, since what is in a drawn picture can be read (metrics/scene.py).

  objects     20 % of the scenes have one, 50 % two, 30 % three. In 10 % of
              those with several all are alike ("two small red circles"), else
              any two differ in shape or colour. They never touch: MARGIN lies
              between them and to the edge. In about half of the scenes with a
              ring and more it is large, and a small object lies in its middle.
  captions    the canonical one tells kinds, sizes and neighbours' relations;
              the others leave out sizes, turn relations round, list, count,
              or tell the background. All are true.

  train, validation   the same combinations, by default in 100,000 and 2,000
                      scenes; the others have 2,000 each
  unseen_pairs        every scene has an object whose shape and colour never
                      meet elsewhere: 8 of the 64 kinds, each shape and each
                      colour once
  unseen_bindings     every scene has two objects that are only found the other
                      way round elsewhere: of 384 of the 1,540 pairs of kinds,
                      one always lies left of or above the other. Two or three
                      objects (70 and 30 %), none inside of another
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from PIL import Image

from unclip_jax.data import source, tokenizers
from unclip_jax.data.source import Record
from unclip_jax.utils import scenes
from unclip_jax.utils.errors import UserError
from unclip_jax.utils.scenes import Kind, Object, Relation, Scene

SPLITS = (*source.SPLITS, "unseen_pairs", "unseen_bindings")
MARGIN = 0.04  # of the picture's side: over a pixel at 32

_COLOURS = tuple(scenes.COLOURS)
UNSEEN_KINDS: frozenset[Kind] = frozenset(
  (_COLOURS[(3 * i + 1) % 8], shape) for i, shape in enumerate(scenes.SHAPES)
)
SEEN_KINDS: tuple[Kind, ...] = tuple(
  kind
  for kind in itertools.product(scenes.COLOURS, scenes.SHAPES)
  if kind not in UNSEEN_KINDS
)
_NUM_UNSEEN_ORDERS = 384
# Directions are never near a diagonal, where none would be the right word.
_CLEAR = 0.08
_PLACINGS = 20  # of the same objects, before others are drawn

_WORDS = {
  "left of": ("left of", "to the left of"),
  "right of": ("right of", "to the right of"),
  "above": ("above", "over"),
  "below": ("below", "under"),
  "inside": ("inside", "within"),
  "around": ("around", "surrounding"),
}
_NUMBERS = ("none", "one", "two", "three")
_VOCAB_SIZE = 640
_TOKENIZER_SCENES = 2000

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Source:
  """The fields of `config.data.source`.

  Fields:
    data_dir: where the tokenizer is kept; None: $UNCLIP_DATA_DIR, else
      ~/.cache/unclip_jax.
    image_size: side in pixels, 32 or more.
    num_train: scenes in "train".
    num_held_out: scenes in each of the other splits; "all" is "train" and
      "validation".
    seed: another one gives other scenes, but the same combinations.
  """

  data_dir: str | None = None
  image_size: int = 64
  num_train: int = 100_000
  num_held_out: int = 2000
  seed: int = 0

  def __post_init__(self):
    where = "config.data.source"
    if not 32 <= self.image_size <= 4000:
      raise UserError(f"{where}.image_size must be in [32, 4000] pixels")
    for name in ("num_train", "num_held_out"):
      if getattr(self, name) < 1:
        raise UserError(f"{where}.{name} must be positive")

  def records(self, split: str) -> Sequence[Record]:
    """The records of one of SPLITS, drawn when asked for.

    Their `info` holds the `scene`, a utils.scenes.Scene.

    Raises:
      UserError: no such split.
    """
    if split not in SPLITS:
      raise UserError(
        f"there is no split {split!r}; there are {', '.join(SPLITS)}"
      )
    return _Records(self, split)

  def tokenizer_path(self) -> str:
    """A tokenizer trained on captions, the same for all fields."""
    captions = [
      caption
      for index in range(_TOKENIZER_SCENES)
      for caption in make(0, "train", index)[1]
    ]
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()[:12]
    path = os.path.join(
      self.data_dir or source.default_data_dir(),
      "shapes",
      digest,
      tokenizers.SENTENCEPIECE_FILE,
    )
    if not os.path.isfile(path):
      tokenizers.train(captions, _VOCAB_SIZE, path)
    return path


class _Records(Sequence[Record]):
  """Records that are drawn whenever they are asked for."""

  def __init__(self, fields: Source, split: str):
    self._fields = fields
    sizes = {"train": fields.num_train}
    parts = ("train", "validation") if split == "all" else (split,)
    self._parts = [(p, sizes.get(p, fields.num_held_out)) for p in parts]

  def __len__(self) -> int:
    return sum(size for _, size in self._parts)

  def __getitem__(self, index: int) -> Record:
    index = range(len(self))[index]
    split, size = self._parts[0]
    if index >= size:
      split, index = self._parts[1][0], index - size
    scene, captions = make(self._fields.seed, split, index)
    file = io.BytesIO()
    picture = scenes.render(scene, self._fields.image_size)
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return Record(
      image=file.getvalue(),
      code_point=f"{split}-{index}",
      name=captions[0],
      group=_NUMBERS[len(scene.objects)],
      captions=captions,
      flippable=not any("left" in c or "right" in c for c in captions),
      info={"scene": scene},
    )


@functools.cache
def unseen_orders() -> frozenset[tuple[Kind, Kind]]:
  """The pairs (first, second) of which only "unseen_bindings" has the first
  left of or above the second."""
  pairs = sorted(itertools.combinations(SEEN_KINDS, 2), key=_digest)
  return frozenset(
    pair if _digest(pair)[-1] % 2 else pair[::-1]
    for pair in pairs[:_NUM_UNSEEN_ORDERS]
  )


def has_unseen_order(objects: Sequence[Object]) -> bool:
  """Whether any two of a scene are as only "unseen_bindings" has them."""
  return any(
    (a.kind, b.kind) in unseen_orders()
    and scenes.relation(a, b) in ("left of", "above")
    for a, b in itertools.permutations(objects, 2)
  )


def make(seed: int, split: str, index: int) -> tuple[Scene, tuple[str, ...]]:
  """A scene and its captions, the canonical one first."""
  # Of all generators this one alone promises the same numbers for ever.
  rng = random.Random(f"{seed} {split} {index}")
  number = _pick(rng, (1, 1, 2, 2, 2, 2, 2, 3, 3, 3))
  if split == "unseen_bindings":
    number = max(number, 2)
  objects = None
  while objects is None:
    objects = _draw_objects(rng, split, number)
  relations = ()
  if len({o.kind for o in objects}) == len(objects):
    relations = tuple(
      Relation(i, scenes.relation(a, b), i + 1)
      for i, (a, b) in enumerate(itertools.pairwise(objects))
    )
  scene = Scene(
    tuple(objects), _pick(rng, tuple(scenes.BACKGROUNDS)), relations
  )
  return scene, _captions(rng, scene)


def _draw_objects(
  rng: random.Random, split: str, number: int
) -> list[Object] | None:
  """Placed objects; None if the draw is not one of the split."""
  kinds = [_pick(rng, SEEN_KINDS) for _ in range(number)]
  sizes = [_pick(rng, tuple(scenes.SIZES)) for _ in range(number)]
  if split == "unseen_pairs":
    kinds[0] = _pick(rng, sorted(UNSEEN_KINDS))
  num_kinds = num_mixed = number
  nested = False
  if split == "unseen_bindings":
    kinds[:2] = _pick(rng, sorted(unseen_orders()))
    num_mixed = 2  # they stay together, so that captions speak of their order
  elif number > 1 and rng.random() < 0.1:
    kinds, sizes = kinds[:1] * number, sizes[:1] * number
    num_kinds = 1
  elif number > 1 and rng.random() < 0.5:
    rings = [kind for kind in kinds if kind[1] == "ring"]
    if rings:
      kinds = rings + [kind for kind in kinds if kind[1] != "ring"]
      sizes[:2] = "large", "small"
      num_mixed, nested = 2, True
  if len(set(kinds)) != num_kinds:
    return None
  for _ in range(_PLACINGS):
    objects = _place(rng, kinds, sizes, nested)
    if objects is None:
      continue
    if (
      has_unseen_order(objects[:2])
      if split == "unseen_bindings"
      else not has_unseen_order(objects)
    ):
      objects[:num_mixed] = _shuffled(rng, objects[:num_mixed])
      return objects
  return None


def _place(
  rng: random.Random, kinds: list[Kind], sizes: list[str], nested: bool
) -> list[Object] | None:
  """Objects at random; None where they are too near or their order unclear.

  Args:
    nested: put the second in the middle of the first.
  """
  objects: list[Object] = []
  for (colour, shape), size in zip(kinds, sizes):
    radius = scenes.SIZES[size]
    if nested and len(objects) == 1:
      middle = objects[0].x, objects[0].y
      objects.append(Object(shape, colour, size, *middle, radius))
      continue
    edge = radius + MARGIN
    x, y = (edge + rng.random() * (1 - 2 * edge) for _ in range(2))
    for other in objects:
      dx, dy = abs(x - other.x), abs(y - other.y)
      distance = (dx * dx + dy * dy) ** 0.5
      if distance < radius + other.radius + MARGIN or abs(dx - dy) < _CLEAR:
        return None
    objects.append(Object(shape, colour, size, x, y, radius))
  return objects


def _captions(rng: random.Random, scene: Scene) -> tuple[str, ...]:
  """True phrasings; the first tells all but the background."""
  objects = scene.objects
  behind = f"on a {scene.background} background"
  plain = [_name(o, False) for o in objects]
  sized = [_name(o, True) for o in objects]
  mixed = [_name(o, rng.random() < 0.5) for o in objects]
  first, number = objects[0], _NUMBERS[len(objects)]
  if not scene.relations:
    if len(objects) == 1:
      short, full, either = (_a(x[0]) for x in (plain, sized, mixed))
      turned = f"{_a(first.shape)} that is {first.size} and {first.colour}"
    else:
      short, full, either = (
        f"{number} {_plural(x[0])}" for x in (plain, sized, mixed)
      )
      turned = f"{number} {_plural(first.shape)}, all {first.colour}"
    some = f"a picture of {either}"
    return full, short, f"{either} {behind}", some, turned
  backwards = [
    Relation(r.object, scenes.CONVERSE[r.name], r.subject)
    for r in reversed(scene.relations)
  ]
  usual = {name: words[0] for name, words in _WORDS.items()}
  other = {name: _pick(rng, words) for name, words in _WORDS.items()}
  order = _shuffled(rng, range(len(objects)))
  return (
    _chain(sized, scene.relations, usual),
    _chain(plain, scene.relations, usual),
    _chain(sized, backwards, usual),
    _chain(plain, backwards, other),
    f"{_chain(mixed, scene.relations, other)}, {behind}",
    _list([_a(sized[i]) for i in order]),
    f"{number} objects: {_list([_a(mixed[i]) for i in order])}",
  )


def _chain(
  names: Sequence[str], relations: Sequence[Relation], words: Mapping[str, str]
) -> str:
  """The first is ... the second, which is ... the third."""
  text = _a(names[relations[0].subject])
  for i, r in enumerate(relations):
    text += f"{', which is' if i else ''} {words[r.name]} {_a(names[r.object])}"
  return text


def _list(names: list[str]) -> str:
  return " and ".join([", ".join(names[:-1]), names[-1]])


def _name(thing: Object, with_size: bool) -> str:
  size = f"{thing.size} " if with_size else ""
  return f"{size}{thing.colour} {thing.shape}"


def _a(name: str) -> str:
  return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _plural(name: str) -> str:
  return f"{name}es" if name.endswith("s") else f"{name}s"


def _pick(rng: random.Random, items: Sequence[T]) -> T:
  return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Iterable[T]) -> list[T]:
  return sorted(items, key=lambda _: rng.random())


def _digest(pair: tuple[Kind, Kind]) -> bytes:
  return hashlib.sha256(repr(pair).encode()).digest()
