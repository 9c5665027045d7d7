"""What a source of captioned pictures is, and what all sources share.

A source is a module with a frozen dataclass `Source` whose fields are exactly
the keys of `config.data.source`. It gives records by position; the pipeline
does everything else.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from unclip_jax.utils.errors import UserError

if TYPE_CHECKING:
  import numpy as np

SPLITS = ("train", "validation", "all")
# Arrays with a row for each caption, of which an example has its own.
CAPTION_ARRAYS = ("text_embed", "text_encodings")
NO_CAPTION = "no caption"  # a reason of BrokenRecord


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
    arrays: what was computed of it before; of CAPTION_ARRAYS a row a caption.
    arrays: name -> array that goes into the batch under that name, such as an
      `image_embed` [D] computed before; all records of a source hold the same.
  """

  image: bytes = dataclasses.field(repr=False)
  code_point: str
  name: str
  group: str
  captions: tuple[str, ...]
  flippable: bool
  info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Arrays have no one truth value by which records could be compared.
  arrays: Mapping[str, np.ndarray] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )


class ArrayShape(NamedTuple):
  """Of an array of a record, without the batch."""

  shape: tuple[int, ...]
  dtype: np.dtype


class BrokenRecord(UserError):
  """A record that cannot be used; the pipeline takes the next one for it."""

  def __init__(self, reason: str, message: str):
    """Args:
    reason: a few words, the same for all of its kind, to count them by.
    message: as that of any UserError.
    """
    super().__init__(reason, message)  # both, for pickle
    self.reason = reason

  def __str__(self) -> str:
    return self.args[1]


class Source(Protocol):
  """Records in a fixed order.

  One whose records hold `arrays` has a property `array_shapes`, which maps
  their names to ArrayShapes, and may have `made_by`, which maps the name of an
  upstream model to the fingerprint of the one that they come from.
  """

  def records(self, split: str) -> Sequence[Record]:
    """The records of a split, at least of those in SPLITS; prepares at need.

    Asking for one that cannot be used raises BrokenRecord.

    Raises:
      UserError: no such split, nothing in it, or damaged files.
    """

  def tokenizer_path(self) -> str:
    """The tokenizer trained on the captions; prepares at need."""


def default_data_dir() -> str:
  """$UNCLIP_DATA_DIR, else ~/.cache/unclip_jax."""
  fallback = os.path.join("~", ".cache", "unclip_jax")
  return os.path.expanduser(os.environ.get("UNCLIP_DATA_DIR") or fallback)
