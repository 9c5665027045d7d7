"""BLEU and CIDEr-D beside pycocoevalcap's, on the same sentences."""

import numpy as np
import pytest

from tests.metrics import captions_test
from unclip_jax.metrics import captions

VOCABULARY = ("a", "frog", "on", "red", "mat")  # few, so that 4-grams recur


def random_sentences(seed):
  """60 captions, each with 1 to 5 references of 1 to 12 words."""
  rng = np.random.default_rng(seed)

  def sentence():
    return " ".join(rng.choice(VOCABULARY, rng.integers(1, 13)))

  return [
    (sentence(), [sentence() for _ in range(rng.integers(1, 6))])
    for _ in range(60)
  ]


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_bleu_and_cider(seed):
  bleu = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer")
  cider = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
  sentences = captions_test.SENTENCES
  if seed is not None:
    sentences = random_sentences(seed)
  scorers = bleu.BleuScorer(n=4), cider.CiderScorer(n=4, sigma=6.0)
  for caption, references in sentences:
    for scorer in scorers:
      scorer += (caption, references)
  expected_bleu, _ = scorers[0].compute_score(option="closest")
  _, expected_cider = scorers[1].compute_score()
  assert min(expected_bleu) > 0.01
  given = captions_test.words(sentences)
  np.testing.assert_allclose(
    captions.bleu(*given), expected_bleu, rtol=0, atol=1e-9
  )
  np.testing.assert_allclose(
    captions.cider(*given), expected_cider, rtol=0, atol=1e-9
  )
