"""CLIP in the folders of transformers: the same outputs, and there and back."""

import json
import math
import os
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors import torch as safetensors_torch  # noqa: E402

from tests import bpe_files  # noqa: E402
from tests.interop import tiny_clips  # noqa: E402
from unclip_jax import inference, model_folder  # noqa: E402
from unclip_jax.interop import clip_hf, parts  # noqa: E402
from unclip_jax.tensor_files import LazyArray  # noqa: E402
from unclip_jax.utils.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def model():
  return tiny_clips.make()


@pytest.fixture(scope="module")
def hf_folder(model, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("hf")
  tiny_clips.save(model, folder)
  return folder


@pytest.fixture
def copy(hf_folder, tmp_path) -> pathlib.Path:
  shutil.copytree(hf_folder, tmp_path / "copy")
  return tmp_path / "copy"


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_outputs_are_those_of_transformers(activation, tmp_path):
  model = tiny_clips.make(activation)
  clip_hf.convert_in(tiny_clips.save(model, tmp_path / "hf"), tmp_path / "clip")
  tiny_clips.assert_close(model, str(tmp_path / "clip"), 1e-5)
  tiny_clips.assert_close(model, str(tmp_path / "clip"), 2e-2, "bfloat16")


def test_there_and_back_is_the_same_to_the_bit(model, hf_folder, tmp_path):
  part, back = str(tmp_path / "clip"), str(tmp_path / "back")
  clip_hf.convert_in(str(hf_folder), part)
  clip_hf.convert_out(part, back)
  again, info = transformers.CLIPModel.from_pretrained(
    back, output_loading_info=True
  )
  assert not any(info.values())
  before, after = model.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert torch.equal(tensor, after[name]), name
  for towers in ("text_config", "vision_config"):
    old, new = getattr(model.config, towers), getattr(again.config, towers)
    for name in (
      *("hidden_size", "intermediate_size", "num_hidden_layers"),
      *("num_attention_heads", "hidden_act"),
    ):
      assert getattr(old, name) == getattr(new, name), name
  tokenizer = transformers.AutoTokenizer.from_pretrained(back)
  assert tokenizer(tiny_clips.TEXTS[0]).input_ids == [572, *_ids(back), 573]
  processor = transformers.CLIPImageProcessorPil.from_pretrained(back)
  assert processor.size["shortest_edge"] == 16
  public = transformers.CLIPImageProcessorPil()
  assert processor.image_mean == pytest.approx(public.image_mean)
  assert processor.image_std == pytest.approx(public.image_std)


def _ids(folder) -> list[int]:
  tokens, mask = clip_hf.tokenizers.load(folder).encode(
    tiny_clips.TEXTS[:1], 16
  )
  return tokens[mask][1:-1].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_as_it_is(dtype, tmp_path):
  model = tiny_clips.make().to(dtype)
  part, back = str(tmp_path / "clip"), str(tmp_path / "back")
  clip_hf.convert_in(tiny_clips.save(model, tmp_path / "hf"), part)
  tiny_clips.assert_close(model.float(), part, 1e-5)
  clip_hf.convert_out(part, back)
  tensors = safetensors_torch.load_file(f"{back}/model.safetensors")
  for name, tensor in model.state_dict().items():
    assert tensors[name].dtype == dtype
    assert torch.equal(tensors[name].float(), tensor), name


def test_towers_of_two_folders_make_one_clip(model, tmp_path):
  """As in Karlo's folders: text_encoder/, tokenizer/ and image_encoder/."""
  for kind, folder in (("Text", "text_encoder"), ("Vision", "image_encoder")):
    config = getattr(model.config, f"{kind.lower()}_config")
    config.projection_dim = 12
    tower = getattr(transformers, f"CLIP{kind}ModelWithProjection")(config)
    state = model.state_dict()
    tower.load_state_dict({k: state[k] for k in tower.state_dict()})
    tower.save_pretrained(tmp_path / folder)
  text, vision = str(tmp_path / "text_encoder"), str(tmp_path / "image_encoder")
  tokenizer = str(tmp_path / "tokenizer")
  bpe_files.write(tmp_path / "tokenizer")
  (tmp_path / "tokenizer/tokenizer_config.json").write_text(
    '{"pad_token": "!"}'
  )

  whole = str(tmp_path / "whole")
  parts.write(whole, clip_hf.read(text, vision, tokenizer=tokenizer))
  loaded = inference.load(whole)
  assert set(loaded.variables["params"]) == {"text", "vision"}
  assert clip_hf.tokenizers.load(whole).pad_id == 0
  tiny_clips.assert_close(model, whole, 1e-5)

  alone = str(tmp_path / "alone")
  parts.write(alone, clip_hf.read(text, tokenizer=tokenizer))
  tiny_clips.assert_close(model, alone, 1e-5)
  with pytest.raises(UserError, match="--image_encoder"):
    _ = inference.load(alone).task.image_size

  for kind, folder in (
    ("clip_text_model", text),
    ("clip_vision_model", vision),
  ):
    back = str(tmp_path / kind)
    clip_hf.write(model_folder.open_model(whole), back, kind)
    tower = getattr(transformers, json.loads(
      pathlib.Path(folder, "config.json").read_text()
    )["architectures"][0])  # fmt: skip
    before, after = tower.from_pretrained(folder), tower.from_pretrained(back)
    for name, tensor in before.state_dict().items():
      assert torch.equal(tensor, after.state_dict()[name]), name
  with pytest.raises(UserError, match="no vision tower"):
    clip_hf.convert_out(alone, str(tmp_path / "out"))
  with pytest.raises(UserError, match="no logit_scale"):
    clip_hf.convert_out(whole, str(tmp_path / "out"))
  with pytest.raises(UserError, match="hold the same tower"):
    clip_hf.read(text, text)


# Public sizes: vision width, depth, heads, MLP, patch, image | text width,
# depth, heads | embedding | parameters, as they are published.
_PUBLIC = {
  "B/32": (768, 12, 12, 3072, 32, 224, 512, 12, 8, 512, 151_277_313),
  "B/16": (768, 12, 12, 3072, 16, 224, 512, 12, 8, 512, 149_620_737),
  "L/14": (1024, 24, 16, 4096, 14, 224, 768, 12, 12, 768, 427_616_513),
  "L/14-336": (1024, 24, 16, 4096, 14, 336, 768, 12, 12, 768, 427_944_193),
  "H/14": (1280, 32, 16, 5120, 14, 224, 1024, 24, 16, 1024, 986_109_441),
  "g/14": (1408, 40, 16, 6144, 14, 224, 1024, 24, 16, 1024, 1_366_678_273),
  "bigG/14": (1664, 48, 16, 8192, 14, 224, 1280, 32, 20, 1280, 2_539_567_105),
}


@pytest.mark.parametrize("name", _PUBLIC)
def test_names_shapes_and_counts_of_the_public_sizes(name, copy, monkeypatch):
  *sizes, count = _PUBLIC[name]
  v_width, v_depth, v_heads, v_mlp, patch, side = sizes[:6]
  t_width, t_depth, t_heads, embed_dim = sizes[6:]
  config = transformers.CLIPConfig(
    projection_dim=embed_dim,
    text_config=dict(
      hidden_size=t_width,
      num_hidden_layers=t_depth,
      num_attention_heads=t_heads,
      intermediate_size=4 * t_width,
    ),
    vision_config=dict(
      hidden_size=v_width,
      num_hidden_layers=v_depth,
      num_attention_heads=v_heads,
      intermediate_size=v_mlp,
      patch_size=patch,
      image_size=side,
    ),
  )
  with torch.device("meta"):
    full = transformers.CLIPModel(config)
  tensors = {
    name: LazyArray(tuple(x.shape), np.dtype(np.float32), lambda: None)
    for name, x in full.state_dict().items()
  }
  config.save_pretrained(copy)
  monkeypatch.setattr(
    clip_hf.correspondence, "find_tensors", lambda *_: tensors
  )
  part = clip_hf.read(str(copy))
  found = sum(math.prod(x.shape) for x in part.arrays.values())
  assert found == count == sum(p.numel() for p in full.parameters())
  if name == "L/14":
    text = {k: v for k, v in part.arrays.items() if ".text." in k}
    assert sum(math.prod(x.shape) for x in text.values()) == 123_650_304


class TestLayouts:
  def test_sharded_weights(self, model, hf_folder, tmp_path):
    folder = tmp_path / "sharded"
    tiny_clips.save(model, folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    _assert_same(clip_hf.read(str(folder)), clip_hf.read(str(hf_folder)))

  def test_torch_weights_and_old_buffers(self, model, hf_folder, copy):
    (copy / "model.safetensors").unlink()
    buffers = {
      f"{tower}_model.embeddings.position_ids": torch.arange(4)[None]
      for tower in ("text", "vision")
    }
    torch.save(model.state_dict() | buffers, copy / "pytorch_model.bin")
    _assert_same(clip_hf.read(str(copy)), clip_hf.read(str(hf_folder)))

  def test_old_configs_name_the_sizes_twice(self, model, hf_folder, copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["text_config_dict"] = config["text_config"]
    config["text_config"] = {"hidden_size": 1}
    del config["vision_config"]["layer_norm_eps"]
    path.write_text(json.dumps(config))
    _assert_same(clip_hf.read(str(copy)), clip_hf.read(str(hf_folder)))

  @pytest.mark.parametrize("file", ["preprocessor", "processor"])
  def test_standardisation(self, copy, file):
    assert clip_hf.read(str(copy)).config.model.image_mean[0] == 0.48145466
    fields = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 1]}
    if file == "processor":
      fields = {"image_processor": fields}
    (copy / f"{file}_config.json").write_text(json.dumps(fields))
    model = clip_hf.read(str(copy)).config.model
    assert model.image_mean == (0.1, 0.2, 0.3)
    assert model.image_std == (0.5, 0.5, 1.0)
    for damaged in ({"image_processor": 3}, {"image_std": [1, "a", 1]}):
      (copy / f"{file}_config.json").write_text(json.dumps(damaged))
      with pytest.raises(UserError, match="must be three numbers"):
        clip_hf.read(str(copy))

  @pytest.mark.parametrize("form", ["json", "map", "gz"])
  def test_other_forms_of_the_tokenizer(self, hf_folder, copy, form):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(copy, pad_token="!")
    merges = (copy / "merges.txt").read_bytes()
    if form != "map":
      (copy / "vocab.json").unlink()
      (copy / "merges.txt").unlink()
    if form == "json":
      tokenizer.save_pretrained(copy)
      assert not (copy / "vocab.json").exists()
    elif form == "map":
      fields = {"pad_token": {"content": "!"}}
      (copy / "special_tokens_map.json").write_text(json.dumps(fields))
    else:
      path = copy / "bpe_simple_vocab_16e6.txt.gz"
      with clip_hf.clip_parts.gzip.open(path, "wb") as f:
        f.write(merges)
    found = clip_hf.read(str(copy)).assets
    expected = clip_hf.read(str(hf_folder)).assets
    for name in ("vocab.json", "merges.txt"):
      assert found[name].splitlines() == expected[name].splitlines()
    pad_token = json.loads(found["tokenizer_config.json"])["pad_token"]
    assert pad_token == ("<|endoftext|>" if form == "gz" else "!")


def _assert_same(found: parts.Part, expected: parts.Part) -> None:
  assert found.config.to_dict() == expected.config.to_dict()
  assert found.assets == expected.assets
  assert found.arrays.keys() == expected.arrays.keys()
  for name, array in found.arrays.items():
    np.testing.assert_array_equal(array.load(), expected.arrays[name].load())


class _Harmful:
  """Leaves a mark when it is unpickled."""

  def __init__(self, mark: pathlib.Path):
    self._mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self._mark),)


