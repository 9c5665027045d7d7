"""BLEU and CIDEr-D: their laws, and a public implementation's numbers."""

import math

import numpy as np
import pytest

from unclip_jax.metrics import captions

# (a caption, its references), split into words by spaces.
SENTENCES = [
  ("a frog", ["a frog", "an emoji of a frog", "a green frog with big eyes"]),
  (
    "a red apple on a table",
    ["a red apple lies on a wooden table", "one red apple", "a red apple"],
  ),
  ("the the the the the the the", ["the cat is on the mat"]),
  (
    "a dog runs after a ball on the green grass in the park",
    ["a dog runs after a ball", "a brown dog plays with a ball in the park"],
  ),
  ("cat", ["a cat", "a black cat that sits on the mat"]),
  ("", ["a picture of nothing"]),
  (
    "a picture of a house with a red roof",
    ["a house", "a picture of a house with a red roof", "a drawing of a house"],
  ),
  ("two birds", ["a plane in the sky", "an airplane"]),
]
# What pycocoevalcap 1.2 gives for SENTENCES: its Bleu(4).compute_score of the
# corpus, and its Cider().compute_score of each, run once on these strings.
# tests/interop/captions_test.py does so again, where it is installed.
BLEU = [
  0.6726140275545702,
  0.5994000124874033,
  0.543434240863461,
  0.4912990180680556,
]
CIDER = [
  2.8390659847492383,
  3.1063760782530583,
  0.2937542554579249,
  2.584843955521801,
  1.432319315599106,
  0.0,
  4.428216379276114,
  0.0,
]


def words(sentences=SENTENCES):
  """The captions and their references as lists of words."""
  return (
    [caption.split() for caption, _ in sentences],
    [[x.split() for x in own] for _, own in sentences],
  )


def test_the_numbers_are_those_of_the_public_implementation():
  np.testing.assert_allclose(captions.bleu(*words()), BLEU, rtol=0, atol=1e-9)
  np.testing.assert_allclose(captions.cider(*words()), CIDER, rtol=0, atol=1e-9)
  found = captions.scores(*words())
  assert list(found) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider"]
  assert found["bleu_3"] == pytest.approx(BLEU[2])
  assert found["cider"] == pytest.approx(np.mean(CIDER))


def test_a_reference_itself_is_the_best_caption():
  given, references = words()
  best = [own[0] for own in references]
  np.testing.assert_allclose(captions.bleu(best, references), [1.0] * 4)
  alone = [[own[0]] for own in references if len(own[0]) >= 4]
  perfect = captions.cider([own[0] for own in alone], alone)
  np.testing.assert_allclose(perfect, 10.0)
  assert np.all(captions.cider(given, references) <= 10.0)


def test_precisions_are_clipped_and_the_penalty_is_for_short_captions():
  """Papineni et al. 2002, section 2.1, example 2, and 2.2.2."""
  the = ["the"] * 7
  mat = ["the", "cat", "is", "on", "the", "mat"]
  assert captions.bleu([the], [[mat]])[0] == pytest.approx(2 / 7)
  short = captions.bleu([mat[:4]], [[mat]])
  np.testing.assert_allclose(short, [math.exp(1 - 6 / 4)] * 4)
  # Of two references that are equally close the shorter one counts.
  assert captions.bleu([mat[:4]], [[mat, mat[:2]]])[0] == 1.0
  # Of the corpus, not of its sentences: the longer one makes up for it.
  assert captions.bleu([mat[:4], mat + mat[:2]], [[mat], [mat]])[0] == (
    pytest.approx(10 / 12)
  )


def test_a_corpus_without_words_or_with_no_match_is_worth_nothing():
  assert captions.bleu([[]], [[["a"]]]) == [0.0] * 4
  assert captions.bleu([["b"]], [[["a"]]]) == [0.0] * 4
  np.testing.assert_array_equal(
    captions.cider([[], ["b"]], [[["a"]], [["c"]]]), [0.0, 0.0]
  )


def test_what_all_references_hold_weighs_nothing():
  given = [["a", "frog"], ["a", "cat"]]
  references = [[["a", "dog"]], [["a", "cow"]]]
  np.testing.assert_array_equal(captions.cider(given, references), [0.0, 0.0])
  assert captions.bleu(given, references)[0] == 0.5
  # One example has no rare words.
  np.testing.assert_array_equal(captions.cider([["a"]], [[["a"]]]), [0.0])


def test_other_lengths_cost_a_gaussian():
  reference = ["a", "b", "c", "d"]
  other = ["x", "y"]

  def score(caption):
    return captions.cider([caption, other], [[reference], [other]])[0]

  assert score(reference) == pytest.approx(10.0)
  # Said twice: all n-grams count alike; those of the reference come twice, of
  # which one is clipped, and n - 1 are new. The caption is longer by 4 words.
  cosines = [
    (5 - n) / math.sqrt((4 * (5 - n) + n - 1) * (5 - n)) for n in (1, 2, 3, 4)
  ]
  expected = 10.0 * np.mean(cosines) * math.exp(-(4**2) / (2 * 6.0**2))
  assert score(reference + reference) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("A Frog, green!", ["a", "frog", "green"]),
    ("woman's hat; o'clock", ["woman's", "hat", "o'clock"]),
    ("man\u2019s shoe", ["man\u2019s", "shoe"]),
    ("ice-cream -- 'soft'", ["ice-cream", "soft"]),
    ("Flag: \u00c5land #3_b", ["flag", "\u00e5land", "3", "b"]),
    ("\u4e2d\u6587 \U0001f438", ["\u4e2d\u6587"]),
    ("", []),
  ],
)
def test_words(text, expected):
  assert captions.words(text) == expected
