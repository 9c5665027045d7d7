"""Names, groups and captions of OpenMoji's pictures."""

import collections

import pytest

from unclip_jax.data import emoji_catalogue


@pytest.fixture(scope="module")
def entries() -> tuple[emoji_catalogue.Entry, ...]:
  return emoji_catalogue.entries()


def _plain(entries):
  return [e for e in entries if not e.skin_tone and e.group != "flags"]


def test_counts(entries):
  """Pinned: a change of these numbers is a new version of the dataset."""
  assert len(entries) == 4050
  assert sum(e.skin_tone for e in entries) == 2035
  assert sum(e.subdivision_flag for e in entries) == 3
  plain = _plain(entries)
  assert len(plain) == 1745
  groups = collections.Counter(e.group for e in plain)
  assert groups == {
    "people": 389, "objects": 267, "symbols": 223, "travel": 172,
    "faces": 170, "food": 135, "animals": 126, "other": 101,
    "activities": 85, "nature": 77,
  }  # fmt: skip
  assert groups["animals"] + groups["nature"] + groups["food"] == 338


def test_names_tell_pictures_apart(entries):
  names = collections.Counter(e.name for e in entries)
  assert [name for name, n in names.items() if n > 1] == []


@pytest.mark.parametrize(
  ("code_point", "name", "group"),
  [
    ("1F438", "frog", "animals"),
    ("1F43B-200D-2744-FE0F", "polar bear", "animals"),
    ("1F353", "strawberry", "food"),
    ("1F335", "cactus", "nature"),
    ("1F308", "rainbow", "nature"),
    ("1F600", "grinning face", "faces"),
    ("1F9D4", "person with a beard", "people"),
    ("1F468-200D-1F469-200D-1F466", "family: man, woman, boy", "people"),
    ("26BD", "soccer ball", "activities"),
    ("1F691", "ambulance", "travel"),
    ("1F528", "hammer", "objects"),
    ("0031-FE0F-20E3", "keycap 1", "symbols"),
    ("1F1E9-1F1EA", "flag of Germany", "flags"),
    ("1F3F4-200D-2620-FE0F", "pirate flag", "flags"),
    ("2654", "white chess king", "other"),
  ],
)
def test_golden_names(code_point, name, group):
  entry = emoji_catalogue.describe(code_point)
  assert (entry.name, entry.group) == (name, group)
  assert not entry.skin_tone and not entry.subdivision_flag


def test_variants_are_marked():
  waving = emoji_catalogue.describe("1F44B-1F3FB")
  assert waving.name == "waving hand: light skin tone"
  assert waving.skin_tone
  scotland = emoji_catalogue.describe(
    "1F3F4-E0067-E0062-E0073-E0063-E0074-E007F"
  )
  assert scotland.name == "flag of Scotland"
  assert scotland.subdivision_flag and scotland.group == "flags"


def test_pictures_without_a_name_are_left_out():
  assert emoji_catalogue.describe("E000") is None
  assert emoji_catalogue.describe("1FAD9-200D-1F7E5") is None


def test_captions_begin_with_the_canonical_one():
  assert emoji_catalogue.describe("1F438").captions == (
    "frog",
    "a frog",
    "an emoji of a frog",
    "a drawing of a frog",
    "a picture of a frog",
    "a frog emoji",
  )
  # A name without an article is not repeated.
  assert emoji_catalogue.captions("grapes")[:2] == (
    "grapes",
    "an emoji of grapes",
  )


@pytest.mark.parametrize(
  ("name", "style", "first"),
  [
    ("owl", "noto", "a noto style owl"),
    ("frog", "openmoji", "an openmoji style frog"),
    ("frog", "fxemoji", "an fxemoji style frog"),
    ("grapes", "noto", "noto style grapes"),
    ("sun with face", "fluent", "the fluent style sun with face"),
  ],
)
def test_captions_of_styles_name_object_and_style(name, style, first):
  captions = emoji_catalogue.style_captions(name, style)
  noun = emoji_catalogue.with_article(name)
  assert captions[:2] == (first, f"{noun} in {style} style")
  assert len(set(captions)) == 6
  assert all(name in c and style in c.split(",")[-1] for c in captions)


@pytest.mark.parametrize(
  ("name", "noun"),
  [
    ("owl", "an owl"),
    ("unicorn", "a unicorn"),
    ("ewe", "a ewe"),
    ("one-piece swimsuit", "a one-piece swimsuit"),
    ("hourglass done", "an hourglass done"),
    ("umbrella", "an umbrella"),
    ("OK hand", "an OK hand"),
    ("SOS button", "an SOS button"),
    ("x-ray", "an x-ray"),
    ("octopus", "an octopus"),
    ("rhinoceros", "a rhinoceros"),
    ("dress", "a dress"),
    ("cherries", "cherries"),
    ("women with bunny ears", "women with bunny ears"),
    ("face with big eyes", "a face with big eyes"),
    ("cooked rice", "cooked rice"),
    ("sun behind cloud", "the sun behind cloud"),
    ("no smoking", "no smoking"),
    ("Santa Claus: light skin tone", "Santa Claus: light skin tone"),
  ],
)
def test_articles(name, noun):
  assert emoji_catalogue.with_article(name) == noun


def test_nothing_handed_or_lettered_is_flippable(entries):
  flippable = {e.name for e in entries if e.flippable}
  words = ("left", "right", "leftwards", "rightwards")
  for name in flippable:
    assert not set(name.replace("-", " ").split()) & set(words), name
  assert {"frog", "strawberry", "rocket"} <= flippable
  assert not flippable & {
    "three o'clock", "hundred points", "stop sign", "first quarter moon",
    "keycap 1", "flag of Germany", "person running", "A button (blood type)",
  }  # fmt: skip


def test_spellings_of_a_picture_are_one():
  assert emoji_catalogue.spelling("1F43B-200D-2744-FE0F") == (
    emoji_catalogue.spelling("1F43B-200D-2744")
  )
  assert emoji_catalogue.spelling("1F44B-1F3FB") == "1F44B-1F3FB"
  assert emoji_catalogue.base("1F44B-1F3FB") == "1F44B"
  assert emoji_catalogue.base("1F3FB") == "1F3FB"  # the swatch itself


def test_holdout_is_about_its_percentage_and_ignores_skin_tones(entries):
  fraction = emoji_catalogue.holdout_fraction
  held_out = [e for e in _plain(entries) if fraction(e.code_point) < 0.1]
  assert 0.08 < len(held_out) / 1745 < 0.12
  assert fraction("1F44B-1F3FB") == fraction("1F44B") != fraction("1F44C")
  assert all(0 <= fraction(e.code_point) < 1 for e in entries)
  # Pinned: a change moves pictures between training and validation.
  assert fraction("1F438") == pytest.approx(0.3112195876892656)
