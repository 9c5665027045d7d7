"""How well captions fit the references of their pictures: BLEU and CIDEr-D.

BLEU of a corpus (Papineni et al. 2002, https://aclanthology.org/P02-1040,
section 2.3): the geometric mean of the clipped n-gram precisions up to n, and a
brevity penalty by the reference that is closest in length, the shorter of two.

CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726, sections 3 and 6.1) as MS-COCO's
evaluation computes it (pycocoevalcap): the mean over n = 1 to 4 and over the
references of the cosine of tf-idf vectors, a word's weight in the caption
clipped to that in the reference, times a Gaussian of the difference in length,
times 10. Documents are the examples that are scored: an n-gram that every
example's references hold weighs nothing, and of one example the score is 0.

Where no n-gram is found pycocoevalcap's BLEU is about 1e-4 and not 0, as it
adds small numbers to every count; elsewhere the difference is below 1e-9.

Words: MS-COCO's tokenizer is a Java program. Here a text is lower-cased, and
its words are the longest runs of letters and digits, of which single hyphens
or apostrophes in between make one; everything else is left out. Figures compare
with published ones only where both were split into words alike.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_MAX_N = 4
_SIGMA = 6.0  # words, of CIDEr-D's Gaussian

Words = Sequence[str]
_Ngram = tuple[str, ...]


def words(text: str) -> list[str]:
  """The words of a text, see the module's docstring.

  >>> words("A frog's face, half-hidden!")
  ['a', "frog's", 'face', 'half-hidden']
  """
  return _WORD.findall(text.lower())


def bleu(
  captions: Sequence[Words], references: Sequence[Sequence[Words]]
) -> list[float]:
  """BLEU-1 to BLEU-4 of a corpus, each in [0, 1].

  Args:
    captions: the words of N captions.
    references: of each one, one or more.
  """
  matches, total = np.zeros(_MAX_N), np.zeros(_MAX_N)
  length = reference_length = 0
  for caption, own in zip(captions, references, strict=True):
    counts = _ngrams(caption)
    most: collections.Counter[_Ngram] = collections.Counter()
    for reference in own:
      most |= _ngrams(reference)
    for ngram, count in (counts & most).items():
      matches[len(ngram) - 1] += count
    total += np.maximum(len(caption) - np.arange(_MAX_N), 0)
    length += len(caption)
    reference_length += min(
      (abs(len(reference) - len(caption)), len(reference)) for reference in own
    )[1]
  if length == 0:
    return [0.0] * _MAX_N
  penalty = math.exp(min(0.0, 1.0 - reference_length / length))
  precisions = matches / np.maximum(total, 1.0)
  products = np.cumprod(precisions)
  return [
    penalty * float(products[i]) ** (1.0 / (i + 1)) for i in range(_MAX_N)
  ]


def cider(
  captions: Sequence[Words], references: Sequence[Sequence[Words]]
) -> np.ndarray:
  """CIDEr-D of each caption: [N] float64 in [0, 10]; the corpus's is the mean.

  Arguments as in `bleu`.
  """
  num_documents: collections.Counter[_Ngram] = collections.Counter()
  for own in references:
    num_documents.update({ngram for x in own for ngram in _ngrams(x)})
  weights = {
    ngram: math.log(len(references) / count)
    for ngram, count in num_documents.items()
  }
  unseen = math.log(max(len(references), 1))

  def vector(sentence: Words) -> tuple[dict[_Ngram, float], np.ndarray, int]:
    """Its tf-idf by n-gram, their norms for each n, its number of bigrams."""
    values = {
      ngram: count * weights.get(ngram, unseen)
      for ngram, count in _ngrams(sentence).items()
    }
    squares = np.zeros(_MAX_N)
    for ngram, value in values.items():
      squares[len(ngram) - 1] += value**2
    return values, np.sqrt(squares), max(len(sentence) - 1, 0)

  scores = []
  for caption, own in zip(captions, references, strict=True):
    values, norms, length = vector(caption)
    score = 0.0
    for reference in own:
      other, other_norms, other_length = vector(reference)
      products = np.zeros(_MAX_N)
      for ngram, value in values.items():
        weight = other.get(ngram, 0.0)
        products[len(ngram) - 1] += min(value, weight) * weight
      both = norms * other_norms
      cosines = products / np.where(both > 0, both, 1.0)
      distance = (length - other_length) / _SIGMA
      score += float(cosines.mean()) * math.exp(-(distance**2) / 2)
    scores.append(10.0 * score / len(own))
  return np.asarray(scores)


def scores(
  captions: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Mapping[str, float]:
  """`bleu_1` to `bleu_4` and `cider` of a corpus; arguments as in `bleu`."""
  found = {
    f"bleu_{i}": value
    for i, value in enumerate(bleu(captions, references), start=1)
  }
  return {**found, "cider": float(cider(captions, references).mean())}


def _ngrams(sentence: Words) -> collections.Counter[_Ngram]:
  """How often each n-gram occurs, for n = 1 to 4."""
  return collections.Counter(
    tuple(sentence[i : i + n])
    for n in range(1, _MAX_N + 1)
    for i in range(len(sentence) - n + 1)
  )
