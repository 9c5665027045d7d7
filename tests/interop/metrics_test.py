"""Every figure beside a public implementation's, on the same inputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian, schedules
from unclip_jax.metrics import frechet, inception, kernel, manifold, pictures


def features(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
  """Like those of a network: not negative, correlated, of unequal scales."""
  rng = np.random.default_rng(seed)
  mixing = np.random.default_rng(99).normal(size=(size, size))
  mixing *= np.geomspace(0.1, 1.0, size)
  x = rng.normal(size=(count, size)) @ mixing + 0.2 * seed
  return np.maximum(x, 0.0).astype(np.float32)


@pytest.fixture(scope="module")
def torch_fidelity():
  pytest.importorskip("torch")
  return pytest.importorskip("torch_fidelity")


def test_frechet_distance(torch_fidelity):
  import torch
  from torch_fidelity import metric_fid

  a, b = features(500, seed=1), features(400, seed=2)
  statistics = [
    metric_fid.fid_features_to_statistics(torch.from_numpy(x).double())
    for x in (a, b)
  ]
  expected = metric_fid.fid_statistics_to_metric(*statistics, False)
  moments = [frechet.Moments.of(x[:100]).update(x[100:]) for x in (a, b)]
  np.testing.assert_allclose(
    frechet.distance(*moments),
    expected["frechet_inception_distance"],
    rtol=1e-6,
  )


def test_kernel_distance(torch_fidelity):
  import torch
  from torch_fidelity import metric_kid

  a, b = features(300, seed=1), features(200, seed=2)
  expected = metric_kid.kid_features_to_metric(
    *(torch.from_numpy(x).double() for x in (a, b)),
    kid_subsets=10,
    kid_subset_size=100,
    rng_seed=7,
  )
  found = kernel.kid(a, b, num_subsets=10, subset_size=100, seed=7)
  np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6)


def test_inception_score(torch_fidelity):
  import torch
  from torch_fidelity import metric_isc

  logits = features(203, 20)
  for shuffle, seed in ((True, 5), (False, None)):
    expected = metric_isc.isc_features_to_metric(
      torch.from_numpy(logits), splits=10, shuffle=shuffle, rng_seed=seed
    )
    found = inception.score(logits, seed=seed)
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6)


def test_precision_and_recall(torch_fidelity):
  import torch
  from torch_fidelity import metric_prc

  true, drawn = features(200, seed=1), features(150, seed=2)
  expected = metric_prc.prc_features_to_metric(
    *(torch.from_numpy(x).double() for x in (drawn, true)), prc_neighborhood=3
  )
  found = manifold.prdc(true, drawn, 3)
  np.testing.assert_allclose(
    [found["precision"], found["recall"]],
    [expected["precision"], expected["recall"]],
    rtol=1e-6,
  )
  assert 0.05 < found["recall"] < 0.95


@pytest.mark.parametrize("k", [1, 5])
def test_prdc(k):
  prdc = pytest.importorskip("prdc")
  true, drawn = features(200, seed=1), features(150, seed=2)
  expected = prdc.compute_prdc(
    true.astype(np.float64), drawn.astype(np.float64), nearest_k=k
  )
  assert manifold.prdc(true, drawn, k) == pytest.approx(expected, rel=1e-12)


def test_psnr_and_ssim():
  metrics = pytest.importorskip("skimage.metrics")
  rng = np.random.default_rng(0)
  a = rng.uniform(-0.8, 0.8, (3, 24, 20, 3)).astype(np.float32)
  b = a + 0.1 * rng.normal(size=a.shape).astype(np.float32)
  for x, y, psnr, ssim in zip(a, b, pictures.psnr(a, b), pictures.ssim(a, b)):
    x, y = x.astype(np.float64), y.astype(np.float64)
    expected = metrics.peak_signal_noise_ratio(x, y, data_range=2.0)
    np.testing.assert_allclose(psnr, expected, rtol=1e-9)
    expected = metrics.structural_similarity(
      x,
      y,
      data_range=2.0,
      channel_axis=-1,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
    )
    np.testing.assert_allclose(ssim, expected, rtol=1e-9)


def test_cmmd():
  torch = pytest.importorskip("torch")
  a, b = features(60, seed=1), features(50, seed=2)
  x, y = (
    torch.nn.functional.normalize(torch.tensor(z).double()) for z in (a, b)
  )

  def mean(x, y):
    return torch.exp(-(torch.cdist(x, y) ** 2) / (2 * 10**2)).mean()

  expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
  np.testing.assert_allclose(kernel.cmmd(a, b), expected, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_terms_of_the_bound(prediction, variance):
  torch = pytest.importorskip("torch")
  schedule = schedules.make_schedule("cosine", 20)
  rng = np.random.default_rng(0)
  x_start, noise, output = rng.normal(size=(3, 19, 6)).astype(np.float32)
  t = np.arange(1, 20)
  level, before = (
    x[t][:, None]
    for x in (schedule.alphas_cumprod, schedule.alphas_cumprod_prev)
  )
  beta = 1 - level / before
  x_t = np.sqrt(level) * x_start + np.sqrt(1 - level) * noise
  predicted = {
    "eps": (x_t - np.sqrt(1 - level) * output) / np.sqrt(level),
    "x_start": output,
    "v": np.sqrt(level) * x_t - np.sqrt(1 - level) * output,
  }[prediction]

  def step(x_start, variance):
    mean = np.sqrt(before) * beta * x_start
    mean = mean + np.sqrt(level / before) * (1 - before) * x_t
    mean, std = mean / (1 - level), np.sqrt(variance) + 0 * x_t
    return torch.distributions.Normal(torch.tensor(mean), torch.tensor(std))

  small = beta * (1 - before) / (1 - level)
  kl = torch.distributions.kl_divergence(
    step(x_start, small),
    step(predicted, small if variance == "fixed_small" else beta),
  )
  found = gaussian.vlb_terms(
    schedule,
    jnp.asarray(output),
    jnp.asarray(x_start),
    jnp.asarray(x_t, jnp.float32),
    jnp.asarray(t),
    prediction=prediction,
    variance=variance,
  )
  expected = kl.mean(dim=1).numpy() / np.log(2)
  np.testing.assert_allclose(found, expected, rtol=2e-4)
