"""The scenes, their captions, and what training never sees."""

import collections
import hashlib
import itertools
import math
import re

import numpy as np
import pytest

from unclip_jax.data import pipeline, preprocess, shapes
from unclip_jax.utils import scenes
from unclip_jax.utils.errors import UserError

ALL = ("train", "validation", "unseen_pairs", "unseen_bindings")


@pytest.fixture(scope="module")
def made() -> dict[str, list]:
  """Split -> (scene, captions) of its first 500, and of 20,000 for training."""
  counts = dict.fromkeys(ALL, 500) | {"train": 20_000}
  return {
    s: [shapes.make(0, s, i) for i in range(n)] for s, n in counts.items()
  }


def test_a_record_is_a_function_of_seed_split_and_index():
  few, many = (
    shapes.Source(num_train=n, image_size=32).records("train") for n in (9, 50)
  )
  assert len(few) == 9 and list(few) == [many[i] for i in range(9)]
  assert few[-1] == few[8]
  others = [
    shapes.Source(seed=1, image_size=32).records("train")[0],
    shapes.Source(image_size=32).records("validation")[0],
  ]
  assert len({r.image for r in (few[0], *others)}) == 3
  # On every machine: a change of this number is another dataset.
  digest = hashlib.sha256()
  for record in few:
    digest.update(preprocess.decode(record.image, name="").tobytes())
    digest.update(repr((record.captions, record.info)).encode())
  assert digest.hexdigest()[:16] == "6f073cc2721acecf"


def test_splits():
  source = shapes.Source(num_train=20, num_held_out=5, image_size=32)
  assert [len(source.records(s)) for s in (*ALL, "all")] == [20, 5, 5, 5, 25]
  every = source.records("all")
  assert every[19] == source.records("train")[19]
  assert every[20] == source.records("validation")[0]
  with pytest.raises(UserError, match="unseen_bindings"):
    source.records("test")
  with pytest.raises(IndexError):
    every[25]


@pytest.mark.parametrize("fields", [{"image_size": 16}, {"num_train": 0}])
def test_wrong_fields(fields):
  with pytest.raises(UserError, match=next(iter(fields))):
    shapes.Source(**fields)


def orders(objects):
  """(first, second) of kinds, where the first is left of or above."""
  for a, b in itertools.permutations(objects, 2):
    dx, dy = a.x - b.x, a.y - b.y
    if (dx if abs(dx) > abs(dy) else dy) < -1e-9:
      yield a.kind, b.kind


def test_training_never_sees_what_is_held_out(made):
  seen, seen_orders = set(), set()
  for split in ("train", "validation"):
    for scene, _ in made[split]:
      seen |= {o.kind for o in scene.objects}
      seen_orders |= set(orders(scene.objects))
  # All that may occur does.
  assert len(seen) == 56 and len(shapes.UNSEEN_KINDS) == 8
  assert not seen & shapes.UNSEEN_KINDS
  for part in zip(*shapes.UNSEEN_KINDS):
    assert len(set(part)) == 8
  for scene, _ in made["unseen_pairs"]:
    assert {o.kind for o in scene.objects} & shapes.UNSEEN_KINDS

  unseen = shapes.unseen_orders()
  assert len(unseen) == 384 == len({frozenset(pair) for pair in unseen})
  assert not seen_orders & unseen
  assert sum((b, a) in seen_orders for a, b in unseen) > 370
  for scene, _ in made["unseen_bindings"]:
    kinds = {o.kind for o in scene.objects}
    assert kinds <= seen
    assert set(orders(scene.objects)) & unseen
    # And a relation of the canonical caption says so.
    stated = (
      [scene.objects[r.subject], scene.objects[r.object]]
      for r in scene.relations
    )
    assert any(set(orders(pair)) & unseen for pair in stated)


@pytest.mark.parametrize("split", ALL)
def test_objects_lie_apart_and_inside_of_the_picture(made, split):
  sizes = collections.Counter()
  for scene, _ in made[split][:500]:
    total = 0
    for o in scene.objects:
      sizes[o.size] += 1
      assert o.radius == scenes.SIZES[o.size]
      edge = min(o.x, o.y, 1 - o.x, 1 - o.y) - o.radius
      assert edge > shapes.MARGIN - 1e-9
      rows, columns, covered = scenes.coverage(o.shape, o.x, o.y, o.radius, 64)
      mask = np.zeros((64, 64), bool)
      mask[rows, columns] = covered > 0
      total = total + mask
    assert total.max() == 1
    assert scene.background in scenes.BACKGROUNDS
  assert min(sizes.values()) > 0.2 * sizes.total()


