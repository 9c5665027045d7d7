"""Codebook usage on small known numbers."""

import numpy as np
import pytest

from unclip_jax.evaluators import code_usage


def test_codes_of_all_batches_count_together_and_padding_does_not():
  batches = [
    {"mask": np.ones(2, bool), "image_tokens": np.asarray([[0, 1], [0, 1]])},
    {
      "mask": np.asarray([1, 0], bool),
      "image_tokens": np.asarray([[2, 2], [5, 5]]),
    },
  ]
  evaluator = code_usage.Evaluator(num_codes=6)
  predict = lambda batch: {"image_tokens": batch["image_tokens"]}  # noqa: E731
  found = dict(evaluator.run(predict, batches, None))
  assert found["used"] == 3 / 6
  assert found["perplexity"] == pytest.approx(3)  # a third of the time each
