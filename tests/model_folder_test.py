"""Trained models on disk: model folders, and runs read as such."""

import re

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from tests import saved_trees
from unclip_jax import checkpoints, model_folder, run_folder
from unclip_jax.utils.errors import UserError


@pytest.fixture
def config():
  return ml_collections.ConfigDict({"model": {"width": 8}})


def _run(workdir, config, **options):
  tree = saved_trees.make_tree(4, **options)
  checkpointer = checkpoints.Checkpointer(workdir / "checkpoints")
  checkpointer.save(4, tree)
  checkpointer.close()
  run_folder.save_config(workdir, config)
  return tree


@pytest.mark.parametrize("ema", [True, False])
def test_run_and_its_model_folder(tmp_path, config, ema):
  tree = _run(tmp_path / "run", config, ema=ema)
  run = model_folder.load_model(tmp_path / "run")
  state = tree["state"]
  saved_trees.assert_same(
    run.variables,
    {
      "params": state.ema_params if ema else state.params,
      **state.model_state,
    },
  )
  assert run.config.to_dict() == config.to_dict()
  assert run.assets_dir == str(tmp_path / "run" / "assets")
  saved_trees.assert_same(run.tables, tree["tables"])

  asset = tmp_path / "some.model"
  asset.write_bytes(b"tokens")
  folder = tmp_path / "model"
  model_folder.save_model(
    folder,
    run.config,
    run.variables,
    run.tables,
    {"tokenizer.model": asset},
  )
  names = sorted(p.name for p in folder.iterdir())
  assert names == ["config.json", "model.safetensors", "tokenizer.model"]
  model = model_folder.load_model(folder)
  saved_trees.assert_same(model.variables, run.variables)
  saved_trees.assert_same(model.tables, run.tables)
  assert model.config.to_dict() == run.config.to_dict()
  assert model.assets_dir == str(folder)
  assert (folder / "tokenizer.model").read_bytes() == b"tokens"
  assert model.fingerprint == run.fingerprint
  assert re.fullmatch("[0-9a-f]{16}", model.fingerprint)


def test_only_needed_leaves_are_read(tmp_path, config, monkeypatch):
  _run(tmp_path, config)
  asked = []
  load = checkpoints.ocp.load

  def spy(path, request):
    skip = checkpoints.ocp.PLACEHOLDER
    asked.extend(n for n, v in request.items() if v is not skip)
    return load(path, request)

  monkeypatch.setattr(checkpoints.ocp, "load", spy)
  model_folder.load_model(tmp_path)
  groups = {".".join(n.split(".")[:2]) for n in asked if n[0] == "s"}
  assert groups == {"state.ema_params", "state.model_state"}


def test_shapes_alone_read_no_leaf(tmp_path, config, monkeypatch):
  _run(tmp_path / "run", config)
  run = model_folder.load_model(tmp_path / "run")
  model_folder.save_model(
    tmp_path / "model", config, run.variables, run.tables, {}
  )
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    (run.variables, run.tables),
  )
  monkeypatch.setattr(checkpoints.ocp, "load", None)
  monkeypatch.setattr(model_folder.tensor_files._Reader, "__call__", None)
  for folder in ("run", "model"):
    model = model_folder.load_model(tmp_path / folder, abstract=True)
    assert (model.variables, model.tables) == shapes
    assert model.fingerprint == ""


def test_fingerprint_is_that_of_the_params():
  params = saved_trees.make_tree()["state"].params
  base = model_folder.fingerprint({"params": params})
  assert model_folder.fingerprint({"params": params, "stats": 1}) == base
  for change in (
    {"scale": params["scale"] + 1},
    {"scale": params["scale"].reshape(1)},
    {"scale": jnp.int32(0)},
    {"other": params["scale"]},
  ):
    changed = {"params": {**params, **change}}
    assert model_folder.fingerprint(changed) != base


def test_damaged_weights(tmp_path, config):
  variables = {"params": saved_trees.make_tree()["state"].params}
  model_folder.save_model(tmp_path, config, variables, {}, {})
  path = tmp_path / "model.safetensors"
  saved_trees.flip_bit(path, 8 * path.stat().st_size - 1)
  with pytest.raises(UserError, match=r"damaged.*fingerprint"):
    model_folder.load_model(tmp_path)
  path.write_bytes(b"not safetensors")
  with pytest.raises(UserError, match="damaged"):
    model_folder.load_model(tmp_path)


def test_missing_things_are_said_in_one_line(tmp_path, config):
  for folder in (tmp_path / "nowhere", tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors.*checkpoints/"):
      model_folder.load_model(folder)
  with pytest.raises(UserError, match=r"no file .*tokenizer"):
    model_folder.save_model(
      tmp_path / "m", config, {"params": {}}, {}, {"t": "no/tokenizer"}
    )
  _run(tmp_path, config)
  (tmp_path / "config.json").unlink()
  with pytest.raises(UserError, match=r"config\.json"):
    model_folder.load_model(tmp_path)
