"""`unclip convert` with public CLIPs, and what a converted CLIP is good for."""

import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests import random_variables  # noqa: E402
from tests.interop import tiny_clips  # noqa: E402
from unclip_jax import model_folder, run_folder, trainer  # noqa: E402
from unclip_jax.data import preprocess, tokenizers  # noqa: E402
from unclip_jax.interop import clip_hf  # noqa: E402
from unclip_jax.utils import config as config_lib  # noqa: E402


@pytest.fixture(scope="module")
def model():
  return tiny_clips.make()


@pytest.fixture(scope="module")
def clip(model, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("clip")
  clip_hf.convert_in(
    tiny_clips.save(model, folder / "hf"), str(folder / "clip")
  )
  return folder / "clip"


def test_the_program_there_and_back(model, tmp_path, run_python):
  src, clip, back = (str(tmp_path / name) for name in ("hf", "clip", "back"))
  tiny_clips.save(model, tmp_path / "hf")
  program = ("-m", "unclip_jax.convert")
  run_python(*program, "--from=clip-hf", f"--src={src}", f"--out={clip}")
  tiny_clips.assert_close(model, clip, 1e-5)
  run_python(*program, "--to=hf", f"--src={clip}", f"--out={back}")
  again = transformers.CLIPModel.from_pretrained(back)
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_clip_of_ours_is_the_same_in_transformers(tmp_path):
  """With its own tokenizer, and pictures that enter in [-1, 1]."""
  run = trainer.setup(config_lib.load("configs/emoji/clip.py:smoke"))
  batch = next(iter(run.data.eval_batches("train", 4)))
  variables = random_variables.like(run.task.init, batch, {})
  ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
  model_folder.save_model(ours, run.config, variables, {}, run.data.assets())
  clip_hf.convert_out(ours, theirs)
  clip = transformers.CLIPModel.from_pretrained(theirs)
  processor = transformers.CLIPImageProcessorPil.from_pretrained(theirs)
  pictures = [preprocess.to_pil(x / 2 + 0.5) for x in batch["image"]]
  pixels = np.stack(processor(pictures)["pixel_values"])
  with torch.no_grad():
    text = clip.get_text_features(
      torch.tensor(batch["text_tokens"]).long(),
      torch.tensor(batch["text_mask"]).long(),
    )
    image = clip.get_image_features(torch.tensor(pixels))
  output, _ = run.task.model.apply(
    variables, batch["image"], batch["text_tokens"], batch["text_mask"]
  )
  for name, found in (("text_embed", text), ("image_embed", image)):
    expected = np.asarray(output[name])
    error = np.linalg.norm(found.pooler_output.numpy() - expected)
    assert error < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ("--from=clip-hf --to=hf", "not both"),
    ("--from=clip-hf --image_encoder=x", "goes with --from karlo"),
    ("--to=hf --fit_variance=prior", "goes with --from runs"),
    ("--to=hf --out=nowhere", "one folder"),
    ("--to=hf --vocab_size=9", "goes with --from word-vectors"),
  ],
)
def test_flags_that_contradict(flags, words, run_python):
  run = run_python(
    *("-m", "unclip_jax.convert", "--src=nowhere", "--out=out"),
    *flags.split(),
    check=False,
  )
  assert run.returncode == 2
  assert words in run.stderr and "Traceback" not in run.stderr


def test_a_prior_is_trained_over_a_converted_clip(clip, tmp_path):
  config = config_lib.load("configs/emoji/prior.py:smoke")
  with config.unlocked():
    config.frozen.clip = dict(path=str(clip))
    config.data.preprocess.clip_image_size = 16
    config.data.preprocess.context_length = 10  # less than the CLIP could take
    config.model.embed_dim, config.model.text_width = 12, 24
    config.model.context_length = 10
    config.evals = {}
  assert "0.1 MiB frozen upstream" in trainer.describe(config)
  trainer.train(config, str(tmp_path))
  assert tokenizers.load(str(tmp_path / "assets")).vocab_size == 574
  spec = run_folder.load_config(tmp_path).frozen.clip
  assert spec.fingerprint == model_folder.load_model(clip).fingerprint
