"""Emoji in five styles: prepared from small packages, split by objects."""

import collections
import itertools
import json
import os
import pathlib

import numpy as np
import pytest
from absl import logging

from tests.data import icon_packages
from unclip_jax.data import (
  emoji,
  emoji_catalogue,
  emoji_packages,
  emoji_styles,
  pipeline,
  preprocess,
  tfds_folder,
)
from unclip_jax.utils import config as config_lib
from unclip_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Code point, slug, and the styles beside OpenMoji: n, t, f(luent), (f)x.
OBJECTS = [
  ("1f438", "frog", "ntfx"),
  ("1f353", "strawberry", "ntfx"),
  ("1f680", "rocket", "ntfx"),
  ("1f40c", "snail", "ntfx"),
  ("1f528", "hammer", "ntfx"),
  ("1f308", "rainbow", "ntf"),
  ("1f382", "birthdaycake", "ntf"),
  ("1f3b8", "guitar", "ntf"),
  ("1f43b-200d-2744", "polar-bear", "ntf"),  # OpenMoji's has a FE0F
  ("1f984", "unicorn", "nt"),
  ("1f349", "watermelon", "nt"),
  ("1f6d9", "lighthouse", "ntf"),  # not OpenMoji's
]
LEFT_OUT = [
  ("1f44b-1f3fb", "waving-hand-light-skin-tone"),
  ("1f1e9-1f1ea", "flag-germany"),
  ("fe82b", "unknown-flag"),
]


@pytest.fixture(scope="module", autouse=True)
def npm_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("npm")
  chars = {
    style: {k: slug for k, slug, styles in OBJECTS if letter in styles}
    for style, letter in zip(emoji_packages.STYLES[1:], "ntfx")
  }
  chars["noto"].update(LEFT_OUT)
  packages = icon_packages.pack(folder, chars)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(emoji_packages, "PACKAGES", packages)
    patch.setenv("PATH", "")  # whoever asks for npm fails
    yield str(folder)


def tiny(data_dir, npm_dir=None, **fields):
  fields = {"image_size": 16, "limit": 12, "holdout": 20.0, **fields}
  return emoji_styles.Source(data_dir=str(data_dir), npm_dir=npm_dir, **fields)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, npm_dir):
  path = tmp_path_factory.mktemp("data")
  tiny(path, npm_dir).prepare()
  return path


def test_every_object_in_every_style_that_draws_it(data_dir):
  pairs = {
    (r.info["object"], r.info["style"])
    for r in tiny(data_dir).records("all")  # npm is not asked again
  }
  expected = set()
  for code_point, _, letters in OBJECTS:
    name = emoji_catalogue.describe(code_point.upper()).name
    styles = [s for s, k in zip(emoji_packages.STYLES, "ontfx") if k in letters]
    expected |= {(name, style) for style in styles}
    if name != "lighthouse":
      expected.add((name, "openmoji"))
  assert pairs == expected and len(pairs) == 5 * 5 + 4 * 4 + 2 * 3 + 3


def test_pictures_captions_and_keys_are_of_one_pair(data_dir):
  records = tiny(data_dir).records("all")
  assert len({r.code_point for r in records}) == len(records)
  for record in records:
    style, thing = record.info["style"], record.info["object"]
    assert record.name == record.captions[0]
    assert all(style in c and thing in c for c in record.captions)
    code_point, _, key_style = record.code_point.partition("/")
    assert key_style == style
    entry = emoji_catalogue.describe(code_point)
    assert (entry.name, entry.group) == (thing, record.group)
    picture = np.asarray(preprocess.decode(record.image, name=record.name))
    assert picture.shape == (16, 16, 3) and (picture[0, 0] == 255).all()
    if style != "openmoji":
      colour = icon_packages.COLOURS[style]
      assert "#" + bytes(picture[8, 8]).hex() == colour


def test_a_batch_and_what_is_known_of_it(data_dir):
  config = dict(
    source_name="unclip_jax.data.emoji_styles",
    source=dict(
      data_dir=str(data_dir), image_size=16, limit=12, styles=("noto",)
    ),
    preprocess=dict(image_size=8),
  )
  data = pipeline.DataPipeline.from_config(config, seed=0)
  (batch,) = data.eval_batches("all", 12)
  assert batch["mask"].all()
  for index in batch["index"]:
    info = data.example_info(int(index), "all")
    assert info["style"] == "noto"
    assert info["object"] in info["captions"][0]


def test_licences_are_beside_the_data_and_logged(
  tmp_path, npm_dir, monkeypatch
):
  logged = []
  monkeypatch.setattr(
    logging, "info", lambda text, *args: logged.append(text % args)
  )
  folder = tiny(tmp_path, npm_dir, limit=1).prepare()
  log = "\n".join(logged)
  with open(os.path.join(folder, "LICENSES.md"), encoding="utf-8") as file:
    lines = file.read().splitlines()
  for style in emoji_packages.STYLES:
    (line,) = [x for x in lines if x.startswith(f"- {style} (1 pictures): ")]
    attribution = line.partition("): ")[2]
    assert log.count(attribution) == 1
  assert "CC BY-SA 4.0" in lines[4] and "CC BY 4.0" in lines[-1]
  assert "noto: 15 pictures" not in log  # one has no name
  assert "noto: 14 pictures; left out 1 without a name" in log
  with open(os.path.join(folder, "metadata.json"), encoding="utf-8") as file:
    assert "@iconify-json/noto@1.2.9" in json.dumps(json.load(file))


