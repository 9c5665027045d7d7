"""The files of a small CLIP tokenizer, in the layout of the public ones."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import tokenizers

from unclip_jax.data.tokenizers import BPE_BEGIN, BPE_END

CAPTIONS = (
  "a red frog", "an emoji of a frog", "a polar bear and an owl", "hello world",
  "a drawing of an unicorn", "it's the bear's", "naïve größe", "日本語の文",
)  # fmt: skip


def write(
  folder: pathlib.Path,
  captions: Sequence[str] = CAPTIONS,
  *,
  num_merges: int = 60,
) -> None:
  """Writes vocab.json and merges.txt.

  Bytes, bytes at the end of a word, merged pairs, begin and end of text: in
  this order, which is that of the public vocabulary of 49,408.
  """
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(end_of_word_suffix="</w>")
  )
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=512 + num_merges,
    end_of_word_suffix="</w>",
    initial_alphabet=byte_level.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(captions, trainer)
  merges = json.loads(tokenizer.to_str())["model"]["merges"][:num_merges]
  # "!" is the first of them, which Karlo pads with.
  letters = sorted(byte_level.alphabet())
  ends = [f"{x}</w>" for x in letters]
  words = ["".join(pair) for pair in merges]
  tokens = [*letters, *ends, *words, BPE_BEGIN, BPE_END]
  vocab = {token: i for i, token in enumerate(tokens)}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
