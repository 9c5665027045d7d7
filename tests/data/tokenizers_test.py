"""The tokenizers: SentencePiece, and CLIP's beside that of transformers."""

import json
import logging
import pathlib
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests import bpe_files
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


def test_truncation_keeps_the_end_and_warns_once(
  tokenizer, caplog, monkeypatch
):
  # Other tests of this process may have been warned.
  monkeypatch.setattr(tokenizers.logging, "_log_counter_per_token", {})
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


# What a caption of the world may hold.
_HARD_TEXTS = (
  "",
  " ",
  "  a\tRED \n frog  ",
  "A Frog! It's 12:30, isn't it?",
  "we've they'll I'd you're 'tis ''s",
  "café cafe\u0301 naïve Größe İstanbul Σίσυφος",
  "日本語の文 한국어 中文\u3000全角",
  "🐸 👋🏽 🇩🇪 👩\u200d💻 ❤\ufe0f",
  "1234567890 ½ Ⅷ ٣",
  "\x00\x07\x1b[31m\x7f\x85\u00a0\u2028\u200b\ufeff",
  "<|startoftext|> x <|endoftext|>y <|ENDOFTEXT|>",
  "!!! ... --- #hash @at </w> &amp; \ue000\U0010ffff",
  "frog" * 50,
)


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("bpe")
  bpe_files.write(folder)
  return folder


@pytest.fixture(scope="module")
def bpe(bpe_folder) -> tokenizers.BpeTokenizer:
  return tokenizers.BpeTokenizer(str(bpe_folder))


@pytest.fixture(scope="module")
def reference(bpe_folder):
  transformers = pytest.importorskip("transformers")
  return transformers.CLIPTokenizer.from_pretrained(str(bpe_folder))


def _reference_ids(reference, texts, length):
  return np.asarray(
    reference(
      texts, padding="max_length", truncation=True, max_length=length
    ).input_ids
  )


@pytest.mark.parametrize("length", [2, 7, 77])
def test_bpe_ids_are_those_of_transformers(bpe, reference, length):
  text_tokens, text_mask = bpe.encode(_HARD_TEXTS, length)
  np.testing.assert_array_equal(
    text_tokens, _reference_ids(reference, list(_HARD_TEXTS), length)
  )
  assert text_tokens.dtype == np.int32 and text_mask.dtype == bool
  for tokens, mask in zip(text_tokens, text_mask, strict=True):
    assert mask[: mask.sum()].all() and tokens[mask][-1] == bpe.eos_id
    assert (tokens[~mask] == bpe.pad_id).all()
  assert text_tokens.max() < bpe.vocab_size == len(reference)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  text=st.text(st.characters(exclude_categories=["Cs"]))
  | st.text("aA'stre! .1\u00e9\u0301\U0001f438\n")
)
def test_bpe_ids_of_any_text(bpe, reference, text):
  text_tokens, _ = bpe.encode([text], 40)
  np.testing.assert_array_equal(
    text_tokens, _reference_ids(reference, [text], 40)
  )


def test_bpe_pads_with_the_token_that_the_model_names(
  bpe, bpe_folder, tmp_path
):
  texts = ["a frog", "stop!"]
  plain, mask = bpe.encode(texts, 12)
  assert (plain[~mask] == bpe.eos_id).all()
  shutil.copytree(bpe_folder, tmp_path, dirs_exist_ok=True)
  config = tmp_path / "tokenizer_config.json"
  for named in ("!", {"content": "!", "lstrip": False}):
    config.write_text(json.dumps({"pad_token": named}))
    karlo = tokenizers.load(str(tmp_path))
    padded, same_mask = karlo.encode(texts, 12)
    assert karlo.pad_id == 0 and (padded[~mask] == 0).all()
    # In a text it remains the token that was trained.
    np.testing.assert_array_equal(padded[mask], plain[mask])
    np.testing.assert_array_equal(same_mask, mask)
  assert set(karlo.assets()) == {
    "vocab.json", "merges.txt", "tokenizer_config.json"
  }  # fmt: skip
  for text, content in (
    ('{"pad_token": "<pad>"}', "lacks the token <pad>"),
    ("[]", "holds no fields"),
    ("{", "is damaged"),
  ):
    config.write_text(text)
    with pytest.raises(UserError, match=content):
      tokenizers.load(str(tmp_path)).encode(texts, 12)


def test_bpe_round_trip(bpe):
  texts = ["a red frog", "an owl and \U0001f438 na\u00efve", ""]
  text_tokens, _ = bpe.encode(["A Red\n FROG", *texts[1:]], 40)
  assert bpe.decode(text_tokens) == texts


def test_bpe_of_lone_surrogates_and_long_texts(bpe):
  text_tokens, text_mask = bpe.encode(["fr\ud800og", "frog", "x " * 100_000], 8)
  np.testing.assert_array_equal(text_tokens[0], text_tokens[1])
  assert text_mask[2].all() and text_tokens[2, -1] == bpe.eos_id
  with pytest.raises(UserError, match="context_length"):
    bpe.encode(["frog"], 1)


def test_the_files_of_a_folder_tell_its_tokenizer(
  path, tokenizer, bpe_folder, bpe, tmp_path
):
  assert tokenizers.load(path) == tokenizer
  assert tokenizers.load(str(pathlib.Path(path).parent)) == tokenizer
  assert tokenizers.load(str(bpe_folder)) == bpe
  with pytest.raises(UserError, match="there is no tokenizer in"):
    tokenizers.load(str(tmp_path))
  for source in (tokenizer, bpe):
    for name, asset in source.assets().items():
      shutil.copy(asset, tmp_path / name)
  with pytest.raises(UserError, match="holds two tokenizers"):
    tokenizers.load(str(tmp_path))


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("vocab.json", None),
    ("merges.txt", None),
    ("vocab.json", "[1, 2]"),
    ("vocab.json", '{"a": 0}'),
    ("vocab.json", "\x00"),
    ("merges.txt", "a b c\n"),
    ("merges.txt", "not inthere\n"),
  ],
)
def test_damaged_bpe_files_are_one_line(bpe_folder, tmp_path, name, content):
  shutil.copytree(bpe_folder, tmp_path, dirs_exist_ok=True)
  (tmp_path / name).unlink()
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=f"{tmp_path}") as error:
    tokenizers.BpeTokenizer(str(tmp_path)).encode(["frog"], 8)
  assert "\n" not in str(error.value)