def test_without_npm_nothing_is_left_behind(tmp_path):
  with pytest.raises(UserError, match="no npm"):
    tiny(tmp_path).prepare()
  assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"styles": ("apple",)}, "no 'apple'; there are openmoji, noto"),
    ({"holdout_styles": 101.0}, "holdout_styles"),
    ({"groups": ("animal",)}, "no 'animal'"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(UserError, match=message):
    emoji_styles.Source(**fields)


def test_the_program_takes_the_folder(tmp_path, run_python):
  program = ["-m", "unclip_jax.prepare_data", f"--data_dir={tmp_path}"]
  empty = ["--styles", "--limit=1", f"--npm_dir={tmp_path}"]
  done = run_python(*program, *empty, check=False)
  assert done.returncode == 2
  archive = tmp_path / emoji_packages.PACKAGES[0].archive
  assert f"cannot read {archive}" in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def rows():
  """OpenMoji's objects, and four in five of them in each other style."""
  rows = []
  for entry in emoji_catalogue.entries():
    base = emoji_catalogue.base(entry.code_point)
    for style in emoji_packages.STYLES:
      if emoji_catalogue.fraction(f"{base} by {style}") < 0.8:
        name = entry.name.encode()
        rows.append(
          dict(
            image=b"",
            code_point=f"{entry.code_point}/{style}".encode(),
            name=name,
            group=entry.group.encode(),
            captions=[name],
            skin_tone=entry.skin_tone,
            flippable=False,
            style=style.encode(),
            object=name,
          )
        )
  return rows


@pytest.fixture
def open_source(rows, monkeypatch):
  """Makes a source of these rows, which have no pictures."""
  monkeypatch.setattr(tfds_folder, "read_rows", lambda folder: rows)
  monkeypatch.setattr(emoji.Source, "prepare", lambda self: "")
  return emoji_styles.Source


def pairs(records):
  """Object, whatever its skin tone -> the styles that it is there in."""
  found = collections.defaultdict(set)
  for record in records:
    code_point, _, style = record.code_point.partition("/")
    found[emoji_catalogue.base(code_point)].add(style)
  return found


FIELDS = [
  {},
  {"exclude_skin_tones": False, "exclude_flags": False},
  {"styles": ("noto", "fluent", "fxemoji"), "holdout_styles": 50.0},
  {"groups": ("animals", "food"), "holdout": 0.0, "holdout_styles": 100.0},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_unseen_styles_are_new_pairs_of_what_is_known(fields, open_source):
  source = open_source(**fields)
  train, unseen = (pairs(source.records(x)) for x in ("train", "unseen_styles"))
  trained_styles = set.union(*train.values())
  for thing, styles in unseen.items():
    assert not styles & train[thing]
    assert len(train[thing]) == 2  # known, in two other styles
    assert styles <= trained_styles
  # Several of one object, so that its style has to be told.
  assert max(map(len, unseen.values())) == (
    1 if len(trained_styles) == 3 else 3
  )


@pytest.mark.parametrize("fields", FIELDS)
def test_the_splits_part_the_whole(fields, open_source):
  source = open_source(**fields)
  splits = ["train", "unseen_styles"]
  splits += ["validation"] if source.holdout else []
  keys = {x: [r.code_point for r in source.records(x)] for x in splits}
  every = [r.code_point for r in source.records("all")]
  assert sorted(every) == sorted(itertools.chain(*keys.values()))
  assert len(set(every)) == len(every)
  if source.holdout:
    held_out = pairs(source.records("validation"))
    assert not set(held_out) & set(pairs(source.records("train")))
    assert not set(held_out) & set(pairs(source.records("unseen_styles")))
    for split in ("train", "validation"):
      for thing in pairs(source.records(split)):
        fraction = emoji_catalogue.holdout_fraction(thing)
        assert (fraction < source.holdout / 100) == (split == "validation")


def test_the_share_of_objects_with_unseen_styles(open_source):
  source = open_source()
  known = pairs(source.records("train"))
  unseen = pairs(source.records("unseen_styles"))
  drawn = {thing: len(known[thing] | unseen[thing]) for thing in known}
  eligible = [thing for thing, n in drawn.items() if n >= 3]
  assert 0.07 < len([t for t in eligible if unseen[t]]) / len(eligible) < 0.13
  # Fewer styles or objects do not reshuffle what is left.
  animals = open_source(groups=("animals",))
  for thing, styles in pairs(animals.records("unseen_styles")).items():
    assert styles == unseen[thing]


def test_no_unseen_styles_at_will(open_source):
  source = open_source(holdout_styles=0.0)
  more = len(source.records("train")) - len(open_source().records("train"))
  assert more == len(open_source().records("unseen_styles")) > 0
  with pytest.raises(
    UserError, match="'unseen_styles' of the dataset is empty"
  ):
    source.records("unseen_styles")


def test_an_objects_styles_lie_together(open_source):
  things = [
    emoji_catalogue.base(r.code_point.partition("/")[0])
    for r in open_source().records("train")
  ]
  changes = sum(a != b for a, b in itertools.pairwise(things))
  assert changes == len(set(things)) - 1
  groups = {r.group for r in open_source().records("train")[:40]}
  assert len(groups) >= 4  # but objects are mixed


@pytest.mark.parametrize("name", ["clip", "prior", "decoder"])
def test_the_configs_fit(name):
  config = config_lib.load(str(ROOT / f"configs/emoji_styles/{name}.py"))
  data = pipeline.DataPipeline.from_config(config.data, seed=0)
  assert isinstance(data.source, emoji_styles.Source)
  for evaluator in config.evals.values():
    assert evaluator.get("split", "validation") in data.source.splits
  assert any(k.endswith("_unseen") for k in config.evals)
