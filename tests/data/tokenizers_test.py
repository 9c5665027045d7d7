"""The SentencePiece tokenizer."""

import logging

import numpy as np
import pytest

from unclip_jax.data import tokenizers
from unclip_jax.data.tokenizers import BOS, EOS, PAD
from unclip_jax.utils.errors import UserError

_CAPTIONS = [
  f"{article} {colour} {animal}"
  for article in ("a", "an emoji of a", "a drawing of a")
  for colour in ("red", "green", "blue")
  for animal in ("frog", "owl", "polar bear", "unicorn")
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
  path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
  tokenizers.train(_CAPTIONS, 384, path)
  return path


@pytest.fixture(scope="module")
def tokenizer(path) -> tokenizers.SentencePieceTokenizer:
  return tokenizers.SentencePieceTokenizer(path)


def test_training_is_deterministic(path, tmp_path):
  again = tmp_path / "sub" / "again.model"
  tokenizers.train(_CAPTIONS, 384, str(again))
  with open(path, "rb") as file:
    assert file.read() == again.read_bytes()
  assert [p.name for p in again.parent.iterdir()] == ["again.model"]


def test_shapes_ids_and_mask(tokenizer):
  text_tokens, text_mask = tokenizer.encode(["a red frog", "owl"], 16)
  assert text_tokens.shape == text_mask.shape == (2, 16)
  assert text_tokens.dtype == np.int32 and text_mask.dtype == bool
  assert (text_tokens[:, 0] == BOS).all()
  for tokens, mask in zip(text_tokens, text_mask, strict=True):
    length = mask.sum()
    assert mask[:length].all() and tokens[length - 1] == EOS
    assert (tokens[length:] == PAD).all() and (tokens[:length] != PAD).all()
  assert text_tokens.max() < tokenizer.vocab_size <= 384


def test_round_trip_and_case(tokenizer):
  texts = ["a red frog", "an emoji of a \U0001f438", "naïve größe"]
  text_tokens, _ = tokenizer.encode(texts, 64)
  assert tokenizer.decode(text_tokens)[:2] == texts[:2]
  upper, _ = tokenizer.encode(["A Red FROG"], 64)
  np.testing.assert_array_equal(upper[0], text_tokens[0])


def test_empty_text_is_begin_and_end(tokenizer):
  text_tokens, text_mask = tokenizer.encode([""], 5)
  assert text_tokens.tolist() == [[BOS, EOS, PAD, PAD, PAD]]
  assert text_mask.tolist() == [[True, True, False, False, False]]


def test_truncation_keeps_the_end_and_warns_once(tokenizer, caplog):
  logger = logging.getLogger("absl")
  propagates, logger.propagate = logger.propagate, True
  try:
    with caplog.at_level(logging.WARNING):
      for _ in range(3):
        short, mask = tokenizer.encode(["a red frog and a blue owl"], 6)
  finally:
    logger.propagate = propagates
  full, _ = tokenizer.encode(["a red frog and a blue owl"], 64)
  assert mask.all()
  assert short[0, -1] == EOS
  np.testing.assert_array_equal(short[0, :-1], full[0, :5])
  cut = [r for r in caplog.records if "is cut to the context" in r.message]
  assert len(cut) == 1


def test_hostile_text(tokenizer):
  texts = ["frog\ud800", "fr\x00og\x07", "frog\n", "\ud83d", "x " * 100_000]
  text_tokens, text_mask = tokenizer.encode(texts, 8)
  frog, _ = tokenizer.encode(["frog"], 8)
  for row in text_tokens[:3]:
    np.testing.assert_array_equal(row, frog[0])
  assert text_tokens[3, :3].tolist() == [BOS, EOS, PAD]
  assert text_mask[4].all() and text_tokens[4, -1] == EOS


def test_wrong_files_and_sizes(tmp_path, tokenizer):
  with pytest.raises(UserError, match="no tokenizer file"):
    _ = tokenizers.SentencePieceTokenizer(str(tmp_path / "x")).vocab_size
  broken = tmp_path / "broken.model"
  broken.write_bytes(b"not a model")
  with pytest.raises(UserError, match="damaged"):
    _ = tokenizers.SentencePieceTokenizer(str(broken)).vocab_size
  with pytest.raises(UserError, match="too small"):
    tokenizers.train(_CAPTIONS, 100, str(tmp_path / "small.model"))
  with pytest.raises(UserError, match="context_length"):
    tokenizer.encode(["frog"], 1)