_THING = (
  r"(?:(?P<n>an?|one|two|three) )?(?:(?P<size>small|medium|large) )?"
  r"(?:(?P<colour>\w+) )?(?P<shape>\w+)"
  r"(?: that is (?P<size2>\w+) and (?P<colour2>\w+)|, all (?P<colour3>\w+))?"
)
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_SINGULAR = {
  **{f"{s}s": s for s in scenes.SHAPES if s != "cross"},
  "crosses": "cross",
}


def described(text, scene):
  """The objects that a noun phrase fits; checks its number."""
  match = re.fullmatch(_THING, text)
  assert match, text
  fields = match.groupdict()
  shape = _SINGULAR.get(fields["shape"], fields["shape"])
  assert shape in scenes.SHAPES, text
  assert (shape != fields["shape"]) == (fields["n"] in ("two", "three")), text
  wanted = {
    "shape": shape,
    "size": fields["size"] or fields["size2"],
    "colour": fields["colour"] or fields["colour2"] or fields["colour3"],
  }
  found = [
    o
    for o in scene.objects
    if all(v is None or getattr(o, k) == v for k, v in wanted.items())
  ]
  assert len(found) == _NUMBERS[fields["n"]], text
  return found


def check_caption(caption, scene):
  """Fails unless all that a caption says is so; returns what it speaks of."""
  text = caption.removeprefix("a picture of ")
  text, _, background = text.partition(" on a ")
  if background:
    assert background == f"{scene.background} background"
  text = text.removesuffix(",")
  number, colon, rest = text.partition(" objects: ")
  if colon:
    assert _NUMBERS[number] == len(scene.objects)
    text = rest
  words = [w for both in shapes._WORDS.values() for w in both]
  parts = re.split(f" ({'|'.join(sorted(words, key=len)[::-1])}) ", text)
  if len(parts) == 1:  # no relation: a list
    if ", all" in text:
      return described(text, scene)
    things = re.split(", | and (?=an? )", text)
    return [o for thing in things for o in described(thing, scene)]
  things = [described(p.removesuffix(", which is"), scene) for p in parts[::2]]
  for (a,), word, (b,) in zip(things, parts[1::2], things[1:]):
    dx, dy = b.x - a.x, b.y - a.y
    apart = math.hypot(dx, dy)
    assert {
      "left of": dx > abs(dy),
      "right of": -dx > abs(dy),
      "above": dy > abs(dx),
      "below": -dy > abs(dx),
      "inside": b.shape == "ring" and apart + a.radius < 0.68 * b.radius,
      "around": a.shape == "ring" and apart + b.radius < 0.68 * a.radius,
    }[next(name for name, both in shapes._WORDS.items() if word in both)]
  return [o for thing in things for o in thing]


@pytest.mark.parametrize("split", ALL)
def test_captions_are_true(made, split):
  spoken_of = collections.Counter()
  for scene, captions in made[split][:500]:
    assert len(set(captions)) >= 4
    for caption in captions:
      # No object is passed over, and none told twice.
      assert collections.Counter(check_caption(caption, scene)) == (
        collections.Counter(scene.objects)
      ), caption
      spoken_of.update(re.findall(r"[a-z]+", caption))
    assert all(o.size in captions[0] for o in scene.objects)
  words = {*scenes.SHAPES, *scenes.COLOURS, *scenes.SIZES, *scenes.BACKGROUNDS}
  assert words <= set(spoken_of)


def test_false_captions_are_noticed(made):
  """The check above can fail."""
  scene, captions = next(x for x in made["train"] if len(x[0].relations) == 2)
  for name, converse in scenes.CONVERSE.items():
    if f" {name} " in captions[0]:
      with pytest.raises(AssertionError):
        check_caption(captions[0].replace(name, converse, 1), scene)
  with pytest.raises(AssertionError):
    check_caption(captions[-1].replace("three", "two"), scene)


def test_batches_and_info(tmp_path):
  data = pipeline.DataPipeline(
    source=shapes.Source(data_dir=str(tmp_path), image_size=32),
    preprocess=preprocess.Preprocess(image_size=32, context_length=32),
    seed=0,
  )
  batch = next(data.train_batches(0, 64))
  texts = data.tokenizer.decode(batch["text_tokens"])
  for index, text in zip(batch["index"], texts, strict=True):
    info = data.example_info(int(index), "train")
    assert text in info["captions"]
    assert len(info["scene"].objects) in (1, 2, 3)
  # One token a word, and no caption is cut.
  _, mask = data.tokenizer.encode(["a small red circle"], 32)
  assert mask.sum() == 6
  longest = max(
    (c for i in range(300) for c in shapes.make(0, "train", i)[1]), key=len
  )
  assert data.tokenizer.decode(data.tokenizer.encode([longest], 32)[0]) == [
    longest
  ]
