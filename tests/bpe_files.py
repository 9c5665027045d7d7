"""The files of a small CLIP tokenizer, in the layout of the public ones."""

from __future__ import annotations

import collections
import itertools
import json
import pathlib
from collections.abc import Sequence

import tokenizers

from unclip_jax.data.tokenizers import BPE_BEGIN, BPE_END

CAPTIONS = (
  "a red frog", "an emoji of a frog", "a polar bear and an owl", "hello world",
  "a drawing of an unicorn", "it 's the bear 's", "naïve größe", "日本語 の 文",
)  # fmt: skip
_BYTE_LEVEL = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


def write(folder: pathlib.Path, *, num_merges: int = 60) -> None:
  """Writes vocab.json and merges.txt, always the same.

  Bytes, bytes at the end of a word, merged pairs, begin and end of text: in
  this order, which is that of the public vocabulary of 49,408.
  """
  # "!" is the first of them, which Karlo pads with.
  letters = sorted(_BYTE_LEVEL.alphabet())
  merges = _train(" ".join(CAPTIONS).split(), num_merges)
  tokens = [
    *letters,
    *(f"{x}</w>" for x in letters),
    *("".join(pair) for pair in merges),
    *(BPE_BEGIN, BPE_END),
  ]
  vocab = {token: i for i, token in enumerate(tokens)}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
  (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def _train(words: Sequence[str], num_merges: int) -> list[tuple[str, str]]:
  """The most frequent pair, merged again and again.

  The trainer of `tokenizers` breaks ties in another way every time.
  """
  spelled = []
  for word in words:
    ((text, _),) = _BYTE_LEVEL.pre_tokenize_str(word)
    spelled.append([*text[:-1], f"{text[-1]}</w>"])
  merges = []
  while len(merges) < num_merges:
    counts = collections.Counter(
      pair for word in spelled for pair in itertools.pairwise(word)
    )
    if not counts:
      break
    best = max(counts, key=lambda pair: (counts[pair], pair))
    merges.append(best)
    for word in spelled:
      for i in reversed(range(len(word) - 1)):
        if tuple(word[i : i + 2]) == best:
          word[i : i + 2] = ["".join(best)]
  return merges
