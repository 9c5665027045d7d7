"""From `config.optim` to an optax chain, and the moving average of parameters.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with clipping by the global
norm, a mask for weight decay, warm-up and a schedule, learning rates by
parameter name, freezing, and a guard: a step whose gradient has an infinity or
a NaN anywhere changes no parameter and no moment, and is counted.

The order of the chain, and why:

  1. guard      around everything that has moments
  2. freezing   frozen parameters enter neither the norm nor the moments
  3. clipping, Adam, weight decay
  4. lr         outside the guard, so that the learning rate is a function of
                the step also after a skipped one. It turns the zeros of frozen
                parameters and of skipped steps into -0.0, and x + -0.0 is x
                bit for bit (-0.0 + 0.0 is not; XLA may flush denormals).

Weight decay is multiplied by the learning rate, as in optax and PyTorch.

Groups of parameters may have an optimizer of their own (`Optim.groups`): of two
players that are trained by one gradient each has its own rate, moments, decay
and norm, and neither's large gradient shortens the other's step. The guard is
around all of them.

SAM (Foret et al. 2020, arXiv 2010.01412) changes where the gradient is taken
(gradients.py), not what is done with it; its perturbation is made here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees

PyTree = Any

_TRAINED, _FROZEN = "trained", "frozen"
_GROUP_FIELDS = (
  "learning_rate",
  "b1",
  "b2",
  "eps",
  "weight_decay",
  "clip_norm",
)


@dataclasses.dataclass(frozen=True)
class Optim:
  """The fields of `config.optim`.

  Attributes:
    learning_rate: at the peak.
    name: "adamw", or "sgd" (no momentum; for comparing gradients).
    schedule: "cosine", "linear" or "constant", after the warm-up.
    warmup_steps: the rate rises linearly to its peak at this step, from
      peak / (warmup_steps + 1) at step 0: no step is wasted on rate 0.
    end_factor: share of the peak at the last step ("constant" has none).
    b1, b2, eps: of Adam.
    weight_decay: decoupled.
    decay_mask: parameters that this regex finds are not decayed, nor are those
      with fewer than two dimensions.
    clip_norm: bound on the global norm of the gradient of what is trained;
      None = none.
    rules: (regex over dotted parameter names, action); the first one that is
      found in a name (`re.search`) counts. An action is "freeze" or
      dict(lr_mult=0.1). Every regex must be found in some name.
    groups: (regex over dotted parameter names, fields); what the regex finds
      has an optimizer of its own with these of the fields learning_rate, b1,
      b2, eps, weight_decay, clip_norm, and the others as here. The first regex
      that is found in a name counts; each must be found in some. What none
      finds is a group with the fields as they are here, and so is its
      learning rate the one that is reported. Each group has its own norm.
    skip_nonfinite: the guard.
    sam_rho: length of SAM's perturbation of the parameters, all groups
      together; None or 0 = no SAM.
    sam_replica_batch: examples that share a perturbation (the m of Foret et
      al., section 4.1); divides config.batch_size. None = the whole batch.
    sam_start_step: SAM sets in after so many updates. A network that starts at
      a saddle (CLIP, whose embeddings are all equal at first) stays there where
      the perturbation reaches over it. The steps before cost as much.
  """

  learning_rate: float
  name: str = "adamw"
  schedule: str = "cosine"
  warmup_steps: int = 0
  end_factor: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  decay_mask: str = r"(^|\.)(bias|scale)$"
  clip_norm: float | None = None
  rules: tuple[tuple[str, str | Mapping[str, float]], ...] = ()
  groups: tuple[tuple[str, Mapping[str, float | None]], ...] = ()
  skip_nonfinite: bool = True
  sam_rho: float | None = None
  sam_replica_batch: int | None = None
  sam_start_step: int = 0


@dataclasses.dataclass(frozen=True)
class Sam:
  """Sharpness-aware minimisation as gradients.py needs it; see `Optim`."""

  optim: Optim
  replica_batch: int

  def perturbation(self, grads: PyTree, step: jax.Array | int) -> PyTree:
    """rho g / ||g||_2 of what is trained, 0 for frozen parameters.

    Equation 2 of Foret et al. with p = 2. A gradient of 0 perturbs nothing,
    nor does any before `sam_start_step`.
    """
    rho = jnp.where(step < self.optim.sam_start_step, 0.0, self.optim.sam_rho)
    trained = jax.tree.map(
      lambda mult, g: jnp.zeros_like(g) if mult == _FROZEN else g,
      _multipliers(self.optim, grads),
      grads,
    )
    norm = jnp.maximum(optax.tree.norm(trained), jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(lambda g: rho * (g / norm), trained)


def make_optimizer(
  config_optim: ml_collections.ConfigDict, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Builds the optimizer that a config describes.

  Args:
    config_optim: the fields of `Optim`.
    num_steps: of the whole run, the warm-up included.

  Returns:
    The transformation (its `update` needs `params`), and the learning rate as
    a function of the step, 0 = first; parameters with an `lr_mult` have that
    many times it.

  Raises:
    UserError: an unknown field or value; at `init`, a rule or a group that no
      parameter has.
  """
  optim = config_lib.construct(Optim, config_optim, where="config.optim")
  _check_rules(optim)
  schedule = make_schedule(optim, num_steps)
  groups = {_TRAINED: optim} | {
    f"group_{i}": dataclasses.replace(optim, **fields)
    for i, (_, fields) in enumerate(optim.groups)
  }
  inner = optax.multi_transform(
    {name: _transform(group) for name, group in groups.items()}
    | {_FROZEN: optax.set_to_zero()},
    lambda params: jax.tree.map(
      lambda mult, group: _FROZEN if mult == _FROZEN else group,
      _multipliers(optim, params),
      _groups(optim, params),
    ),
  )
  if optim.skip_nonfinite:
    inner = optax.apply_if_finite(inner, np.iinfo(np.int32).max)
  rate = optax.scale_by_learning_rate(schedule)
  if optim.groups:
    rate = optax.multi_transform(
      {
        name: optax.scale_by_learning_rate(make_schedule(group, num_steps))
        for name, group in groups.items()
      },
      lambda params: _groups(optim, params),
    )
  tx = optax.chain(
    inner,
    rate,
    optax.stateless(lambda updates, _: _scaled(optim, updates)),
  )
  return tx, schedule


