"""CLIP in the folders of OpenCLIP."""

import json
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors import torch as safetensors_torch  # noqa: E402

from tests import bpe_files  # noqa: E402
from tests.interop import tiny_clips  # noqa: E402
from unclip_jax.interop import open_clip  # noqa: E402
from unclip_jax.utils.errors import UserError  # noqa: E402


def _config(**changes) -> dict:
  """open_clip_config.json of `tiny_clips.make`; changes are "group.field"."""
  config = {
    "model_cfg": {
      "embed_dim": 12,
      "vision_cfg": {
        "image_size": 16,
        "layers": 2,
        "width": 20,
        "head_width": 4,
        "patch_size": 4,
        "mlp_ratio": 2.5001,
      },
      "text_cfg": {
        "context_length": 16,
        "vocab_size": 574,
        "width": 24,
        "heads": 3,
        "layers": 2,
      },
    },
    "preprocess_cfg": {
      "mean": [0.48145466, 0.4578275, 0.40821073],
      "std": [0.26862954, 0.26130258, 0.27577711],
      "interpolation": "bicubic",
      "resize_mode": "shortest",
    },
  }
  model = config["model_cfg"]
  groups = {"model_cfg": model, "preprocess_cfg": config["preprocess_cfg"]}
  groups |= {name: model[name] for name in ("vision_cfg", "text_cfg")}
  for name, value in changes.items():
    group, _, field = name.partition(".")
    groups[group][field] = value
  return config


def _write(folder: pathlib.Path, tensors, config: dict) -> str:
  folder.mkdir(exist_ok=True)
  bpe_files.write(folder)
  (folder / "open_clip_config.json").write_text(json.dumps(config))
  path = folder / "open_clip_model.safetensors"
  safetensors_torch.save_file(tensors, path)
  return str(folder)


@pytest.fixture(scope="module")
def tensors():
  return tiny_clips.openai_tensors(tiny_clips.make())


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_outputs_are_those_of_the_model(quick_gelu, tmp_path):
  model = tiny_clips.make("quick_gelu" if quick_gelu else "gelu")
  config = _config(**({"model_cfg.quick_gelu": True} if quick_gelu else {}))
  src = _write(tmp_path / "src", tiny_clips.openai_tensors(model), config)
  out = str(tmp_path / "clip")
  open_clip.convert_in(src, out)
  tiny_clips.assert_close(model, out, 1e-5)
  tiny_clips.assert_close(model, out, 2e-2, "bfloat16")


@pytest.mark.parametrize(
  "name", ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt"]
)
def test_weights_of_torch(name, tensors, tmp_path):
  src = _write(tmp_path, tensors, _config())
  expected = {k: v.load() for k, v in open_clip.read(src).arrays.items()}
  (tmp_path / "open_clip_model.safetensors").unlink()
  training = {f"module.{name}": x for name, x in tensors.items()}
  for saved in (tensors, {"state_dict": training}):
    torch.save(saved, tmp_path / name)
    found = open_clip.read(src)
    assert found.arrays.keys() == expected.keys()
    for name_of_ours, array in found.arrays.items():
      np.testing.assert_array_equal(array.load(), expected[name_of_ours])


def test_fields_of_the_config(tensors, tmp_path):
  bias = {"logit_bias": torch.tensor(-10.0)}
  changes = {
    "model_cfg.init_logit_bias": -10,
    "model_cfg.custom_text": False,
    "vision_cfg.ls_init_value": None,
    "vision_cfg.patch_dropout": 0.5,
    "text_cfg.pool_type": "argmax",
    "preprocess_cfg.mean": [0.5, 0.4, 0.3],
  }
  src = _write(tmp_path, tensors | bias, _config(**changes))
  part = open_clip.read(src)
  assert part.config.model.logit_bias_init == -10
  assert part.config.model.image_mean == (0.5, 0.4, 0.3)
  assert part.config.model.activation == "gelu"
  assert part.arrays["params.logit_bias"].load() == -10


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("model_cfg.custom_text", True, "model_cfg.custom_text True has no place"),
    ("model_cfg.multimodal_cfg", {"layers": 1}, "model_cfg.multimodal_cfg"),
    ("model_cfg.embed_dim", None, "embed_dim None"),
    ("vision_cfg.layers", [3, 4, 6, 3], r"layers \[3, 4, 6, 3\]"),
    ("vision_cfg.timm_model_name", "vit", "vision_cfg.timm_model_name 'vit'"),
    ("vision_cfg.ls_init_value", 0.1, "vision_cfg.ls_init_value"),
    ("vision_cfg.no_ln_pre", True, "vision_cfg.no_ln_pre"),
    ("vision_cfg.pool_type", "avg", "vision_cfg.pool_type 'avg'"),
    ("vision_cfg.attentional_pool", True, "vision_cfg.attentional_pool"),
    ("vision_cfg.head_width", 6, "not a multiple of 3 heads"),
    ("text_cfg.pool_type", "last", "text_cfg.pool_type 'last'"),
    ("text_cfg.no_causal_mask", True, "text_cfg.no_causal_mask"),
    ("text_cfg.hf_model_name", "roberta", "text_cfg.hf_model_name"),
    ("text_cfg.hf_tokenizer_name", "bert", "text_cfg.hf_tokenizer_name"),
    ("text_cfg.embed_cls", True, "text_cfg.embed_cls"),
    ("text_cfg.norm_kwargs", {"eps": 1e-6}, "text_cfg.norm_kwargs"),
    ("text_cfg.context_length", 15, "positional_embedding has another shape"),
    ("preprocess_cfg.resize_mode", "squash", "preprocess_cfg.resize_mode"),
    ("preprocess_cfg.interpolation", "bilinear", "interpolation 'bilinear'"),
    ("preprocess_cfg.std", [1, 2], "which must be three numbers"),
    ("model_cfg.text_cfg", 3, "is damaged"),
  ],
)
def test_what_has_no_place_is_named(tensors, tmp_path, field, value, words):
  src = _write(tmp_path, tensors, _config(**{field: value}))
  with pytest.raises(UserError, match=words) as error:
    open_clip.read(src)
  assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit(tensors, tmp_path):
  for change, words in (
    ({"visual.ls.gamma": torch.zeros(2)}, "visual.ls.gamma is left over"),
    ({"logit_scale": torch.zeros(1)}, "logit_scale has another shape"),
  ):
    src = _write(tmp_path, tensors | change, _config())
    with pytest.raises(UserError, match=words):
      open_clip.read(src)
  (tmp_path / "open_clip_model.safetensors").unlink()
  with pytest.raises(UserError, match="looked for open_clip_model"):
    open_clip.read(src)
