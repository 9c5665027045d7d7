"""What a source of captioned pictures is, and what all sources share.

A source is a module with a frozen dataclass `Source` whose fields are exactly
the keys of `config.data.source`. It gives records by position; the pipeline
does everything else.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SPLITS = ("train", "validation", "all")


@dataclasses.dataclass(frozen=True)
class Record:
  """One captioned picture.

  Fields:
    image: the encoded picture (PNG, JPEG or WEBP).
    code_point: its key in the source, for emoji "1F438".
    name: the canonical caption.
    group: the subset that it belongs to, "animals".
    captions: phrasings of the same content, the canonical one first.
    flippable: whether the mirrored picture still fits the captions.
    info: what else is known of it, for evaluators.
  """

  image: bytes = dataclasses.field(repr=False)
  code_point: str
  name: str
  group: str
  captions: tuple[str, ...]
  flippable: bool
  info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Source(Protocol):
  """Records in a fixed order."""

  def records(self, split: str) -> Sequence[Record]:
    """The records of a split, at least of those in SPLITS; prepares at need.

    Raises:
      UserError: no such split, nothing in it, or damaged files.
    """

  def tokenizer_path(self) -> str:
    """The tokenizer trained on the captions; prepares at need."""


def default_data_dir() -> str:
  """$UNCLIP_DATA_DIR, else ~/.cache/unclip_jax."""
  fallback = os.path.join("~", ".cache", "unclip_jax")
  return os.path.expanduser(os.environ.get("UNCLIP_DATA_DIR") or fallback)
