"""How well the captions of a model fit: BLEU and CIDEr-D (metrics/captions.py).

The references are all captions that the data have of an example. Figures of
one split, one number of examples and one set of references compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from unclip_jax.evaluators import base
from unclip_jax.metrics import captions
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """`predict` gives `text_tokens` [B, L]; the batches hold `index`.

  Attributes:
    max_examples: stop after that many; None = the whole split.
    num_shown: of the first examples the captions are yielded; 0 = of none.
  """

  max_examples: int | None = None
  num_shown: int = 16

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields bleu_1 to bleu_4, cider and count, and examples, a text.

    Raises:
      UserError: the data know no captions, or cannot decode tokens.
    """
    predicted, given = base.collect(
      predict,
      batches,
      outputs=("text_tokens",),
      inputs=("index",),
      max_examples=self.max_examples,
    )
    known = [info(int(i)) if info else {} for i in given["index"]]
    if not all(x.get("captions") and "tokenizer" in x for x in known):
      raise errors.UserError(
        "the evaluator captions needs data that know 'captions' and their"
        " 'tokenizer': drop it from config.evals"
      )
    texts = known[0]["tokenizer"].decode(predicted["text_tokens"])
    references = [x["captions"] for x in known]
    yield from captions.scores(
      [captions.words(text) for text in texts],
      [[captions.words(text) for text in own] for own in references],
    ).items()
    yield "count", float(len(texts))
    if self.num_shown:
      yield "examples", _table(texts, references, self.num_shown)


def _table(
  texts: list[str], references: list[tuple[str, ...]], count: int
) -> str:
  """Markdown: of each example its caption and its first reference."""
  rows = [("caption", "reference"), ("---", "---")]
  rows += [(x, own[0]) for x, own in zip(texts[:count], references)]
  cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
  return "\n".join(f"| {a} | {b} |" for a, b in cells)
