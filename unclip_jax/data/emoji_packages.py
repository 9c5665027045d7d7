"""Emoji in four more styles, from the npm packages of Iconify.

  style     package                           artist, licence (info.json)
  noto      @iconify-json/noto                Google, Apache-2.0
  twemoji   @iconify-json/twemoji             Twitter, CC BY 4.0
  fluent    @iconify-json/fluent-emoji-flat   Microsoft, MIT
  fxemoji   @iconify-json/fxemoji             Mozilla, Apache-2.0

Each holds all pictures of its style as the insides of SVGs (`icons.json`, the
format IconifyJSON) by slug, "polar-bear", and tells the slug of each code point
(`chars.json`). FxEmoji's does not: its slugs ("bactriancamel") are read as
names, CLDR's, Unicode's or usual ones without what is between the words, but
for those of _FX_CODE_POINTS, which were told by their pictures.

The packages are fetched by npm in versions whose sha512 stands here.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from unclip_jax.data import emoji_catalogue
from unclip_jax.utils.errors import UserError

_TIMEOUT = 600  # seconds for 7 MB


@dataclasses.dataclass(frozen=True)
class Package:
  """One npm package.

  Fields:
    style: of its pictures, in one word.
    name: without the scope.
    version: of the package.
    sha512: of its archive, in base64, as npm says it.
    note: on its licence, beside what its info.json says.
  """

  style: str
  name: str
  version: str
  sha512: str
  note: str = ""

  @property
  def spec(self) -> str:
    """What npm is asked for."""
    return f"@iconify-json/{self.name}@{self.version}"

  @property
  def archive(self) -> str:
    """The name that `npm pack` gives its file."""
    return f"iconify-json-{self.name}-{self.version}.tgz"


PACKAGES = (
  Package(
    "noto",
    "noto",
    "1.2.9",
    "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rc"
    "KF0mqHYeZVAuaw==",
  ),
  Package(
    "twemoji",
    "twemoji",
    "1.2.5",
    "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLl"
    "j41WU6/mvgALsw==",
  ),
  Package(
    "fluent",
    "fluent-emoji-flat",
    "1.2.6",
    "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYv"
    "uaSYM1M4fRXlUw==",
  ),
  Package(
    "fxemoji",
    "fxemoji",
    "1.2.2",
    "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAi"
    "fr5jP4kn78DpiQ==",
    note="Mozilla's own LICENSE.md puts the drawings under CC BY 4.0",
  ),
)
STYLES = ("openmoji", *(package.style for package in PACKAGES))

_OR = (
  "or run `npm pack "
  + " ".join(package.spec for package in PACKAGES)
  + "` elsewhere and name the folder with the four files as npm_dir"
)
_ONLINE = f"try again when online, {_OR}"

# Slug and code points, where the name would not tell or mislead.
_FX_CODE_POINTS = """
2hearts 1F495 acorn 1F330 americasglobe 1F30E anguish 1F627
anticlockwiseupwardsanddownwardsarrows 1F504 aok 1F44C
arrowrightwardsdownwards 2935 arrowrightwardsupwards 2934
asiaaustraliaglobe 1F30F backwithleftwardsarrow 1F519 banknotedollar 1F4B5
banknoteeuro 1F4B6 banknotepound 1F4B7 banknoteyen 1F4B4 bellcancellation 1F515
blackdownpointingdoublearrow 23EC blackleftpointingarrow 25C0
blackleftpointingdoublearrow 23EA blackrightpointingarrow 25B6
blackrightpointingdoublearrow 23E9 blackskullcrossbones 2620
blackuppointingdoublearrow 23EB blonde 1F471 bolt 26A1 bookmarktab 1F4D1
bow 1F380 bowing 1F647 bride 1F470 bunny 1F430 bunny-ears 1F46F bunnyside 1F407
cat 1F431 catside 1F408 cellphone 1F4F1 chartdownwardstrend 1F4C9
chartupwardstrend 1F4C8 chartupwardstrendyen 1F4B9 chilipepper 1F336
chineseflag 1F1E8-1F1F3 clock12oclock 1F55B clock12thirty 1F567
clock1oclock 1F550 clock1thirty 1F55C clock2oclock 1F551 clock2thirty 1F55D
clock3oclock 1F552 clock3thirty 1F55E clock4oclock 1F553 clock4thirty 1F55F
clock5thirty 1F560 clock6oclock 1F555 clock6thirty 1F561 clock7oclock 1F556
clockwiserightwardsleftwardscirclearrows 1F501
clockwiserightwardsleftwardscirclearrowsone 1F502 closedmailboxlowered 1F4EA
closedmailboxraised 1F4EB confetti 1F38A construct 1F477 construction 1F3D7
contact 1F464 contact2 1F465 controlknob 1F39B couple 1F491 crying 1F622
devilhorns 1F608 diamondshapewithdotinside 1F4A0 dissapointedrelief 1F625
dog 1F436 dogside 1F415 doubleexclaimationmark 203C down 1F447
downpointingsmallredtrisngle 1F53D dragonhead 1F432 dragonside 1F409
eightspokedasterix 2733 endwithleftwardsarrow 1F51A
envelopedownarrowabove 1F4E9 europeafricaglobe 1F30D evergreen 1F332
exclaimationquestionmark 2049 fallingleaf 1F342 fishcakeswirl 1F365
fistedhand 1F44A flexbicep 1F4AA forkknife 1F37D franceflag 1F1EB-1F1F7
frontfacingchick 1F425 frown 1F64D frownmouth 1F626 girlgirl 1F46D
girlguy 1F46B gma 1F475 gpa 1F474 greatbritainflag 1F1EC-1F1E7 grineyes 1F604
grinsquint 1F606 grinsweat 1F605 grintears 1F602 grinwide 1F603 guapimao 1F472
guyguy 1F46C halo 1F607 hampster 1F439 hands 1F450 handup 1F64B
headmassage 1F486 heartarrow 1F498 heartgreen 1F49A heartpurple 1F49C
heartribbon 1F49D heartyellow 1F49B heavymultiplicationsymbol 2716 heels 1F460
high5 1F64C highspeedtrainbulletnose 1F685 index 261D italianflag 1F1EE-1F1F9
japaneseangrymask 1F47A japanflag 1F1EF-1F1F5 kissclosedeyes 1F61A
kisseyes 1F619 koreaflag 1F1F0-1F1F7 leaffluttering 1F343 left 1F448
leftmagnifyingglass 1F50D leopardside 1F406 lockandkey 1F510 loudlycrying 1F62D
lowerleftpen 1F58A makeupbag 1F45D manltepiececlock 1F570 mansshirt 1F455
medicalmask 1F637 mensrunner 1F45F mensshoe 1F45E meridianglobe 1F310
monkeyhear 1F649 monkeysee 1F648 monkeyspeak 1F64A mouse 1F42D mouseside 1F401
negativesquaredlatincaptiala 1F170 negativesquaredlatincaptialb 1F171
negativesquaredlatincaptialo 1F17E neutral 1F610 nogesture 1F645
nooneunder18symbol 1F51E notebookdecorativecover 1F4D4 okgesture 1F646
onarrowleftright 1F51B openmailboxlowered 1F4ED openmailboxraised 1F4EC
outbox 1F4E4 perservere 1F623 phonerightarrowleft 1F4F2 pig 1F437 pigside 1F416
pigsnout 1F43D pinkwallet 1F45B poo 1F4A9 potablewatersystem 1F6B0 pout 1F64E
pouting 1F621 present 1F381 racecar 1F3CE raincloud 1F327
raisedhandpartfingers 1F596 raisedhandsfingerssplayed 1F590 reminder 1F397
reversehandmiddlefinger 1F595 right 1F449 rightmagnifyingglass 1F50E
russianflag 1F1F7-1F1FA saggitarius 2650 sandals 1F461 screamfear 1F631
silhouetteohjapan 1F5FE sixpointedstarwithdot 1F52F sleuthspy 1F575
smallfrown 1F641 smallsmile 1F642 smileeyes 1F60A smiletongue 1F60B
snowcloud 1F328 snowmountains 1F3D4 soonwithrightarrow 1F51C
spanishflag 1F1EA-1F1F8 speaker3soundwaves 1F50A speakercancellation 1F507
speakeronesoundwave 1F509 speechbubble 1F4AC spurtingwhale 1F433
squaredup 1F199 star 1F31F stormcloud 1F329 studiomic 1F399 sunglasses 1F60E
sunraincloud 1F326 sunrays 2600 sweatsplash 1F4A6 swimming 1F3CA
telephonereceiver2 1F4DE tennisball 1F3BE thoughtbaloon 1F4AD tie 1F454
tiger 1F42F tigerside 1F405 tired 1F62B tongueout 1F61B tongueoutwink 1F61C
tongueoutwink2 1F61D topwithupwardsarrow 1F51D toykotower 1F5FC turban 1F473
umbrella 1F302 up 1F446 uppointingsmallredtrisngle 1F53C videocasette 1F4FC
waitress 1F481 waningbibbousmoon 1F316 wave 1F30A waving 1F44B
whiteexclaimationmark 2755 whitesunsmallcloud 1F324 winking 1F609
womansshirt 1F45A
"""
# What is drawn is not what the slug says, or is drawn a second time, or broken.
_FX_LEFT_OUT = """
blackdroplet fog heartblue keyboard kiss lips oldpersonalcomputer
personalcomputer tramcar whitemediumstar whitesun
"""


@dataclasses.dataclass(frozen=True)
class IconSet:
  """The pictures of one style.

  Fields:
    style: one of STYLES.
    svgs: by code points without variation selectors, "1F43B-200D-2744"; each
      is square and transparent.
    left_out: slugs of which no code points are known.
    attribution: the artist, licence, and where to find both; one line.
  """

  style: str
  svgs: Mapping[str, str]
  left_out: tuple[str, ...]
  attribution: str


def read(npm_dir: str | None) -> tuple[IconSet, ...]:
  """The icon sets of PACKAGES, in their order.

  Args:
    npm_dir: a folder with their archives, as `npm pack` writes them; None: npm
      fetches them.

  Raises:
    UserError: no npm, or it cannot fetch; an archive is missing or another.
  """
  with tempfile.TemporaryDirectory() as temporary:
    if npm_dir is None:
      npm_dir = temporary
      _npm_pack(temporary)
    return tuple(_read(package, npm_dir) for package in PACKAGES)


def _npm_pack(folder: str) -> None:
  """Has npm download the archives into a folder."""
  npm = shutil.which("npm")
  if npm is None:
    raise UserError(f"there is no npm to fetch emoji with: install it, {_OR}")
  # By itself npm tries for minutes to reach a network that is not there.
  command = [npm, "pack", "--ignore-scripts", "--fetch-retries=1"]
  try:
    done = subprocess.run(
      [*command, *(package.spec for package in PACKAGES)],
      cwd=folder,  # no .npmrc of some project
      capture_output=True,
      text=True,
      timeout=_TIMEOUT,
    )
  except (OSError, subprocess.TimeoutExpired) as e:
    raise UserError(f"npm could not fetch the emoji ({e}): {_ONLINE}") from e
  if done.returncode:
    errors = re.findall(r"npm (?:error|ERR!) (.*)", done.stderr)
    reason = " ".join(" ".join(errors[:2]).split())[:200]
    raise UserError(f"npm could not fetch the emoji ({reason}): {_ONLINE}")


def _read(package: Package, folder: str) -> IconSet:
  path = os.path.join(folder, package.archive)
  try:
    with open(path, "rb") as file:
      data = file.read()
  except OSError as e:
    raise UserError(
      f"cannot read {path} ({e.strerror}): run `npm pack {package.spec}` in"
      " that folder"
    ) from e
  if base64.b64encode(hashlib.sha512(data).digest()).decode() != package.sha512:
    raise UserError(
      f"{path} is not what npm has as {package.spec} (its sha512 is another):"
      " delete it and fetch it again"
    )
  with tarfile.open(fileobj=io.BytesIO(data)) as archive:

    def load(name: str) -> Any:
      file = archive.extractfile(f"package/{name}.json")
      assert file is not None
      return json.load(file)

    icons, chars, info = load("icons"), load("chars"), load("info")
  slugs = {k.upper(): v for k, v in chars.items()}
  slugs = slugs or code_points(icons["icons"])
  known = set(slugs.values())
  return IconSet(
    style=package.style,
    svgs={k: _svg(icons, slug) for k, slug in slugs.items()},
    left_out=tuple(
      slug
      for slug, icon in icons["icons"].items()
      if slug not in known and not icon.get("hidden")  # withdrawn ones
    ),
    attribution=_attribution(package, info),
  )


def _attribution(package: Package, info: Mapping[str, Any]) -> str:
  author, licence = info["author"], info["license"]
  note = f"; {package.note}" if package.note else ""
  return (
    f"{info['name']} by {author['name']} ({author['url']}), licence"
    f" {licence['title']} ({licence['url']}){note}"
  )


def _svg(icons: Mapping[str, Any], slug: str) -> str:
  """A square SVG; the few oblong pictures are put in the middle."""
  icon = icons["icons"][slug]
  width, height = (
    icon.get(side, icons.get(side, 16)) for side in ("width", "height")
  )
  side = max(width, height)
  box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
  return (
    '<svg xmlns="http://www.w3.org/2000/svg"'
    ' xmlns:xlink="http://www.w3.org/1999/xlink"'
    f' viewBox="{box}">{icon["body"]}</svg>'
  )


def code_points(slugs: Iterable[str]) -> dict[str, str]:
  """From code points without variation selectors to the slug of FxEmoji."""
  told = dict(zip(*[iter(_FX_CODE_POINTS.split())] * 2))
  left_out = set(_FX_LEFT_OUT.split())
  found = {
    told.get(slug) or _names().get(_squash(slug)): slug
    for slug in slugs
    if slug not in left_out
  }
  return {k: slug for k, slug in found.items() if k is not None}


@functools.cache
def _names() -> dict[str, str]:
  """From names of all sorts, squashed, to code points; the best sort wins."""
  import emoji

  sequences = {
    text: "-".join(f"{ord(c):04X}" for c in text.replace("\ufe0f", ""))
    for text in emoji.EMOJI_DATA
  }
  names: dict[str, str] = {}
  for code_point in sequences.values():
    entry = emoji_catalogue.describe(code_point)
    if entry is not None:
      names.setdefault(_squash(entry.name), code_point)
  for number in range(0x20, 0x20000):
    names.setdefault(
      _squash(unicodedata.name(chr(number), "")), f"{number:04X}"
    )
  for text, code_point in sequences.items():
    for alias in emoji.EMOJI_DATA[text].get("alias", ()):
      names.setdefault(_squash(alias), code_point)
  del names[""]
  return names


def _squash(name: str) -> str:
  return re.sub(r"[^a-z0-9]", "", name.lower())