def _transform(optim: Optim) -> optax.GradientTransformation:
  """Clipping, moments and decay of one group, without its learning rate."""
  if optim.name == "adamw":
    scale = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
  elif optim.name == "sgd":
    scale = optax.identity()
  else:
    raise errors.UserError(
      f"config.optim.name '{optim.name}' is not 'adamw' or 'sgd'"
    )
  clip = (
    optax.identity()
    if optim.clip_norm is None
    else optax.clip_by_global_norm(optim.clip_norm)
  )
  decay = optax.add_decayed_weights(
    optim.weight_decay, mask=lambda params: _decayed(optim, params)
  )
  return optax.chain(clip, scale, decay)


def make_sam(
  config_optim: ml_collections.ConfigDict,
  batch_size: int,
  num_microbatches: int,
) -> Sam | None:
  """SAM as a config describes it, or None where it has no rho.

  Raises:
    UserError: a negative rho, replicas that do not divide the batch, or
      microbatches.
  """
  optim = config_lib.construct(Optim, config_optim, where="config.optim")
  if not optim.sam_rho:
    return None
  if not optim.sam_rho > 0.0:
    raise errors.UserError(
      f"config.optim.sam_rho {optim.sam_rho} is a length: choose 0 (no SAM) or "
      "more"
    )
  if num_microbatches > 1:
    raise errors.UserError(
      "config.num_microbatches must be 1 with SAM, whose replicas are seen one "
      "after another: lower config.optim.sam_replica_batch instead"
    )
  rows = optim.sam_replica_batch
  rows = batch_size if rows is None else rows
  if rows < 1 or batch_size % rows:
    raise errors.UserError(
      f"config.optim.sam_replica_batch {rows} does not divide "
      f"config.batch_size {batch_size}: choose a divisor"
    )
  return Sam(optim, rows)


def make_schedule(optim: Optim, num_steps: int) -> optax.Schedule:
  """The learning rate as a function of the step, 0 = first.

  Raises:
    UserError: an unknown schedule, or a warm-up that does not end.
  """
  peak, warmup = optim.learning_rate, optim.warmup_steps
  if not 0 <= warmup < num_steps:
    raise errors.UserError(
      f"config.optim.warmup_steps {warmup} does not fit {num_steps} steps: "
      "choose 0 or more and fewer than the steps"
    )
  rest = num_steps - warmup
  if optim.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, rest, alpha=optim.end_factor)
  elif optim.schedule == "linear":
    after = optax.linear_schedule(peak, peak * optim.end_factor, rest)
  elif optim.schedule == "constant":
    after = optax.constant_schedule(peak)
  else:
    raise errors.UserError(
      f"config.optim.schedule '{optim.schedule}' is not 'cosine', 'linear' or "
      "'constant'"
    )
  if warmup == 0:
    return after
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def num_nonfinite(opt_state: PyTree) -> jax.Array:
  """How many steps the guard has skipped, int32 [] (0 without a guard)."""
  return jnp.asarray(
    optax.tree.get(opt_state, "total_notfinite", default=0), jnp.int32
  )


