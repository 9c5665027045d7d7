"""Text <-> token ids: SentencePiece, CLIP's byte-pair encoding, WordPiece.

The first two are byte-pair encodings (Sennrich et al. 2016, arXiv 1508.07909)
in which every text, emoji included, has tokens, and to both "A Frog" and "a
frog" are the same prompt. Which one a folder holds, its files tell (`load`).

SentencePiece is what is trained here: byte fallback, NFKC and case folding.
Ids: 0 padding, 1 unknown (never seen, for the byte fallback), 2 begin of
sequence, 3 end of sequence.

CLIP's (Radford et al. 2021, section 2.4) comes with foreign weights: letters of
a word together, digits and runs of other characters apart, their bytes merged
up to the end of the word. Its released code also mends mojibake and resolves
HTML entities first; neither is done here nor in transformers.

BERT's WordPiece (Devlin et al. 2018, section 3; Wu et al. 2016, arXiv
1609.08144) comes with foreign weights too: of each word the longest known piece
first. A word that its pieces do not make up is one unknown token.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from unclip_jax.utils.errors import UserError

PAD, UNK, BOS, EOS = range(4)

SENTENCEPIECE_FILE = "tokenizer.model"
# The last of them is optional, and may name a "pad_token".
BPE_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
BPE_BEGIN, BPE_END = "<|startoftext|>", "<|endoftext|>"
# The second is optional, and may say "do_lower_case".
WORDPIECE_FILES = ("vocab.txt", "tokenizer_config.json")
FILES = {SENTENCEPIECE_FILE, *BPE_FILES, *WORDPIECE_FILES}

# Nothing that a person writes; longer text would only be truncated anyway.
_MAX_CHARS = 10_000
_END_OF_WORD = "</w>"  # of CLIP's tokens


class Tokenizer(Protocol):
  """What turns captions into tokens; a frozen dataclass."""

  pad_id: int
  bos_id: int
  eos_id: int

  @property
  def vocab_size(self) -> int:
    """Ids are in [0, vocab_size)."""

  def encode(
    self, texts: Sequence[str], context_length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with begin and end of sequence, padded at the end.

    A text that is too long keeps its first tokens and its end of sequence,
    which is logged once. The empty text is just begin and end.

    Args:
      texts: B texts of any content; lone surrogates are dropped.
      context_length: L, at least 2.

    Returns:
      text_tokens [B, L] int32, and text_mask [B, L] bool, True at real tokens
      (begin and end included).

    Raises:
      UserError: the context is shorter than 2 tokens, or a file of the
        tokenizer is missing or broken.
    """

  def decode(self, text_tokens: np.ndarray) -> list[str]:
    """The texts (normalised) of token ids [B, L]; special ids are dropped."""

  def assets(self) -> dict[str, str]:
    """Name -> path of the files that it is made of, to be put beside a model.

    `load` finds it again in a folder that holds them by these names.
    """


