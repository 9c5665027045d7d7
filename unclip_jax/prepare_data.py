"""Prepares the emoji dataset ahead of its first use, which would do so too.

unclip prepare_data --image_size=64 [--data_dir=DIR]

With --styles the emoji_styles dataset: four more styles, which npm fetches, or
which --npm_dir holds.
"""

from __future__ import annotations

from absl import flags

from unclip_jax.data import emoji, emoji_styles
from unclip_jax.utils import programs

DATA_DIR = flags.DEFINE_string(
  "data_dir",
  None,
  "Where datasets are kept; $UNCLIP_DATA_DIR or ~/.cache/unclip_jax if unset.",
)
IMAGE_SIZE = flags.DEFINE_integer(
  "image_size", 64, "Side of the stored pictures in pixels."
)
LIMIT = flags.DEFINE_integer(
  "limit", None, "Prepare only so many pictures, for a trial; all if unset."
)
STYLES = flags.DEFINE_bool("styles", False, "Emoji in five styles, not one.")
NPM_DIR = flags.DEFINE_string(
  "npm_dir",
  None,
  "With --styles: a folder with what `npm pack` fetched; npm fetches if unset.",
)


def main() -> None:
  fields = dict(
    data_dir=DATA_DIR.value, image_size=IMAGE_SIZE.value, limit=LIMIT.value
  )
  if STYLES.value:
    source = emoji_styles.Source(**fields, npm_dir=NPM_DIR.value)
  else:
    source = emoji.Source(**fields)
  print(source.prepare())


if __name__ == "__main__":
  programs.run(main)
