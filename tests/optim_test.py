"""The optimizer against hand-written numpy, and what it must leave alone."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from unclip_jax import optim
from unclip_jax.utils import errors, trees

PyTree = Any


def make_params() -> PyTree:
  rng = np.random.default_rng(0)

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    "text": {"dense": {"kernel": normal(3, 2), "bias": normal(2)}},
    "vision": {"dense": {"kernel": normal(2, 2)}, "norm": {"scale": normal(4)}},
    "logit_scale": normal(),
  }


def make_grads(step: int) -> PyTree:
  rng = np.random.default_rng(100 + step)
  return jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), make_params()
  )


def make(
  num_steps: int = 10, **fields: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  fields = {"learning_rate": 0.1, "schedule": "constant"} | fields
  return optim.make_optimizer(ml_collections.ConfigDict(fields), num_steps)


def run(
  tx: optax.GradientTransformation, grads: list[PyTree]
) -> tuple[PyTree, PyTree]:
  params = make_params()
  state = tx.init(params)
  update = jax.jit(tx.update)
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def assert_trees_equal(a: PyTree, b: PyTree) -> None:
  """Bit for bit: 0.0 and -0.0 differ, NaN equals itself."""
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def numpy_adamw(
  learning_rates: list[float],
  *,
  weight_decay: float,
  decayed: tuple[str, ...],
  clip_norm: float = np.inf,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> dict[str, np.ndarray]:
  flat = {
    k: np.asarray(v, np.float64)
    for k, v in trees.flatten(make_params()).items()
  }
  m = {k: np.zeros_like(v) for k, v in flat.items()}
  v = {k: np.zeros_like(v) for k, v in flat.items()}
  for t, lr in enumerate(learning_rates, start=1):
    grads = {
      k: np.asarray(g, np.float64)
      for k, g in trees.flatten(make_grads(t - 1)).items()
    }
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for k in flat:
      g = grads[k] * min(1.0, clip_norm / norm)
      m[k] = b1 * m[k] + (1 - b1) * g
      v[k] = b2 * v[k] + (1 - b2) * g**2
      m_hat, v_hat = m[k] / (1 - b1**t), v[k] / (1 - b2**t)
      step = m_hat / (np.sqrt(v_hat) + eps)
      if k in decayed:
        step = step + weight_decay * flat[k]
      flat[k] = flat[k] - lr * step
  return flat


def test_adamw_with_decay_and_clipping_is_the_papers():
  tx, _ = make(
    weight_decay=0.3, clip_norm=0.5, b1=0.8, b2=0.95, eps=1e-3, warmup_steps=2
  )
  params, state = run(tx, [make_grads(i) for i in range(3)])
  expected = numpy_adamw(
    [0.1 / 3, 0.2 / 3, 0.1],
    weight_decay=0.3,
    decayed=("text.dense.kernel", "vision.dense.kernel"),
    clip_norm=0.5,
    b1=0.8,
    b2=0.95,
    eps=1e-3,
  )
  for name, value in trees.flatten(params).items():
    np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)
  assert int(optim.num_nonfinite(state)) == 0


def test_decay_mask_adds_names():
  zeros = [jax.tree.map(jnp.zeros_like, make_params())]
  before = trees.flatten(make_params())
  for mask, expected in (
    (r"(^|\.)(bias|scale)$", {"text.dense.kernel", "vision.dense.kernel"}),
    (r"^vision\.", {"text.dense.kernel"}),
  ):
    tx, _ = make(weight_decay=0.5, decay_mask=mask)
    after = trees.flatten(run(tx, zeros)[0])
    changed = {k for k in before if (before[k] != after[k]).any()}
    assert changed == expected
    np.testing.assert_allclose(
      after["text.dense.kernel"], 0.95 * before["text.dense.kernel"], rtol=1e-6
    )


def test_decay_mask_names_stacked_biases():
  tx, _ = make(name="sgd", weight_decay=0.5)
  params = {"bias": jnp.ones((3, 2)), "kernel": jnp.ones((3, 2))}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_array_equal(updates["bias"], 0.0)
  np.testing.assert_allclose(updates["kernel"], -0.05)


def test_clipping_bounds_the_norm_and_leaves_small_gradients():
  grads = make_grads(0)
  norm = float(optax.tree.norm(grads))
  for clip_norm, factor in ((norm / 4, 0.25), (norm * 2, 1.0)):
    tx, _ = make(name="sgd", learning_rate=1.0, clip_norm=clip_norm)
    updates, _ = tx.update(grads, tx.init(make_params()), make_params())
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads)):
      np.testing.assert_allclose(u, -factor * g, rtol=1e-5)


def test_schedules_at_their_end_points():
  _, cosine = make(
    101, schedule="cosine", warmup_steps=20, end_factor=0.1, learning_rate=2.0
  )
  np.testing.assert_allclose(cosine(0), 2.0 / 21, rtol=1e-6)
  np.testing.assert_allclose(cosine(10), 2.0 * 11 / 21, rtol=1e-6)
  np.testing.assert_allclose(cosine(20), 2.0, rtol=1e-6)
  # The middle of the cosine from step 20 to step 101.
  middle = 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 40 / 81)))
  np.testing.assert_allclose(cosine(60), middle, rtol=1e-5)
  np.testing.assert_allclose(cosine(101), 0.2, rtol=1e-5)
  np.testing.assert_allclose(cosine(500), 0.2, rtol=1e-5)
  _, linear = make(100, schedule="linear", end_factor=0.5, learning_rate=2.0)
  np.testing.assert_allclose(
    [linear(0), linear(50), linear(100)], [2.0, 1.5, 1.0], rtol=1e-6
  )
  _, constant = make(100, warmup_steps=3, learning_rate=2.0)
  np.testing.assert_allclose(
    [constant(s) for s in (0, 1, 2, 3, 99)], [0.5, 1.0, 1.5, 2.0, 2.0]
  )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_gradient_changes_nothing_and_is_counted(bad):
  tx, _ = make(clip_norm=1.0, weight_decay=0.1)
  poisoned = make_grads(1)
  poisoned["vision"]["norm"]["scale"] = (
    poisoned["vision"]["norm"]["scale"].at[2].set(bad)
  )
  params, state = run(tx, [make_grads(0)])
  after, state_after = run(tx, [make_grads(0), poisoned, poisoned])
  assert_trees_equal(params, after)
  for name in ("mu", "nu"):
    assert_trees_equal(
      optax.tree.get(state, name), optax.tree.get(state_after, name)
    )
  assert int(optim.num_nonfinite(state)) == 0
  assert int(optim.num_nonfinite(state_after)) == 2
  # A good step after a bad one is as if the bad one had never been.
  good = run(tx, [make_grads(0), make_grads(1)])[0]
  late, state_late = run(tx, [make_grads(0), poisoned, make_grads(1)])
  assert int(optim.num_nonfinite(state_late)) == 1
  assert_trees_equal(good, late)


def test_the_learning_rate_follows_the_step_after_a_skipped_one():
  tx, schedule = make(name="sgd", schedule="linear")
  bad = jax.tree.map(lambda g: g * jnp.nan, make_grads(0))
  params, _ = run(tx, [bad, bad, make_grads(0)])
  expected = jax.tree.map(
    lambda p, g: p - schedule(2) * g, make_params(), make_grads(0)
  )
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_guard_can_be_off():
  tx, _ = make(skip_nonfinite=False)
  bad = jax.tree.map(lambda g: g * jnp.nan, make_grads(0))
  params, state = run(tx, [bad])
  assert np.isnan(params["logit_scale"])
  assert int(optim.num_nonfinite(state)) == 0


def test_frozen_parameters_keep_every_bit_and_have_no_moments():
  tx, _ = make(
    weight_decay=0.3,
    rules=((r"^text\.", "freeze"), ("scale$", "freeze")),
    clip_norm=1.0,
  )
  params = make_params()
  # The bit that adding 0.0 would lose.
  params["text"]["dense"]["bias"] = jnp.array([-0.0, 0.0])
  state = tx.init(params)
  updates, state = jax.jit(tx.update)(make_grads(0), state, params)
  after = jax.jit(optax.apply_updates)(params, updates)
  assert_trees_equal(params["text"], after["text"])
  assert_trees_equal(params["vision"]["norm"], after["vision"]["norm"])
  assert (
    params["vision"]["dense"]["kernel"] != after["vision"]["dense"]["kernel"]
  ).all()
  moments = [n for n in trees.flatten(state) if ".mu." in n or ".nu." in n]
  assert len(moments) == 2
  assert all(name.endswith("vision.dense.kernel") for name in moments)


def test_frozen_gradients_do_not_enter_the_clipping():
  grads = make_grads(0)
  huge = {**grads, "text": jax.tree.map(lambda g: 1e6 * g, grads["text"])}
  tx, _ = make(name="sgd", clip_norm=0.1, rules=((r"^text\.", "freeze"),))
  assert_trees_equal(run(tx, [grads])[0], run(tx, [huge])[0])


def test_the_first_rule_counts_and_scales_the_rate():
  tx, _ = make(
    name="sgd",
    learning_rate=1.0,
    weight_decay=0.5,
    rules=(
      (r"^text\..*kernel", {"lr_mult": 0.25}),
      ("text", {"lr_mult": 3.0}),
    ),
  )
  params, grads = make_params(), make_grads(0)
  updates, _ = tx.update(grads, tx.init(params), params)
  updates, params, grads = map(trees.flatten, (updates, params, grads))
  expected = {
    "text.dense.kernel": 0.25
    * (grads["text.dense.kernel"] + 0.5 * params["text.dense.kernel"]),
    "text.dense.bias": 3.0 * grads["text.dense.bias"],
    "logit_scale": grads["logit_scale"],
  }
  for name, value in expected.items():
    np.testing.assert_allclose(updates[name], -value, rtol=1e-6, err_msg=name)


def test_a_config_from_json_gives_the_same_optimizer():
  fields = {
    "learning_rate": 0.1,
    "schedule": "constant",
    "rules": [["^vision", {"lr_mult": 0.5}], ["bias$", "freeze"]],
  }
  tx, _ = optim.make_optimizer(ml_collections.ConfigDict(fields), 10)
  same, _ = make(rules=(("^vision", {"lr_mult": 0.5}), ("bias$", "freeze")))
  grads = [make_grads(i) for i in range(2)]
  assert_trees_equal(run(tx, grads)[0], run(same, grads)[0])


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"lerning_rate": 0.1}, "learning_rate"),
    ({"name": "adan"}, "'adan' is not"),
    ({"schedule": "cosin"}, "'cosin' is not"),
    ({"warmup_steps": 10}, "warmup_steps 10 does not fit 10 steps"),
    ({"rules": (("text", "freez"),)}, "is freez and must"),
    ({"rules": (("text", {"lr": 0.1}),)}, "lr_mult"),
    ({"rules": ("text", "freeze")}, "not a pair"),
    ({"rules": (("(", "freeze"),)}, "not a regular expression"),
    ({"decay_mask": "*"}, "not a regular expression"),
    ({"groups": (("text", {"schedule": "linear"}),)}, "'text' has schedule"),
    ({"groups": (("text", "freeze"),)}, "not a pair"),
    ({"groups": ("text", {"b1": 0.5})}, "not a pair"),
    ({"groups": (("(", {"b1": 0.5}),)}, "not a regular expression"),
  ],
)
def test_mistakes_are_user_errors(fields, message):
  with pytest.raises(errors.UserError, match=message) as e:
    make(**fields)
  assert "\n" not in str(e.value)


def test_a_rule_that_no_parameter_has_is_refused():
  tx, _ = make(rules=(("visoin", "freeze"),))
  with pytest.raises(errors.UserError, match="no parameter has 'visoin'"):
    tx.init(make_params())


# The text is one player, the picture the other; the rest takes what is left.
GROUPS = (
  (
    r"^text\.",
    dict(learning_rate=0.4, b1=0.0, b2=0.9, clip_norm=None, weight_decay=0.0),
  ),
  (r"^(text|vision)\.", dict(clip_norm=0.25, eps=1e-3)),
)
REST = dict(b1=0.8, weight_decay=0.3, clip_norm=0.5, warmup_steps=2)


def only(name):
  """The rules that freeze all but one top-level name."""
  return ((f"^(?!{name})", "freeze"),)


@pytest.mark.parametrize(
  "name, group", [("text", 0), ("vision", 1), ("logit_scale", None)]
)
def test_a_group_is_trained_as_if_it_were_alone(name, group):
  grads = [make_grads(i) for i in range(4)]
  together, _ = run(make(groups=GROUPS, **REST)[0], grads)
  fields = {} if group is None else GROUPS[group][1]
  alone, _ = run(make(**{**REST, **fields}, rules=only(name))[0], grads)
  for a, b in zip(
    jax.tree.leaves(together[name]), jax.tree.leaves(alone[name])
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  # The fields do something.
  plain, _ = run(make(**REST)[0], grads)
  assert_trees_differ(together[name], plain[name])


def assert_trees_differ(a: PyTree, b: PyTree) -> None:
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert np.abs(np.asarray(x) - y).max() > 1e-6


def test_a_huge_gradient_shortens_no_step_of_another_group():
  grads = make_grads(0)
  huge = {**grads, "vision": jax.tree.map(lambda g: 1e6 * g, grads["vision"])}
  tx, _ = make(name="sgd", clip_norm=0.1, groups=((r"^vision\.", {}),))
  (a, _), (b, _) = run(tx, [grads]), run(tx, [huge])
  for name in ("text", "logit_scale"):
    assert_trees_equal(a[name], b[name])
  plain, _ = make(name="sgd", clip_norm=0.1)
  (a, _), (b, _) = run(plain, [grads]), run(plain, [huge])
  assert_trees_differ(a["text"], b["text"])


def test_groups_have_their_own_rate_and_the_reported_one_is_the_rests():
  tx, schedule = make(
    11,
    name="sgd",
    schedule="linear",
    rules=((r"^text\..*bias", "freeze"), ("text", {"lr_mult": 0.5})),
    groups=(("text", dict(learning_rate=0.8)),),
  )
  np.testing.assert_allclose(schedule(0), 0.1)
  grads = [make_grads(i) for i in range(3)]
  params, _ = run(tx, grads)
  rates = 0.1 * (1 - np.arange(3) / 11)
  by_name = {"text.dense.kernel": 8 * 0.5, "text.dense.bias": 0.0}
  flat = trees.flatten(params)
  for name, value in trees.flatten(make_params()).items():
    for rate, g in zip(rates, grads):
      value = value - rate * by_name.get(name, 1.0) * trees.flatten(g)[name]
    np.testing.assert_allclose(flat[name], value, rtol=1e-5, err_msg=name)


def test_frozen_parameters_of_a_group_keep_every_bit_and_have_no_moments():
  tx, _ = make(groups=GROUPS, rules=(("bias$", "freeze"),), **REST)
  params = make_params()
  params["text"]["dense"]["bias"] = jnp.array([-0.0, 0.0])
  state = tx.init(params)
  updates, state = jax.jit(tx.update)(make_grads(0), state, params)
  after = jax.jit(optax.apply_updates)(params, updates)
  assert_trees_equal(
    params["text"]["dense"]["bias"], after["text"]["dense"]["bias"]
  )
  moments = [n for n in trees.flatten(state) if ".mu." in n]
  assert len(moments) == 4 and not any(n.endswith("bias") for n in moments)


def test_a_nonfinite_gradient_of_one_group_holds_all_back():
  tx, _ = make(groups=GROUPS, **REST)
  poisoned = make_grads(1)
  poisoned["logit_scale"] = poisoned["logit_scale"] * np.nan
  params, _ = run(tx, [make_grads(0)])
  after, state = run(tx, [make_grads(0), poisoned])
  assert_trees_equal(params, after)
  assert int(optim.num_nonfinite(state)) == 1


def test_a_group_that_no_parameter_has_is_refused():
  tx, _ = make(groups=(("^vision", {}), ("visoin", {"b1": 0.5})))
  with pytest.raises(errors.UserError, match="groups: no parameter has 'viso"):
    tx.init(make_params())


def test_all_parameters_may_be_in_groups_and_come_from_json():
  fields = {
    "learning_rate": 0.1,
    "schedule": "constant",
    "clip_norm": 1.0,
    "groups": [["^(text|vision)", {"clip_norm": None}], ["logit", {}]],
  }
  tx, _ = optim.make_optimizer(ml_collections.ConfigDict(fields), 10)
  fields["groups"] = ((r"\.", {"clip_norm": None}), ("t", {}))
  same, _ = make(**fields)
  grads = [make_grads(i) for i in range(2)]
  assert_trees_equal(run(tx, grads)[0], run(same, grads)[0])


def test_without_groups_checkpoints_hold_the_state_under_the_same_names():
  """A stored opt_state is read by these names: they may not change."""
  tx, _ = make(clip_norm=1.0, weight_decay=0.1, rules=(("bias$", "freeze"),))
  state = tx.init(
    {"dense": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
  )
  inner = "0.inner_state.inner_states.trained.inner_state.1"
  assert set(trees.flatten(state)) == {
    "0.notfinite_count",
    "0.last_finite",
    "0.total_notfinite",
    f"{inner}.count",
    f"{inner}.mu.dense.kernel",
    f"{inner}.nu.dense.kernel",
    "1.count",
  }


def test_ema_follows_its_formula_in_float32():
  ema = {"w": jnp.asarray([1.0, -2.0])}
  params = {"w": jnp.asarray([3.0, 5.0], jnp.bfloat16)}
  for step, keep in ((0, 0.1), (8, 0.5), (10**6, 0.99)):
    new = jax.jit(optim.ema_update, static_argnums=2)(ema, params, 0.99, step)
    assert new["w"].dtype == jnp.float32
    expected = keep * np.array([1.0, -2.0]) + (1 - keep) * np.array([3.0, 5.0])
    np.testing.assert_allclose(new["w"], expected, rtol=1e-5)


def test_ema_of_a_constant_is_the_constant():
  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100))}
  ema = params
  for step in range(5):
    ema = optim.ema_update(ema, params, 0.999, step)
  assert_trees_equal(ema, params)
