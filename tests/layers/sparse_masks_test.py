"""Each mask allows exactly the positions of its definition."""

import numpy as np
import pytest

from unclip_jax.layers import sparse_masks
from unclip_jax.utils import errors

S = 5


def allowed(attention_type, i, j, kernel_size):
  """The definition, by rows and columns, for j not after i."""
  if j > i:
    return False
  if attention_type == "full":
    return True
  rows, columns = i // S - j // S, i % S - j % S
  if attention_type == "column":
    return columns == 0
  if attention_type == "row":
    # Own row, and of the row above what is not to the left.
    return rows == 0 or (rows == 1 and columns <= 0)
  half = kernel_size // 2
  # Left of a row is the end of the row above, and the other way round.
  for wrapped in (-1, 0, 1):
    row, column = rows - wrapped, columns + wrapped * S
    if 0 <= row <= half and -half <= column <= half:
      return True
  return False


@pytest.mark.parametrize("attention_type", sparse_masks.TYPES)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_masks_allow_what_their_definition_allows(attention_type, kernel_size):
  mask = sparse_masks.image_mask(attention_type, S, kernel_size)
  expected = [
    [allowed(attention_type, i, j, kernel_size) for j in range(S * S)]
    for i in range(S * S)
  ]
  np.testing.assert_array_equal(mask, expected)


def test_counts_of_the_source():
  """Figure 11: 5 tokens in a row of 4; 3 x 3 kernels see themselves and 4."""
  row = sparse_masks.image_mask("row", 4)
  assert row.sum(1).tolist() == [1, 2, 3, 4] + [5] * 12
  convolution = sparse_masks.image_mask("convolution", 4, 3)
  assert np.flatnonzero(convolution[9]).tolist() == [4, 5, 6, 8, 9]
  # Wrapped: token 8 is the first of its row.
  assert np.flatnonzero(convolution[8]).tolist() == [3, 4, 5, 7, 8]


def test_a_picture_attends_to_all_that_is_given_and_nothing_to_it():
  image = sparse_masks.image_mask("column", 2)
  mask = sparse_masks.sequence_mask(image, 3)
  np.testing.assert_array_equal(mask[:3, :3], np.tri(3))
  assert mask[3:, :3].all() and not mask[:3, 3:].any()
  np.testing.assert_array_equal(mask[3:, 3:], image)


def test_layers_of_the_source():
  types = sparse_masks.layer_types(
    ("row", "column", "row", "row"), 64, "convolution"
  )
  # Appendix B.1, where layers count from 1.
  expected = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, 64)] + [
    "convolution"
  ]
  assert list(types) == expected
  assert sparse_masks.layer_types(("full",), 2) == ("full", "full")


@pytest.mark.parametrize(
  ("make", "word"),
  [
    (lambda: sparse_masks.image_mask("diagonal", 4), "'diagonal'"),
    (lambda: sparse_masks.image_mask("convolution", 4, 4), "odd"),
    (lambda: sparse_masks.layer_types((), 4), "empty"),
  ],
)
def test_what_cannot_be_is_an_error(make, word):
  with pytest.raises(errors.UserError, match=word):
    make()
