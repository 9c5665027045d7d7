"""npm packages of icons: fetched, checked, and read by code point."""

import collections
import os

import numpy as np
import pytest

from tests.data import icon_packages
from unclip_jax.data import (
  emoji_catalogue,
  emoji_dataset_builder,
  emoji_packages,
  preprocess,
)
from unclip_jax.utils.errors import UserError

CHARS = {
  "noto": {"1f438": "frog", "1f43b-200d-2744": "polar-bear"},
  "twemoji": {"1f438": "frog", "1f41c": "ant"},
  "fluent": {"1f438": "frog", "1f41c": "ant"},
  "fxemoji": {"1F438": "frog", "1F42B": "bactriancamel"},
}
ICONS = {
  "twemoji": {
    "ant": {"body": '<path fill="#c81e1e" d="M0 0h16v8H0z"/>', "height": 8}
  },
  "fluent": {
    "ant": {"body": '<path fill="#c81e1e" d="M0 0h8v16H0z"/>', "width": 8},
    "old-frog": {"body": "", "hidden": True},
  },
  "fxemoji": {"foxgrin": {"body": ""}},
}


@pytest.fixture
def npm_dir(tmp_path, monkeypatch):
  folder = tmp_path / "npm"
  folder.mkdir()
  packages = icon_packages.pack(folder, CHARS, ICONS)
  monkeypatch.setattr(emoji_packages, "PACKAGES", packages)
  return folder


def sets(npm_dir):
  return {s.style: s for s in emoji_packages.read(str(npm_dir))}


def pixels(svg, size=16):
  png = emoji_dataset_builder.rasterise(svg, size)
  return np.asarray(preprocess.decode(png, name="icon")).astype(int)


def test_icons_are_found_by_code_points(npm_dir):
  read = sets(npm_dir)
  assert tuple(read) == emoji_packages.STYLES[1:]
  for style, chars in CHARS.items():
    assert set(read[style].svgs) == {k.upper() for k in chars}


def test_clear_parts_become_white(npm_dir):
  red, green, blue = (
    pixels(sets(npm_dir)[style].svgs["1F438"])
    for style in ("noto", "twemoji", "fluent")
  )
  for picture, channel in ((red, 0), (green, 1), (blue, 2)):
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert picture[8, 8].argmax() == channel


@pytest.mark.parametrize("style, axis", [("twemoji", 0), ("fluent", 1)])
def test_oblong_icons_are_not_stretched(style, axis, npm_dir):
  ant = pixels(sets(npm_dir)[style].svgs["1F41C"])
  is_red = np.moveaxis(ant[..., 1] < 128, axis, 0)
  assert is_red[4:12].all() and not is_red[:4].any() and not is_red[12:].any()


def test_what_is_left_out_is_told(npm_dir):
  read = sets(npm_dir)
  assert read["fxemoji"].left_out == ("foxgrin",)
  assert read["fluent"].left_out == ()  # withdrawn ones are no loss


def test_the_licence_is_the_packages_own(npm_dir):
  assert sets(npm_dir)["noto"].attribution == (
    "noto icons by noto artists (at/noto), licence noto licence (by/noto)"
  )
  fxemoji = sets(npm_dir)["fxemoji"].attribution
  assert "fxemoji licence" in fxemoji and "CC BY 4.0" in fxemoji


@pytest.mark.parametrize(
  ("slug", "code_point"),
  [
    ("frog", "1F438"),  # CLDR's name
    ("bactriancamel", "1F42B"),  # Unicode's
    ("triumph", "1F624"),  # a usual one
    ("beating-heart", "1F493"),
    ("hampster", "1F439"),
    ("dog", "1F436"),  # is drawn as a dog's face
    ("dogside", "1F415"),
    ("franceflag", "1F1EB-1F1F7"),
    ("couple", "1F491"),  # where the name would tell something else
    ("fog", None),  # is all but blank
    ("foxgrin", None),
  ],
)
def test_slugs_of_fxemoji(slug, code_point):
  assert emoji_packages.code_points([slug]) == (
    {} if code_point is None else {code_point: slug}
  )


def test_the_slugs_that_were_told_by_pictures():
  words = emoji_packages._FX_CODE_POINTS.split()
  told = dict(zip(words[::2], words[1::2]))
  left_out = set(emoji_packages._FX_LEFT_OUT.split())
  assert len(told) == len(words) / 2 and not left_out & set(told)
  counts = collections.Counter(told.values())
  assert [k for k, n in counts.items() if n > 1] == []
  names = emoji_packages._names()
  for slug, code_point in told.items():
    assert emoji_catalogue.describe(code_point) is not None, slug
    assert names.get(emoji_packages._squash(slug)) != code_point, slug


def fake_npm(tmp_path, monkeypatch, script):
  """Puts a shell script in npm's place, and nothing else on the path."""
  folder = tmp_path / "bin"
  folder.mkdir()
  npm = folder / "npm"
  npm.write_text(f"#!/bin/sh\n{script}\n")
  npm.chmod(0o755)
  monkeypatch.setenv("PATH", str(folder))


def test_npm_fetches_the_pinned_versions(npm_dir, tmp_path, monkeypatch):
  script = f'echo "$@" > {tmp_path}/asked\n/bin/cp {npm_dir}/*.tgz .'
  fake_npm(tmp_path, monkeypatch, script)
  assert emoji_packages.read(None) == emoji_packages.read(str(npm_dir))
  asked = (tmp_path / "asked").read_text().split()
  assert asked[0] == "pack"
  assert asked[-4:] == [package.spec for package in emoji_packages.PACKAGES]
  assert "@iconify-json/noto@1.2.9" in asked


def _no_npm(npm_dir, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))


def _offline(npm_dir, tmp_path, monkeypatch):
  script = "echo 'npm error code ENOTFOUND' >&2; exit 1"
  fake_npm(tmp_path, monkeypatch, script)


def _missing(npm_dir, tmp_path, monkeypatch):
  os.remove(npm_dir / emoji_packages.PACKAGES[2].archive)
  return npm_dir


def _another(npm_dir, tmp_path, monkeypatch):
  path = npm_dir / emoji_packages.PACKAGES[2].archive
  data = bytearray(path.read_bytes())
  data[-9] ^= 1
  path.write_bytes(data)
  return npm_dir


@pytest.mark.parametrize(
  ("fault", "words"),
  [
    (_no_npm, ["no npm", "install it", "npm pack @iconify", "npm_dir"]),
    (_offline, ["ENOTFOUND", "online", "npm pack @iconify", "npm_dir"]),
    (_missing, ["cannot read", "fluent", "npm pack @iconify-json/fluent"]),
    (_another, ["fluent", "sha512", "fetch it again"]),
  ],
)
def test_faults_are_one_line(fault, words, npm_dir, tmp_path, monkeypatch):
  folder = fault(npm_dir, tmp_path, monkeypatch)
  with pytest.raises(UserError) as error:
    emoji_packages.read(folder and str(folder))
  for word in words:
    assert word in str(error.value)
  assert "\n" not in str(error.value)
