"""The FID's Inception network beside torch-fidelity's, and its file."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests import random_inception
from unclip_jax import inference, tensor_files
from unclip_jax.interop import correspondence, inception
from unclip_jax.utils import trees
from unclip_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def variables():
  return random_inception.variables()


@pytest.fixture(scope="module")
def tensors(variables) -> dict[str, np.ndarray]:
  flat = {k: tensor_files.lazy(x) for k, x in trees.flatten(variables).items()}
  found = correspondence.to_theirs(inception.pairs(), flat, where="it")
  return {k: np.ascontiguousarray(x.load()) for k, x in found.items()}


def test_a_file_becomes_a_model(tensors, variables, tmp_path):
  path, out = str(tmp_path / "weights.safetensors"), str(tmp_path / "inception")
  counter = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros(())}
  safetensors_numpy.save_file(tensors | counter, path)
  inception.convert_in(path, out)
  loaded = inference.load(out)
  assert jax.tree.structure(loaded.variables) == jax.tree.structure(variables)
  for a, b in zip(
    jax.tree.leaves(loaded.variables), jax.tree.leaves(variables)
  ):
    np.testing.assert_array_equal(a, b)
  assert set(loaded.task.predict_fns()) == {"features"}


def test_another_network_is_refused(tensors, tmp_path):
  path = str(tmp_path / "weights.safetensors")
  others = {k: x for k, x in tensors.items() if k != "fc.bias"}
  others["AuxLogits.fc.weight"] = np.zeros((2, 3), np.float32)
  safetensors_numpy.save_file(others, path)
  words = "fc.bias is missing; AuxLogits.fc.weight is left over"
  with pytest.raises(UserError, match=words):
    inception.read(path)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (400, 310)])
def test_features_are_those_of_torch_fidelity(
  height, width, tensors, variables, tmp_path_factory
):
  torch = pytest.importorskip("torch")
  pytest.importorskip("torch_fidelity")
  from torch_fidelity import feature_extractor_inceptionv3 as reference

  path: pathlib.Path = tmp_path_factory.mktemp("file") / "weights.pth"
  torch.save({k: torch.from_numpy(x) for k, x in tensors.items()}, path)
  network = reference.FeatureExtractorInceptionV3(
    "inception", ["2048", "logits_unbiased", "logits"], str(path)
  )
  pictures = random_inception.pictures(2, height, width)
  with torch.no_grad():
    expected = network(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()))
  part = inception.read(str(path))
  loaded = trees.unflatten({k: x.load() for k, x in part.arrays.items()})
  features, out = jax.jit(inception.inception.Model().apply)(
    loaded, pictures / 127.5 - 1.0
  )
  found = (features, out["logits_unbiased"], out["logits"])
  for ours, theirs in zip(found, expected):
    error = np.linalg.norm(ours - theirs.numpy())
    assert error < 1e-5 * np.linalg.norm(theirs.numpy())
