"""Rules of `config.optim.rules` for training a trained network on."""

from __future__ import annotations

from collections.abc import Sequence

Rule = tuple[str, dict[str, float]]


def layer_decay(
  depth: int,
  decay: float,
  *,
  below: Sequence[str] = (),
  fresh: Sequence[str] = (),
) -> tuple[Rule, ...]:
  """Layer-wise decay of the learning rate (Clark et al. 2020, BEiT).

  Block i of `depth` learns with decay^(depth - i) of the rate, what stands
  before the first with decay^(depth + 1), and all else with the rate itself:
  ELECTRA (arXiv 2003.10555, appendix B), BEiT (arXiv 2106.08254, appendix H).

  Args:
    depth: number of blocks, submodules block_0, block_1, ...
    decay: in (0, 1].
    below: regexes of what stands before the blocks and is trained on.
    fresh: regexes of what is new in the blocks, and learns with the rate.
  """
  rules = [(name, 1.0) for name in fresh]
  rules += [(rf"^block_{i}\.", decay ** (depth - i)) for i in range(depth)]
  rules += [(name, decay ** (depth + 1)) for name in below]
  return tuple((name, dict(lr_mult=mult)) for name, mult in rules)
