"""Word vectors: which token gets which, and that a run starts with them."""

import json

import numpy as np
import pytest

from unclip_jax import run_folder, trainer
from unclip_jax.data import tokenizers
from unclip_jax.interop import word_vectors
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

DIM = 8  # the word_width of `:smoke`
WORDS = {"red": 1.0, "a": 2.0, "Circle": 3.0, "circle": 4.0, "of": 5.0}


def _line(word, value, dim=DIM):
  return " ".join([word, *(f"{value + i / 10:.4f}" for i in range(dim))]) + "\n"


def _vector(value):
  return np.float32([value + i / 10 for i in range(DIM)])


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("words") / "tokenizer.model"
  captions = [f"a {x} circle" for x in ("red", "reddish", "blue", "redder")]
  tokenizers.train(captions * 20, 320, str(path))
  return tokenizers.load(str(path))


@pytest.fixture(name="path", params=["glove", "word2vec"])
def _path(request, tmp_path):
  lines = "".join(_line(*item) for item in WORDS.items())
  lines += _line(". . .", 9.0)  # a word with spaces, as in GloVe's files
  if request.param == "word2vec":
    lines = f"{len(WORDS) + 1} {DIM}\n" + lines.replace("\n", " \n")
  path = tmp_path / "vectors.txt"
  path.write_text(lines, encoding="utf-8")
  return str(path)


def test_a_token_has_the_vector_of_the_word_that_it_spells(tokenizer, path):
  table = word_vectors.align(path, tokenizer, tokenizer.vocab_size + 3)
  assert table.embedding.shape == (tokenizer.vocab_size + 3, DIM)
  assert table.embedding.dtype == np.float32
  found = {}
  for word, value in {"red": 1.0, "a": 2.0, "circle": 4.0}.items():
    tokens, mask = tokenizer.encode([word], 5)
    assert mask.sum() == 3
    found[int(tokens[0, 1])] = value
  assert set(np.flatnonzero(table.is_found)) == set(found)
  for token, value in found.items():
    np.testing.assert_allclose(table.embedding[token], _vector(value))
  # The others: of the same place and spread, and no two alike.
  others = table.embedding[~table.is_found]
  known = table.embedding[table.is_found]
  assert len(np.unique(others, axis=0)) == len(others)
  np.testing.assert_allclose(others.mean(0), known.mean(0), atol=0.4)
  np.testing.assert_allclose(others.std(0), known.std(0), rtol=0.2)


def test_parts_of_words_are_no_words(tokenizer):
  words = word_vectors.words_of_tokens(tokenizer)
  pieces = tokenizer._processor
  assert {"red", "circle"} <= set(words.values())
  for token, word in words.items():
    assert pieces.id_to_piece(token) == "▁" + word
  assert not set(words) & {tokenizers.PAD, tokenizers.BOS, tokenizers.EOS}


def test_words_of_another_case_serve_where_there_is_no_better(
  tokenizer, tmp_path
):
  path = tmp_path / "vectors.txt"
  path.write_text(_line("RED", 1.0) + _line("Red", 2.0) + _line("a", 3.0))
  table = word_vectors.align(str(path), tokenizer)
  (token,) = tokenizer.encode(["red"], 3)[0][:, 1]
  np.testing.assert_allclose(table.embedding[token], _vector(1.0))


def test_a_run_starts_with_them(tokenizer, path, tmp_path):
  folder = str(tmp_path / "vectors")
  table = word_vectors.convert_in(
    path, folder, tokenizer=tokenizer.path, vocab_size=1024
  )
  stored = json.loads((tmp_path / "vectors" / "config.json").read_text())
  assert stored["tokens_found"] == 3 and stored["tokens"] == 1024
  config = config_lib.load("configs/baselines/cvae.py:stage=text,smoke")
  config.init_from.path = folder
  run = trainer.setup(config)
  shapes = trainer.state_shapes(run, {})
  given = run.init_from.load({}, {"params": shapes.params, "tables": {}})
  assert list(given) == ["params.text_encoder.token_embed.embedding"]
  np.testing.assert_array_equal(*given.values(), table.embedding)
  assert run_folder.load_config(folder).name == "word_vectors"


@pytest.mark.parametrize(
  ("content", "word"),
  [
    ("red one two\n", "line 1 of .* is no word and 2 numbers"),
    ("chien 1 2\n", "none of the tokenizer's"),
    (None, "cannot be read"),
  ],
)
def test_a_wrong_file_is_an_error(tokenizer, tmp_path, content, word):
  path = tmp_path / "vectors.txt"
  if content is not None:
    path.write_text(content)
  with pytest.raises(errors.UserError, match=word):
    word_vectors.align(str(path), tokenizer)


def test_a_vocabulary_that_is_too_small_is_an_error(tokenizer, path):
  with pytest.raises(errors.UserError, match="vocab_size 9 is too small"):
    word_vectors.align(path, tokenizer, 9)