class TestRefused:
  def _weights(self, folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path)

  @pytest.mark.parametrize(
    ("change", "words"),
    [
      (
        lambda x: x.pop("text_model.final_layer_norm.bias"),
        "text_model.final_layer_norm.bias is missing",
      ),
      (
        lambda x: x.update({"extra": torch.zeros(1)}),
        "extra is left over",
      ),
      (
        lambda x: x.update({"visual_projection.weight": torch.zeros(12, 21)}),
        r"visual_projection.weight has another shape, \[12, 21\]",
      ),
      (lambda x: x.pop("logit_scale"), "logit_scale is missing"),
      (lambda x: x.clear(), "and 70 more"),
    ],
  )
  def test_tensors_that_do_not_fit(self, copy, change, words):
    self._weights(copy, change)
    with pytest.raises(UserError, match=words) as error:
      clip_hf.read(str(copy))
    assert "\n" not in str(error.value)

  @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
  def test_a_pickle_that_runs_code_is_not_run(self, copy, tmp_path, name):
    (copy / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    (copy / name).write_bytes(pickle.dumps({"a": _Harmful(mark)}, 2))
    with pytest.raises(UserError, match=f"{name} is damaged"):
      clip_hf.read(str(copy))
    torch.save({"a": _Harmful(mark)}, copy / name)
    with pytest.raises(UserError, match=f"{name} is damaged"):
      clip_hf.read(str(copy))
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Harmful(mark)))  # the test would notice
    assert mark.exists()

  @pytest.mark.parametrize("form", ["safetensors", "bin"])
  def test_files_that_are_cut(self, model, copy, form):
    path = copy / "model.safetensors"
    if form == "bin":
      path.unlink()
      path = copy / "pytorch_model.bin"
      torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
      path.write_bytes(whole[:length])
      with pytest.raises(UserError, match="is damaged") as error:
        clip_hf.read(str(copy))
      assert "\n" not in str(error.value)

  @pytest.mark.parametrize(
    ("where", "field", "value", "words"),
    [
      ("", "model_type", "bert", "a model of the type 'bert', not a CLIP"),
      ("text_config", "hidden_act", "gelu_new", "hidden_act 'gelu_new'"),
      ("text_config", "hidden_act", "gelu", "are not of one CLIP"),
      ("text_config", "layer_norm_eps", 1e-6, "layer_norm_eps 1e-06"),
      ("text_config", "hidden_size", "24", "hidden_size '24'"),
      ("vision_config", "image_size", [16, 16], "image_size"),
      ("vision_config", "num_attention_heads", 0, "num_attention_heads 0"),
      ("vision_config", "num_attention_heads", 7, "not a multiple of 7 heads"),
      ("vision_config", "hidden_size", 40, "has another shape"),
      ("vision_config", "num_hidden_layers", 3, r"layers.2.* is missing"),
      ("vision_config", "num_hidden_layers", 1, r"layers.1.* is left over"),
      ("", "text_config", 3, "is damaged"),
    ],
  )
  def test_configs(self, copy, where, field, value, words):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    (config[where] if where else config)[field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as error:
      clip_hf.read(str(copy))
    assert "\n" not in str(error.value)

  @pytest.mark.parametrize("content", [None, "", "[]", "\x00", "{"])
  def test_damaged_json(self, copy, content):
    (copy / "config.json").unlink()
    if content is not None:
      (copy / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
      clip_hf.read(str(copy))

  @pytest.mark.parametrize(
    ("name", "content", "words"),
    [
      ("vocab.json", '{"a": 0}', "no token <"),
      ("vocab.json", '{"a": [0]}', "ids are not"),
      ("vocab.json", '{"a": 1}', "ids are not"),
      ("merges.txt", "a b c", "'a b c' is none of its tokens"),
      ("merges.txt", "nor this", "'nor this' is none of its tokens"),
      ("merges.txt", "\xff", "damaged"),
      ("tokenizer_config.json", '{"pad_token": "?!?"}', r"no token \?!\?"),
    ],
  )
  def test_tokenizers(self, copy, name, content, words):
    (copy / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=words):
      clip_hf.read(str(copy))

  def test_no_tokenizer_or_that_of_another_model(self, copy):
    bpe_files.write(copy, num_merges=100)
    with pytest.raises(UserError, match="knows 574"):
      clip_hf.read(str(copy))
    (copy / "merges.txt").unlink()
    with pytest.raises(UserError, match="there is no tokenizer in"):
      clip_hf.read(str(copy))

  def test_what_is_no_clip_is_not_written(self, tmp_path):
    config = parts.make_config(
      "prior",
      task_name="unclip_jax.tasks.prior_diffusion",
      model_name="unclip_jax.models.prior",
      model={},
    )
    model_folder.save_model(
      tmp_path / "prior", config, {"params": {"x": np.zeros(1)}}, {}, {}
    )
    with pytest.raises(UserError, match=re.escape("unclip_jax.models.prior")):
      clip_hf.convert_out(str(tmp_path / "prior"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
