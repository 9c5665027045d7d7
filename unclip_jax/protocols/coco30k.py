"""The zero-shot FID on MS-COCO, as text-to-picture papers report it.

Ramesh et al. 2021 (section 3, followed by Ramesh et al. 2022, section 5.4 and
Table 2: 10.39): pictures for 30,000 captions of the validation set of 2014, at
256 pixels, compared with true pictures by the FID. Which captions, and how true
pictures are made square, differ from paper to paper and move the figure, so
both are pinned here:

  captions  of a folder with metadata.jsonl or metadata.csv (file_name, text;
            unclip_jax/data/folder.py): all pairs of picture and caption, in the
            order of the SHA-256 of "file_name, tab, caption", the first 30,000.
            The list is written beside the report; its own hash is in it, and
            `sha256` refuses any other
  pictures  the shorter side resized to the model's size (bicubic with
            antialiasing, data/preprocess.square), the middle cut out; the
            reference is either these or the statistics of a file

A figure that is to stand beside published ones needs the Inception
(`unclip convert --from inception`) and 30,000 captions; the paper's own used a
decoder guidance of 1.25.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from unclip_jax.data import folder
from unclip_jax.data.source import Record
from unclip_jax.evaluators import clip_score, fid
from unclip_jax.protocols import base
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Fields:
  folder: of the true pictures and their captions.
  num_images: captions of the list.
  guidance_scale: of the decoder.
  sha256: what the list's hash must be; None: whatever it is.
  reference: .npz file with mu and sigma in place of the true pictures.
  """

  folder: str
  num_images: int = 30_000
  guidance_scale: float = 1.25
  sha256: str | None = None
  reference: str | None = None

  def run(self, subject: base.Subject) -> base.Result:
    """One row: FID and its like, CLIP score, and how many pictures.

    Raises:
      UserError: there are too few captions, or it is another list.
    """
    pairs = Pairs.first(
      folder.Source(self.folder).records("all"), self.num_images
    )
    if len(pairs) < self.num_images:
      raise errors.UserError(
        f"coco30k.folder {self.folder} has {len(pairs)} captions of the"
        f" {self.num_images} that num_images asks for"
      )
    digest = pairs.sha256()
    if self.sha256 not in (None, digest):
      raise errors.UserError(
        f"coco30k.sha256 is {self.sha256}, and the list of {self.folder} has"
        f" {digest}: other captions, or other names of pictures"
      )
    data = dataclasses.replace(subject.data, source=_Source(pairs))
    subject = dataclasses.replace(subject, data=data, split="all")
    draw = subject.predict(
      "text_to_image", decoder=dict(guidance_scale=self.guidance_scale)
    )
    seen = subject.look(draw, self.num_images)
    row = {
      **base.measure(fid.Evaluator(reference=self.reference), seen),
      **base.measure(clip_score.Evaluator(), seen),
    }
    figures = {**subject.networks(), "sha256": digest}
    return base.Result([row], figures, texts={"captions": pairs.text()})


@dataclasses.dataclass(frozen=True)
class Pairs(Sequence[Record]):
  """Records with one caption each, in the order of a hash.

  Attributes:
    records: with pictures and all captions.
    places: (position in `records`, position of the caption).
  """

  records: Sequence[Record]
  places: Sequence[tuple[int, int]]

  @classmethod
  def first(cls, records: Sequence[Record], count: int) -> Pairs:
    """The first `count` of all pairs."""
    keys = {}
    for i, record in enumerate(records):
      for j, caption in enumerate(record.captions):
        line = _line(record, caption).encode("utf-8", "surrogateescape")
        keys[i, j] = hashlib.sha256(line).digest()
    return cls(records, sorted(keys, key=keys.__getitem__)[:count])

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, index: int) -> Record:
    i, j = self.places[index]
    record = self.records[i]
    caption = record.captions[j]
    return dataclasses.replace(record, name=caption, captions=(caption,))

  def text(self) -> str:
    """File name, tab, caption: a line for each pair."""
    return "".join(_line(record, record.name) + "\n" for record in self)

  def sha256(self) -> str:
    """Of `text`."""
    text = self.text().encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Source:
  pairs: Pairs

  def records(self, split: str) -> Pairs:
    del split
    return self.pairs


def _line(record: Record, caption: str) -> str:
  return f"{record.code_point}\t{caption}"
