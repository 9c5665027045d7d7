"""Pretrained word vectors, as text files: GloVe's and word2vec's.

A line holds a word and its numbers: `word v1 v2 ...`, separated by spaces.
word2vec's first line holds the number of words and of dimensions instead; the
words of some of GloVe's files contain spaces (Pennington et al. 2014; Mikolov
et al. 2013, arXiv 1301.3781).

The vectors become the start of a text encoder's `token_embed`, by a folder that
`config.init_from` takes: so the network, the task and the trainer know nothing
of them, and a run that starts with them resumes and is loaded without the file.

Tokens are not words. A token gets the vector of a word if the tokenizer turns
that word into this one token, as it does with frequent words; the others, parts
of words and signs, are drawn anew with the mean and standard deviation of the
vectors that were found. A word is looked up as the file writes it, else without
regard to case; of equal ones the first counts, which in these files is the most
frequent one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import logging

from unclip_jax import tensor_files
from unclip_jax.data import tokenizers
from unclip_jax.interop import parts
from unclip_jax.utils import errors

_NAME = "params.text_encoder.token_embed.embedding"


class Table(NamedTuple):
  """Vectors aligned with the vocabulary of a tokenizer."""

  embedding: np.ndarray  # [vocab_size, D] float32
  is_found: np.ndarray  # [vocab_size] bool: whether it comes from the file


def convert_in(
  src: str, out: str, *, tokenizer: str, vocab_size: int | None = None
) -> Table:
  """Writes a folder that `config.init_from.path` takes.

  The file names no model, so the folder serves for no more than that. What
  share of the tokens has a vector of the file is logged, and in config.json.

  Args:
    src: the text file, UTF-8.
    out: the folder.
    tokenizer: what `tokenizers.load` takes, such as a run's assets.
    vocab_size: rows of the table, at least as many as the tokenizer has
      tokens; None: as many.

  Raises:
    UserError: the file cannot be read, has no word of the tokenizer's, or the
      vocabulary is too small.
  """
  table = align(src, tokenizers.load(tokenizer), vocab_size)
  found, total = int(table.is_found.sum()), len(table.is_found)
  logging.info(
    "%d of %d tokens (%.0f %%) have a vector of %s; the others are drawn anew",
    found, total, 100 * found / total, src,
  )  # fmt: skip
  config = ml_collections.ConfigDict(
    {
      "name": "word_vectors",
      "source": os.path.basename(src),
      "tokens_found": found,
      "tokens": total,
    }
  )
  arrays = {_NAME: tensor_files.lazy(table.embedding)}
  parts.write(out, parts.Part(config, arrays, {}))
  return table


def align(
  path: str,
  tokenizer: tokenizers.Tokenizer,
  vocab_size: int | None = None,
  *,
  seed: int = 0,
) -> Table:
  """The vectors of a tokenizer's tokens; see the module's docstring.

  Args:
    path, vocab_size: as `src` and `vocab_size` of `convert_in`.
    seed: of what is drawn anew.

  Raises:
    UserError: as `convert_in`.
  """
  size = tokenizer.vocab_size
  vocab_size = size if vocab_size is None else vocab_size
  if vocab_size < size:
    raise errors.UserError(
      f"vocab_size {vocab_size} is too small: the tokenizer has {size} tokens"
    )
  words = words_of_tokens(tokenizer)
  vectors = _read(path, {word.casefold() for word in words.values()})
  found = {
    token: vectors.get(word, vectors.get(word.casefold()))
    for token, word in words.items()
    if word in vectors or word.casefold() in vectors
  }
  if not found:
    raise errors.UserError(
      f"none of the tokenizer's {len(words)} words is in {path}: is it a text"
      " file of word vectors in the captions' language?"
    )
  known = np.stack(list(found.values()))
  rng = np.random.default_rng(seed)
  embedding = rng.normal(
    known.mean(0), known.std(0) + 1e-6, (vocab_size, known.shape[1])
  ).astype(np.float32)
  is_found = np.zeros(vocab_size, bool)
  is_found[list(found)] = True
  embedding[list(found)] = known
  return Table(embedding, is_found)


def words_of_tokens(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
  """Token -> the word that it spells, of those that are whole words."""
  tokens = np.arange(tokenizer.vocab_size)
  texts = [text.strip() for text in tokenizer.decode(tokens[:, None])]
  # Begin, one token, end.
  encoded, mask = tokenizer.encode(texts, 4)
  is_one = (mask.sum(axis=1) == 3) & (encoded[:, 1] == tokens)
  return {int(i): texts[i] for i in tokens[is_one] if texts[i]}


def _read(path: str, wanted: Container[str]) -> dict[str, np.ndarray]:
  """Word, and its case-folded form, -> vector, of the words that are wanted.

  Args:
    wanted: case-folded words; only these are kept, as files have millions.
  """
  vectors: dict[str, np.ndarray] = {}
  folded: dict[str, np.ndarray] = {}
  for word, vector in _rows(path, wanted):
    vectors.setdefault(word, vector)
    folded.setdefault(word.casefold(), vector)
  return {**folded, **vectors}


def _rows(
  path: str, wanted: Container[str]
) -> Iterator[tuple[str, np.ndarray]]:
  try:
    with open(path, encoding="utf-8", errors="replace") as file:
      dim = None
      for number, line in enumerate(file, start=1):
        if number == 1 and re.fullmatch(r"\d+ \d+\s*", line):
          dim = int(line.split()[1])
          continue
        fields = line.rstrip().split(" ")
        # Only the first word decides: one of several parts is found thereby.
        dim = len(fields) - 1 if dim is None else dim
        word = " ".join(fields[:-dim]) if dim else ""
        if word.casefold() not in wanted:
          continue
        yield word, np.asarray(fields[-dim:], np.float32)
  except OSError as e:
    raise errors.UserError(
      f"the word vectors {path} cannot be read: {e.strerror}"
    ) from e
  except ValueError as e:
    raise errors.UserError(
      f"line {number} of {path} is no word and {dim} numbers ({e}): give a text"
      " file of word vectors, not a binary one"
    ) from e
