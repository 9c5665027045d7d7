"""The released CLIP: TorchScript archives and plain dictionaries of tensors."""

import gzip
import pathlib
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests import bpe_files  # noqa: E402
from tests.interop import tiny_clips, torch_modules  # noqa: E402
from unclip_jax.interop import clip_openai  # noqa: E402
from unclip_jax.utils.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def model():
  """Heads of 64 channels, and three of them in the text tower."""
  return tiny_clips.make(
    text=dict(hidden_size=192, intermediate_size=768, num_attention_heads=3),
    vision=dict(hidden_size=64, intermediate_size=256, num_attention_heads=1),
  )


@pytest.fixture(scope="module")
def tensors(model):
  buffers = {"input_resolution": 16, "context_length": 16, "vocab_size": 574}
  return tiny_clips.openai_tensors(model) | {
    name: torch.tensor(value) for name, value in buffers.items()
  }


def _write_merges(folder: pathlib.Path) -> None:
  bpe_files.write(folder)
  merges = (folder / "merges.txt").read_bytes()
  with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "wb") as f:
    f.write(merges)
  for name in ("vocab.json", "merges.txt"):
    (folder / name).unlink()


@pytest.mark.parametrize("form", ["script", "plain"])
def test_outputs_are_those_of_the_model(form, model, tensors, tmp_path):
  src, out = tmp_path / "ViT.pt", str(tmp_path / "clip")
  if form == "script":
    torch_modules.save_script(tensors, str(src))
  else:
    torch.save(tensors, src)
  _write_merges(tmp_path)
  clip_openai.convert_in(str(src), out)
  tiny_clips.assert_close(model, out, 1e-5)
  tiny_clips.assert_close(model, out, 2e-2, "bfloat16")
  tokenizer = clip_openai.clip_parts.json.loads(
    pathlib.Path(out, "tokenizer_config.json").read_text()
  )
  assert tokenizer["pad_token"] == "!"


def test_half_precision_of_the_release(model, tensors, tmp_path):
  """Matrices are float16 there, and the rest is float32."""
  halved = {
    name: x.half() if x.ndim > 1 and "embedding" not in name else x
    for name, x in tensors.items()
  }
  torch_modules.save_script(halved, str(tmp_path / "ViT.pt"))
  bpe_files.write(tmp_path)
  part = clip_openai.read(str(tmp_path / "ViT.pt"))
  dtypes = {str(array.dtype) for array in part.arrays.values()}
  assert dtypes == {"float16", "float32"}
  clip_openai.parts.write(str(tmp_path / "clip"), part)
  tiny_clips.assert_close(model, str(tmp_path / "clip"), 1e-2)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"ln_final.bias": None}, "ln_final.bias is missing"),
    ({"visual.proj": None}, "visual.proj is missing"),
    ({"extra": torch.zeros(1)}, "extra is left over"),
    ({"visual.conv1.weight": None}, "lacks the tensor visual.conv1.weight"),
    ({"text_projection": torch.zeros(3)}, "text_projection, or has it"),
    ({"visual.proj": torch.zeros(64, 13)}, "visual.proj has another shape"),
    ({"visual.positional_embedding": torch.zeros(16, 64)}, "another shape"),
    (
      {"visual.attnpool.positional_embedding": torch.zeros(2, 2)},
      "is a ResNet",
    ),
  ],
)
def test_tensors_that_do_not_fit(tensors, tmp_path, change, words):
  changed = {k: v for k, v in (tensors | change).items() if v is not None}
  torch.save(changed, tmp_path / "ViT.pt")
  bpe_files.write(tmp_path)
  with pytest.raises(UserError, match=words) as error:
    clip_openai.read(str(tmp_path / "ViT.pt"))
  assert "\n" not in str(error.value)


def test_missing_files(tensors, tmp_path):
  path = str(tmp_path / "ViT.pt")
  with pytest.raises(UserError, match="there is no file"):
    clip_openai.read(path)
  torch.save(tensors, path)
  with pytest.raises(UserError, match=r"bpe_simple_vocab_16e6\.txt\.gz"):
    clip_openai.read(path)
  _write_merges(tmp_path)
  merges = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
  merges.write_bytes(merges.read_bytes()[:-20])
  with pytest.raises(UserError, match="is damaged"):
    clip_openai.read(path)


def test_what_is_no_model(tmp_path):
  path = tmp_path / "ViT.pt"
  for content in (
    b"",
    b"text",
    pickle.dumps([1, 2], 2),
    pickle.dumps(print, 2),
  ):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"ViT\.pt"):
      clip_openai.read(str(path))
