"""The AR prior's codes, and what its task promises beyond the network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax import trainer
from unclip_jax.tasks import clip as clip_task
from unclip_jax.tasks import prior_ar
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

N, D, K, BUCKETS = 400, 6, 4, 16


def embeds():
  """[N, D] with standard deviations 2 to 0.1 along unknown directions."""
  rng = np.random.default_rng(0)
  rotation, _ = np.linalg.qr(rng.normal(size=(D, D)))
  scales = np.linspace(2.0, 0.1, D)
  x = rng.standard_t(4, size=(N, D)) * scales @ rotation + rng.normal(size=D)
  return x.astype(np.float32)


def fit(kind="uniform", x=None, weights=None, num_codes=K):
  x = embeds() if x is None else x
  weights = jnp.ones(len(x)) if weights is None else jnp.asarray(weights)
  return prior_ar.fit_code_space(
    jnp.asarray(x),
    jnp.linspace(-1, 1, len(x)),
    weights,
    num_codes=num_codes,
    num_buckets=BUCKETS,
    num_dot_buckets=5,
    kind=kind,
  )


@pytest.mark.parametrize("kind", prior_ar.BUCKET_KINDS)
def test_components_are_those_of_largest_variance_in_order(kind):
  x = embeds()
  table = fit(kind)
  components = np.asarray(table["components"])
  np.testing.assert_allclose(components @ components.T, np.eye(K), atol=1e-5)
  np.testing.assert_allclose(table["mean"], x.mean(0), atol=1e-5)
  variances = ((x - x.mean(0)) @ components.T).var(0)
  assert np.all(np.diff(variances) < 0)
  largest = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1][:K]
  np.testing.assert_allclose(variances, largest, rtol=1e-4)


@pytest.mark.parametrize("kind", prior_ar.BUCKET_KINDS)
def test_error_is_truncation_plus_at_most_half_a_bucket_per_dimension(kind):
  x = embeds()
  table = fit(kind)
  codes = prior_ar.quantize(table, x)
  assert codes.shape == (N, K) and codes.dtype == jnp.int32
  assert codes.min() == 0 and codes.max() == BUCKETS - 1
  decoded = prior_ar.dequantize(table, codes)

  table = {k: np.asarray(v, np.float64) for k, v in table.items()}
  centred = x - table["mean"]
  scores = centred @ table["components"].T
  truncation = ((centred - scores @ table["components"]) ** 2).sum(1)
  # Components are orthonormal, so the two errors are, too.
  rounding = scores - np.take_along_axis(table["centers"].T, codes, axis=0)
  error = ((np.asarray(decoded, np.float64) - x) ** 2).sum(1)
  np.testing.assert_allclose(
    error, truncation + (rounding**2).sum(1), rtol=1e-3, atol=1e-5
  )
  widths = np.diff(table["edges"], axis=1)
  half = np.take_along_axis(widths.T, codes, axis=0) / 2
  assert np.all(np.abs(rounding) <= half + 1e-5)
  if kind == "uniform":
    assert np.ptp(widths, axis=1).max() < 1e-5


def test_codes_of_bucket_centers_are_their_own():
  table = fit()
  codes = np.random.default_rng(0).integers(0, BUCKETS, (50, K), np.int32)
  again = prior_ar.quantize(table, prior_ar.dequantize(table, codes))
  np.testing.assert_array_equal(again, codes)


def test_beyond_the_edges_is_the_last_bucket():
  table = fit()
  far = table["mean"] + 1e4 * table["components"][0]
  codes = prior_ar.quantize(table, jnp.stack([far, 2 * table["mean"] - far]))
  np.testing.assert_array_equal(codes[:, 0], [BUCKETS - 1, 0])


def test_quantile_buckets_are_equally_probable():
  codes = np.asarray(prior_ar.quantize(fit("quantile"), embeds()))
  for k in range(K):
    counts = np.bincount(codes[:, k], minlength=BUCKETS)
    np.testing.assert_allclose(counts, N / BUCKETS, atol=2)


@pytest.mark.parametrize("kind", prior_ar.BUCKET_KINDS)
def test_rows_that_only_fill_up_a_batch_do_not_count(kind):
  x = embeds()
  padded = np.concatenate([x, np.repeat(x[-1:], 100, 0)])
  a, b = fit(kind, x), fit(kind, padded, np.arange(N + 100) < N)
  for name in ("mean", "edges"):
    np.testing.assert_allclose(a[name], b[name], atol=2e-4)


def test_tables_do_not_depend_on_the_number_of_batches():
  task, _, frozen, batch = _ready()
  prepare = lambda n: jax.eval_shape(  # noqa: E731
    lambda frozen, batch: task.prepare(frozen, [batch] * n), frozen, batch
  )
  assert prepare(1) == prepare(3)


def test_dot_edges_are_quantiles():
  dots = np.asarray(fit()["dot_edges"])
  np.testing.assert_allclose(dots, [-0.6, -0.2, 0.2, 0.6], atol=0.01)


@pytest.mark.parametrize(
  ("options", "word"), [({"num_codes": 7}, "6 dim"), ({"kind": "log"}, "log")]
)
def test_a_wrong_code_space_is_an_error(options, word):
  with pytest.raises(errors.UserError, match=word):
    fit(**options)


@functools.cache
def _ready():
  """(task, variables with random values, frozen, batch) of the smoke config."""
  run = trainer.setup(config_lib.load("configs/emoji/prior_ar.py:smoke"))
  batches = run.data.eval_batches("train", 4, 8)
  upstream = random_variables.like_tree(run.frozen)
  frozen = {**upstream, **run.task.prepare(upstream, batches)}
  batch = next(iter(batches))
  shapes = jax.eval_shape(run.task.init, jax.random.key(0), batch, frozen)
  variables = random_variables.like_tree(shapes)
  # Large logits, so that draws differ from row to row and not by rounding.
  variables["params"]["output"]["kernel"] *= 3
  return run.task, variables, frozen, batch


def _sample(rng, batch=None, **options):
  task, variables, frozen, own = _ready()
  run = jax.jit(functools.partial(task.sample, **options))
  return run(variables, frozen, batch or own, rng)


@pytest.fixture(scope="module")
def keys():
  return jax.random.split(jax.random.key(0), 4)


def test_a_caption_draws_the_same_in_any_batch(keys):
  """Also keeps apart conditions and candidates in the 2 * B * n rows."""
  _, _, _, batch = _ready()
  options = dict(guidance_scale=2.0, num_candidates=2)
  whole = _sample(keys, **options)["image_embed"]
  part = {k: v[2:] for k, v in batch.items()}
  alone = _sample(keys[2:], part, **options)["image_embed"]
  np.testing.assert_allclose(alone, whole[2:], atol=1e-4)
  assert np.abs(np.diff(whole, axis=0)).max() > 1e-3


def test_the_best_of_many_candidates_is_nearer_to_the_text(keys):
  def cosine(output):
    unit = clip_task.normalize(output["image_embed"])
    return jnp.sum(unit * output["text_embed"], axis=-1)

  one, many = (_sample(keys, num_candidates=n) for n in (1, 16))
  assert np.all(cosine(many) >= cosine(one) - 1e-3)
  assert np.mean(cosine(many)) > np.mean(cosine(one)) + 1e-3


def test_sampling_follows_the_loss_networks_probabilities(keys):
  """Greedy codes are the argmax of the teacher-forced logits on themselves."""
  task, variables, frozen, batch = _ready()
  drawn = _sample(keys, temperature=0.0, dot_quantile=0.99)["image_embed"]
  codes = prior_ar.quantize(frozen["code_space"], drawn)
  condition = task._condition(frozen, batch)
  dot_bucket = jnp.full((4,), task.model.num_dot_buckets - 1)
  logits, _ = task.model.apply(variables, codes, dot_bucket, **condition)
  np.testing.assert_array_equal(logits.argmax(-1), codes)


@pytest.mark.parametrize(
  ("quantile", "expected"), [(0.0, range(20)), (0.5, range(10, 20)),
    (0.7, range(14, 20)), (0.95, [19]), (0.99, [19])],
)  # fmt: skip
def test_dot_product_is_drawn_from_above_the_quantile(quantile, expected):
  task, *_ = _ready()
  model = dataclasses.replace(task.model, num_dot_buckets=20)
  task = dataclasses.replace(task, model=model)
  one = jax.random.key(0)
  for rng in (one, jax.random.split(one, 500)):
    drawn = task._draw_dot_bucket(rng, 500, quantile)
    assert drawn.shape == (500,)
    assert set(np.asarray(drawn).tolist()) == set(expected)


def test_a_fresh_network_loses_the_log_of_the_buckets():
  task, variables, frozen, batch = _ready()
  zero = jax.tree.map(jnp.zeros_like, variables["params"]["output"])
  fresh = {"params": {**variables["params"], "output": zero}}
  output = task.loss(
    fresh, frozen, batch, jax.random.key(0), step=0, train=True
  )
  assert output.loss.shape == output.metrics["accuracy"].shape == (4,)
  np.testing.assert_allclose(output.loss, np.log(task.model.num_buckets), 1e-5)


def test_options_out_of_their_range_are_errors():
  with pytest.raises(errors.UserError, match="dot_quantile"):
    _sample(jax.random.key(0), dot_quantile=1.0)
