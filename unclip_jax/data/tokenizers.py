"""Text <-> token ids with SentencePiece.

Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) with byte
fallback, so that every text, emoji included, has tokens. Text is normalised
by NFKC and case folding: "A Frog" and "a frog" are the same prompt.

Ids: 0 padding, 1 unknown (never seen, for the byte fallback), 2 begin of
sequence, 3 end of sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from unclip_jax.utils.errors import UserError

PAD, UNK, BOS, EOS = range(4)

# Nothing that a person writes; longer text would only be truncated anyway.
_MAX_CHARS = 10_000


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
  """A trained tokenizer.

  Fields:
    path: the SentencePiece model file.
  """

  path: str

  @property
  def vocab_size(self) -> int:
    """Ids are in [0, vocab_size)."""
    return self._processor.vocab_size()

  def encode(
    self, texts: Sequence[str], context_length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with begin and end of sequence, padded at the end.

    A text that is too long keeps its first tokens and its end of sequence,
    which is logged once. The empty text is just begin and end.

    Args:
      texts: B texts of any content; control characters and lone surrogates
        are dropped.
      context_length: L, at least 2.

    Returns:
      text_tokens [B, L] int32, and text_mask [B, L] bool, True at real tokens
      (begin and end included).

    Raises:
      UserError: the context is shorter than 2 tokens, or the model file is
        missing or broken.
    """
    if context_length < 2:
      raise UserError(
        f"context_length is {context_length}, but begin and end of sequence"
        " alone need 2"
      )
    text_tokens = np.full((len(texts), context_length), PAD, np.int32)
    text_mask = np.zeros((len(texts), context_length), bool)
    encoded = self._processor.encode([_sanitise(text) for text in texts])
    for row, ids in enumerate(encoded):
      room = context_length - 2
      if len(ids) > room:
        logging.log_first_n(
          logging.WARNING,
          "a caption of %d tokens is cut to the context of %d (this is said"
          " once): %.60r",
          1,
          len(ids) + 2,
          context_length,
          texts[row],
        )
      ids = [BOS, *ids[:room], EOS]
      text_tokens[row, : len(ids)] = ids
      text_mask[row, : len(ids)] = True
    return text_tokens, text_mask

  def decode(self, text_tokens: np.ndarray) -> list[str]:
    """The texts (normalised) of token ids [B, L]; special ids are dropped."""
    rows = [[int(i) for i in row if i > EOS] for row in text_tokens]
    return self._processor.decode(rows)

  @functools.cached_property
  def _processor(self) -> Any:
    import sentencepiece

    if not os.path.isfile(self.path):
      raise UserError(
        f"there is no tokenizer file {self.path!r}: mend the path, or delete"
        " its folder if it is that of a dataset, which is then prepared again"
      )
    try:
      return sentencepiece.SentencePieceProcessor(model_file=self.path)
    except (OSError, RuntimeError) as e:
      raise UserError(
        f"{self.path!r} is no SentencePiece model, or is damaged: put the"
        " original file back"
      ) from e


def train(captions: Sequence[str], vocab_size: int, path: str) -> None:
  """Trains a tokenizer and writes it to `path`, byte for byte the same always.

  Args:
    captions: what to learn the pieces from.
    vocab_size: an upper bound; 256 bytes and 4 special ids are part of it.
      Few captions give fewer pieces.
    path: written as a whole or not at all.
  """
  import sentencepiece

  if vocab_size < 320:
    raise UserError(
      f"a vocabulary of {vocab_size} is too small: 256 bytes and 4 special"
      " ids are part of it, so ask for 320 or more"
    )
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([_sanitise(caption) for caption in captions]),
    model_writer=model,
    model_type="bpe",
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=0.9995,
    normalization_rule_name="nmt_nfkc_cf",
    pad_id=PAD,
    unk_id=UNK,
    bos_id=BOS,
    eos_id=EOS,
    num_threads=1,  # the order of additions, and so the result, is fixed
    minloglevel=2,
  )
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  part = f"{path}.{os.getpid()}.part"
  with open(part, "wb") as file:
    file.write(model.getvalue())
  os.replace(part, path)


def _sanitise(text: str) -> str:
  """Without control characters and lone surrogates, which SentencePiece
  refuses or turns into junk; white space stays."""
  text = text[:_MAX_CHARS]
  return "".join(
    " " if c.isspace() else c
    for c in text
    if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs")
  )