def load(path: str) -> Tokenizer:
  """The tokenizer of a folder, or of a SentencePiece file.

  Args:
    path: a folder that holds tokenizer.model, or vocab.json and merges.txt, or
      vocab.txt; or a SentencePiece model file.

  Raises:
    UserError: the folder holds no tokenizer, or several.
  """
  if not os.path.isdir(path):
    return SentencePieceTokenizer(path)
  there = set(os.listdir(path))
  kinds = {
    SENTENCEPIECE_FILE: {SENTENCEPIECE_FILE},
    "vocab.json": {"vocab.json", "merges.txt"},
    "vocab.txt": {"vocab.txt"},
  }
  found = [name for name, files in kinds.items() if files <= there]
  if len(found) > 1:
    raise UserError(
      f"{path} holds two tokenizers, {found[0]} and {found[1]}: delete the one"
      " that is not this model's"
    )
  if not found:
    raise UserError(
      f"there is no tokenizer in {path}: put {SENTENCEPIECE_FILE} there,"
      " vocab.json and merges.txt, or vocab.txt"
    )
  if found == ["vocab.json"]:
    return BpeTokenizer(path)
  if found == ["vocab.txt"]:
    return WordPieceTokenizer(path)
  return SentencePieceTokenizer(os.path.join(path, SENTENCEPIECE_FILE))


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
  """A trained tokenizer; control characters of a text are dropped.

  Fields:
    path: the SentencePiece model file.
  """

  path: str

  pad_id = PAD
  bos_id = BOS
  eos_id = EOS

  @property
  def vocab_size(self) -> int:
    """Ids are in [0, vocab_size)."""
    return self._processor.vocab_size()

  def encode(
    self, texts: Sequence[str], context_length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """As `Tokenizer.encode`."""
    rows = self._processor.encode([_sanitise(text) for text in texts])
    return _padded(self, rows, texts, context_length)

  def decode(self, text_tokens: np.ndarray) -> list[str]:
    """The texts (normalised) of token ids [B, L]; special ids are dropped."""
    rows = [[int(i) for i in row if i > EOS] for row in text_tokens]
    return self._processor.decode(rows)

  def assets(self) -> dict[str, str]:
    """Name -> path of the model file."""
    return {SENTENCEPIECE_FILE: self.path}

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


@dataclasses.dataclass(frozen=True)
class BpeTokenizer:
  """The tokenizer of CLIP, from its public files.

  Ids are those of transformers' CLIPTokenizer, but for one thing: where a
  model pads with "!", as Karlo does, a "!" in a text is still the token that
  the model was trained with, not padding.

  Fields:
    folder: holds vocab.json (token -> id) and merges.txt, and optionally
      tokenizer_config.json, of which "pad_token" is read (the end of sequence,
      if there is none).
  """

  folder: str

  @property
  def vocab_size(self) -> int:
    """Ids are in [0, vocab_size)."""
    return self._tokenizer.get_vocab_size()

  @functools.cached_property
  def pad_id(self) -> int:
    path = os.path.join(self.folder, BPE_FILES[-1])
    token = BPE_END
    if os.path.isfile(path):
      token = _read_fields(path).get("pad_token") or BPE_END
    if isinstance(token, Mapping):  # with its properties, of which none count
      token = token.get("content")
    return self._id(token)

  @functools.cached_property
  def bos_id(self) -> int:
    return self._id(BPE_BEGIN)

  @functools.cached_property
  def eos_id(self) -> int:
    return self._id(BPE_END)

  def encode(
    self, texts: Sequence[str], context_length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """As `Tokenizer.encode`."""
    # One by one: a process that has used the library's threads, which short
    # texts gain nothing from, is warned at every fork.
    rows = [self._tokenizer.encode(_encodable(text)).ids for text in texts]
    return _padded(self, rows, texts, context_length)

  def decode(self, text_tokens: np.ndarray) -> list[str]:
    """The texts (normalised) of token ids [B, L], up to the end of each."""
    texts = []
    for row in text_tokens:
      ids = [int(i) for i in row if i != self.bos_id]
      end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
      text = self._tokenizer.decode(ids[:end], skip_special_tokens=False)
      texts.append(text.replace(_END_OF_WORD, " ").strip())
    return texts

  def assets(self) -> dict[str, str]:
    """Name -> path of the files that there are of BPE_FILES."""
    paths = {name: os.path.join(self.folder, name) for name in BPE_FILES}
    return {name: path for name, path in paths.items() if os.path.isfile(path)}

  def _id(self, token: str) -> int:
    token_id = self._tokenizer.token_to_id(str(token))
    if token_id is None:
      raise UserError(
        f"vocab.json in {self.folder} lacks the token {token}: it is not"
        " CLIP's; put the original file there"
      )
    return token_id

  @functools.cached_property
  def _tokenizer(self) -> Any:
    import tokenizers

    files = [os.path.join(self.folder, name) for name in BPE_FILES[:2]]
    try:
      model = tokenizers.models.BPE.from_file(
        *files, end_of_word_suffix=_END_OF_WORD, unk_token=BPE_END
      )
    except Exception as e:  # it raises nothing more special
      raise UserError(
        f"vocab.json and merges.txt in {self.folder} are missing or damaged"
        f" ({e}): put the original files there"
      ) from e
    tokenizer = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    white_space = tokenizers.Regex(r"\s+")
    tokenizer.normalizer = normalizers.Sequence(
      [
        normalizers.NFC(),
        normalizers.Replace(white_space, " "),
        normalizers.Lowercase(),
      ]
    )
    pre_tokenizers = tokenizers.pre_tokenizers
    words = tokenizers.Regex(
      r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(words, behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    # A text that spells them out means them, as in the released code.
    tokenizer.add_special_tokens([BPE_BEGIN, BPE_END])
    return tokenizer


@dataclasses.dataclass(frozen=True)
class WordPieceTokenizer:
  """The tokenizer of BERT, from its public files.

  Ids are those of transformers' BertTokenizer: begin of sequence is [CLS], end
  of sequence [SEP].

  Fields:
    folder: holds vocab.txt (a token a line) and optionally
      tokenizer_config.json, of which "do_lower_case" is read (true, if it does
      not say).
  """

  folder: str

  @property
  def vocab_size(self) -> int:
    """Ids are in [0, vocab_size)."""
    return self._tokenizer.get_vocab_size()

  @functools.cached_property
  def lowercase(self) -> bool:
    """Whether letters lose their case and their accents."""
    path = os.path.join(self.folder, WORDPIECE_FILES[-1])
    if not os.path.isfile(path):
      return True
    return bool(_read_fields(path).get("do_lower_case", True))

  @functools.cached_property
  def pad_id(self) -> int:
    return self._id("[PAD]")

  @functools.cached_property
  def bos_id(self) -> int:
    return self._id("[CLS]")

  @functools.cached_property
  def eos_id(self) -> int:
    return self._id("[SEP]")

  def encode(
    self, texts: Sequence[str], context_length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """As `Tokenizer.encode`."""
    rows = [self._tokenizer.encode(_encodable(text)).ids for text in texts]
    return _padded(self, rows, texts, context_length)

  def decode(self, text_tokens: np.ndarray) -> list[str]:
    """The texts (normalised) of token ids [B, L]; special ids are dropped."""
    special = {self.pad_id, self.bos_id, self.eos_id}
    rows = [[int(i) for i in row if i not in special] for row in text_tokens]
    return [self._tokenizer.decode(x, skip_special_tokens=False) for x in rows]

  def assets(self) -> dict[str, str]:
    """Name -> path of the files that there are of WORDPIECE_FILES."""
    paths = {name: os.path.join(self.folder, name) for name in WORDPIECE_FILES}
    return {name: path for name, path in paths.items() if os.path.isfile(path)}

  def _id(self, token: str) -> int:
    return self._tokenizer.token_to_id(token)

  @functools.cached_property
  def _tokenizer(self) -> Any:
    import tokenizers

    path = os.path.join(self.folder, WORDPIECE_FILES[0])
    try:
      model = tokenizers.models.WordPiece.from_file(path, unk_token="[UNK]")
    except Exception as e:  # it raises nothing more special
      raise UserError(
        f"{path} is missing or damaged ({e}): put the original file there"
      ) from e
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
      lowercase=self.lowercase
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    # A text that spells them out means them, as in the released code.
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for token in special:
      if tokenizer.token_to_id(token) is None:
        raise UserError(
          f"{path} lacks the token {token}: it is not BERT's; put the original"
          " file there"
        )
    tokenizer.add_special_tokens(special)
    return tokenizer


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


def _padded(
  tokenizer: Tokenizer,
  rows: Iterable[Sequence[int]],
  texts: Sequence[str],
  context_length: int,
) -> tuple[np.ndarray, np.ndarray]:
  """What `Tokenizer.encode` returns, of the ids of each text."""
  if context_length < 2:
    raise UserError(
      f"context_length is {context_length}, but begin and end of sequence"
      " alone need 2"
    )
  shape = (len(texts), context_length)
  text_tokens = np.full(shape, tokenizer.pad_id, np.int32)
  text_mask = np.zeros(shape, bool)
  room = context_length - 2
  for row, ids in enumerate(rows):
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
    ids = [tokenizer.bos_id, *ids[:room], tokenizer.eos_id]
    text_tokens[row, : len(ids)] = ids
    text_mask[row, : len(ids)] = True
  return text_tokens, text_mask


def _read_fields(path: str) -> Mapping[str, Any]:
  try:
    with open(path, encoding="utf-8") as file:
      fields = json.load(file)
  except (OSError, ValueError) as e:
    raise UserError(f"{path} is damaged: {e}") from e
  if not isinstance(fields, Mapping):
    raise UserError(f"{path} is damaged: it holds no fields")
  return fields


def _encodable(text: str) -> str:
  """Without lone surrogates, which have no bytes."""
  return text[:_MAX_CHARS].encode("utf-8", "ignore").decode("utf-8")


def _sanitise(text: str) -> str:
  """Without control characters and lone surrogates, which SentencePiece
  refuses or turns into junk; white space stays."""
  text = text[:_MAX_CHARS]
  return "".join(
    " " if c.isspace() else c
    for c in text
    if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs")
  )