def ema_update(
  ema: PyTree, params: PyTree, decay: float, step: jax.Array | int
) -> PyTree:
  """One step of the exponential moving average, in float32.

  The decay is min(decay, (1 + step) / (10 + step)) (as in TensorFlow's
  ExponentialMovingAverage with num_updates), so that the average does not
  drag the initial values along. A parameter that equals its average leaves it
  as it is, bit for bit.

  Args:
    ema: float32 averages.
    params: the parameters after the update.
    step: updates made before this one, 0 = first.
  """
  step = jnp.asarray(step, jnp.float32)
  keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(
    lambda e, p: e + (1.0 - keep) * (p.astype(jnp.float32) - e), ema, params
  )


def _check_rules(optim: Optim) -> None:
  """Raises UserError unless the rules and the groups can be read."""
  for rule in optim.rules:
    if len(rule) != 2 or not isinstance(rule[0], str):
      raise errors.UserError(
        f"config.optim.rules: {rule} is not a pair (regex, action)"
      )
    pattern, action = rule
    if action != "freeze" and set(action) != {"lr_mult"}:
      raise errors.UserError(
        f"config.optim.rules: the action for '{pattern}' is {action} and must "
        "be 'freeze' or dict(lr_mult=...)"
      )
  for group in optim.groups:
    is_pair = len(group) == 2 and isinstance(group[0], str)
    if not is_pair or not isinstance(group[1], Mapping):
      raise errors.UserError(
        f"config.optim.groups: {group} is not a pair (regex, dict of fields)"
      )
    unknown = sorted({*group[1]} - {*_GROUP_FIELDS})
    if unknown:
      raise errors.UserError(
        f"config.optim.groups: '{group[0]}' has {', '.join(unknown)}, and may "
        f"have only {', '.join(_GROUP_FIELDS)}"
      )
  patterns = [pattern for pattern, _ in (*optim.rules, *optim.groups)]
  for pattern in (optim.decay_mask, *patterns):
    try:
      re.compile(pattern)
    except re.error as e:
      raise errors.UserError(
        f"config.optim: '{pattern}' is not a regular expression: {e}"
      ) from e


def _decayed(optim: Optim, params: PyTree) -> PyTree:
  """True for the parameters that weight decay acts on."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf.ndim >= 2
      and not re.search(optim.decay_mask, ".".join(trees.path_names(path)))
    ),
    params,
  )


def _multipliers(optim: Optim, params: PyTree) -> PyTree:
  """A factor on the learning rate, or `_FROZEN`, for every parameter.

  Raises:
    UserError: a rule that no parameter has.
  """
  factors = [
    (pattern, _FROZEN if action == "freeze" else float(action["lr_mult"]))
    for pattern, action in optim.rules
  ]
  return _by_name("rules", factors, 1.0, params)


def _groups(optim: Optim, params: PyTree) -> PyTree:
  """The name of its group for every parameter.

  Raises:
    UserError: a group that no parameter has.
  """
  names = [
    (pattern, f"group_{i}") for i, (pattern, _) in enumerate(optim.groups)
  ]
  return _by_name("groups", names, _TRAINED, params)


def _by_name(
  field: str, pairs: Sequence[tuple[str, Any]], default: Any, params: PyTree
) -> PyTree:
  """For every parameter the value of the first regex found in its name.

  Args:
    field: of the config, for messages.
    pairs: (regex, value).
    default: where none is found.

  Raises:
    UserError: a regex is found in no name.
  """
  names = list(trees.flatten(params))
  for pattern, _ in pairs:
    if not any(re.search(pattern, name) for name in names):
      raise errors.UserError(
        f"config.optim.{field}: no parameter has '{pattern}' in its name; "
        f"names look like '{names[0]}'"
      )

  def value(path: tuple[Any, ...], _: jax.Array) -> Any:
    name = ".".join(trees.path_names(path))
    return next((x for regex, x in pairs if re.search(regex, name)), default)

  return jax.tree_util.tree_map_with_path(value, params)


def _scaled(optim: Optim, updates: PyTree) -> PyTree:
  """Applies the `lr_mult` of the rules."""
  return jax.tree.map(
    lambda mult, u: u if mult == _FROZEN or mult == 1.0 else mult * u,
    _multipliers(optim, updates),
    updates,
  )
