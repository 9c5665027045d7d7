"""`unclip evaluate`: a whole model, and the stages of a run."""

import json

import jax
import numpy as np
import pytest

from tests import random_pipelines, random_variables, tiny_features
from unclip_jax import evaluation, inference, model_folder, run_folder, trainer
from unclip_jax.metrics import frechet
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

PROGRAM = ("-m", "unclip_jax.evaluate")


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
  return tiny_features.write(str(tmp_path_factory.mktemp("network")), 1.0)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> str:
  """The folder of an upsampler with random weights."""
  run = trainer.setup(config_lib.load("configs/emoji/upsampler.py:smoke"))
  batch = next(iter(run.data.eval_batches("validation", 2)))
  variables = random_variables.like(run.task.init, batch, {})
  folder = str(tmp_path_factory.mktemp("stage"))
  model_folder.save_model(folder, run.config, variables, {}, run.data.assets())
  return folder


def test_features_of_what_a_stage_draws_are_compared(stage, network):
  config = run_folder.load_config(stage)
  with config.unlocked():
    config.evals = dict(
      fid=dict(
        type="unclip_jax.evaluators.fid",
        pred="sample",
        features=network,
        batch_size=6,
      )
    )
  found = evaluation.evaluate(stage, config)["fid"]
  model = inference.load(stage)
  run = trainer.setup(config)
  drawn, true = [], []
  for batch in run.data.eval_batches("validation", 6):
    sample = jax.jit(model.task.predict_fns()["sample"])
    rng = jax.random.key(config.seed)
    image = sample(model.variables, {}, batch, rng)["image"]
    drawn.append(image.mean(axis=(1, 2))[batch["mask"]])
    true.append(batch["image"].mean(axis=(1, 2))[batch["mask"]])
  drawn, true = np.concatenate(drawn), np.concatenate(true)
  expected = frechet.distance(
    frechet.Moments.of(true), frechet.Moments.of(drawn)
  )
  assert found["fid"] == pytest.approx(expected, rel=1e-4)
  assert found["count"] == len(drawn) > 5


def test_the_program_on_a_stage(stage, network, tmp_path, run_python):
  config = "configs/evals.py:of=upsampler,examples=6,batch_size=6"
  out = tmp_path / "to" / "report.json"
  run_python(
    *PROGRAM,
    f"--run={stage}",
    f"--out={out}",
    f"--config={config},inception={network}",
    "--config.evals.vlb.max_examples=4",
    "--config.task.sample_options.num_sample_steps=2",
  )
  report = json.loads(out.read_text())
  counts = {name: values["count"] for name, values in report.items()}
  assert counts == {"vlb": 4.0, "psnr_ssim": 6.0, "fid": 6.0}


@pytest.mark.slow
def test_the_program_on_a_model(network, tmp_path, run_python):
  model, out = tmp_path / "model", tmp_path / "report.json"
  (tmp_path / "assets").mkdir()
  pipe = random_pipelines.make(tmp_path / "assets")
  pipe.save_pretrained(str(model))
  run_python(
    *PROGRAM,
    f"--model={model}",
    f"--out={out}",
    "--num_embeds=8",
    "--num_images=8",
    f"--inception={network}",
    f"--clip={model / 'clip'}",
  )
  report = json.loads(out.read_text())
  assert set(report) == {
    *("split", "retrieval", "prior", "nearest_match", "fid", "clip_score"),
  }
  assert report["fid"]["count"] == report["clip_score"]["count"] == 8.0
  assert 0.0 <= report["clip_score"]["clip_score"] <= 100.0
  assert np.isfinite(report["clip_score"]["cmmd"])
  assert (tmp_path / "report.nearest_match.grid.png").exists()


def test_a_converted_model_knows_no_data(network):
  with pytest.raises(errors.UserError, match="was converted"):
    evaluation.evaluate(network, run_folder.load_config(network))


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ("--model=a --run=b", "give --model or --run"),
    ("--model=a --config=configs/evals.py", "--config goes with --run"),
  ],
)
def test_the_program_says_what_is_wrong(flags, words, tmp_path, run_python):
  process = run_python(
    *PROGRAM, f"--out={tmp_path / 'x'}", *flags.split(), check=False
  )
  assert process.returncode == 2 and words in process.stderr


def test_the_config_names_evaluators_that_there_are():
  for of, names in (
    ("prior", {"vlb", "report"}),
    ("decoder", {"vlb", "fid", "clip_score"}),
    ("upsampler", {"vlb", "psnr_ssim", "fid"}),
  ):
    config = config_lib.load(
      f"configs/evals.py:of={of},inception=a,clip=b,reference=c"
    )
    assert set(config.evals) == names
    for spec in config.evals.values():
      module = config_lib.import_module(spec.type)
      known = {"type", "pred", "split", "batch_size", "features"}
      module.Evaluator(**{k: v for k, v in spec.items() if k not in known})
  with pytest.raises(errors.UserError, match="of=all is not"):
    config_lib.load("configs/evals.py:of=all")
