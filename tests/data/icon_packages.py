"""Small archives in the form of emoji_packages.PACKAGES, for tests."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import pathlib
import tarfile
from collections.abc import Mapping
from typing import Any

from unclip_jax.data import emoji_packages

COLOURS = {
  "noto": "#c81e1e",
  "twemoji": "#1ec81e",
  "fluent": "#1e1ec8",
  "fxemoji": "#c8c81e",
}


def disc(style: str) -> dict[str, Any]:
  """An icon: a disc of the style's colour that leaves the corners clear."""
  return {"body": f'<circle cx="8" cy="8" r="7" fill="{COLOURS[style]}"/>'}


def pack(
  folder: pathlib.Path,
  chars: Mapping[str, Mapping[str, str]],
  icons: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[emoji_packages.Package, ...]:
  """Writes an archive for each style; returns packages with their hashes.

  Args:
    folder: where to.
    chars: style -> code point -> slug. FxEmoji's archive does not tell them.
    icons: style -> slug -> icon, beside the discs of `chars`.
  """
  packages = []
  for package in emoji_packages.PACKAGES:
    style = package.style
    drawn = {slug: disc(style) for slug in chars[style].values()}
    drawn.update((icons or {}).get(style, {}))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
      for name, content in {
        "icons": {"width": 16, "height": 16, "icons": drawn},
        "chars": {} if style == "fxemoji" else chars[style],
        "info": {
          "name": f"{style} icons",
          "author": {"name": f"{style} artists", "url": f"at/{style}"},
          "license": {"title": f"{style} licence", "url": f"by/{style}"},
        },
      }.items():
        text = json.dumps(content).encode()
        member = tarfile.TarInfo(f"package/{name}.json")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    (folder / package.archive).write_bytes(data.getvalue())
    digest = hashlib.sha512(data.getvalue()).digest()
    sha512 = base64.b64encode(digest).decode()
    packages.append(dataclasses.replace(package, sha512=sha512))
  return tuple(packages)
