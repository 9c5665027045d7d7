"""The main job at smoke size: four stages, a model folder, pictures, errors."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from unclip_jax import inference, model_folder, pipelines
from unclip_jax.utils import errors


@pytest.fixture(scope="module")
def out(tmp_path_factory, run_python):
  folder = tmp_path_factory.mktemp("quickstart")
  process = run_python(
    "launch/quickstart.py", "--size=smoke", f"--out={folder}", timeout=900
  )
  assert f"--model {folder / 'model'}" in process.stdout
  return folder


@pytest.fixture(scope="module")
def pipe(out):
  return pipelines.UnCLIPPipeline.from_pretrained(str(out / "model"))


def unclip(run_python, *args):
  return run_python("-m", "unclip_jax", *args, check=False)


def assert_user_error(process, *words):
  """One line that says what is wrong, exit code 2, no traceback."""
  assert process.returncode == 2, process.stderr
  lines = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1 and "Traceback" not in process.stderr
  for word in words:
    assert word in lines[0]


def test_report(out):
  report = json.loads((out / "report.json").read_text())
  match = report["nearest_match"]
  assert 0 <= match["top1"] <= match["top5"] <= 1
  assert match["chance_top1"] == pytest.approx(1 / match["count"])
  assert -1 <= report["prior"]["cosine"] <= 1
  assert report["retrieval"]["count"] == report["prior"]["count"]
  assert len(report["training_code_points"]) == report["retrieval"]["count"]
  assert set(report["stages"]) == {"clip", "prior", "decoder", "upsampler_64"}
  for stage in report["stages"].values():
    assert stage["steps"] == 2
    assert stage["seconds_per_step"] > 0 and stage["peak_memory_gib"] > 0.1


def test_samples_picture_shows_something(out):
  pixels = np.asarray(PIL.Image.open(out / "samples.png"))
  assert pixels.shape[0] > 500 and pixels.shape[1] > 500
  assert pixels.std() > 10


def test_second_call_trains_nothing_again(out, run_python):
  before = {p: p.read_bytes() for p in out.glob("*/metrics.jsonl")}
  report = (out / "report.json").read_bytes()
  run_python("launch/quickstart.py", "--size=smoke", f"--out={out}")
  assert len(before) == 4
  assert all(path.read_bytes() == text for path, text in before.items())
  assert (out / "report.json").read_bytes() == report


def test_sample_writes_pictures_and_a_line_for_each(out, tmp_path, run_python):
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a red circle\n\nün gröner Frosch\n", encoding="utf-8")
  unclip(
    run_python,
    "sample",
    f"--model={out / 'model'}",
    f"--prompts={prompts}",
    f"--out={tmp_path / 'drawn'}",
    "--seed=3",
    "--guidance_scale=1.5",
  )
  rows = [json.loads(x) for x in (tmp_path / "drawn/samples.jsonl").open()]
  assert [row["prompt"] for row in rows] == [
    "a red circle",
    "",
    "ün gröner Frosch",
  ]
  for i, row in enumerate(rows):
    image = PIL.Image.open(tmp_path / "drawn" / f"{i:05d}.png")
    assert image.size == (64, 64) and row["file"] == f"{i:05d}.png"
    assert row["seed"] == 3
    assert row["options"]["decoder"]["guidance_scale"] == 1.5
    assert row["options"]["decoder"]["num_sample_steps"] == 2
    assert set(row["seconds"]) == {"prior", "decoder", "upsampler_64"}


def test_bad_input_is_one_line_and_exit_code_2(out, tmp_path, run_python):
  model = f"--model={out / 'model'}"
  to = f"--out={tmp_path / 'x'}"
  latin = tmp_path / "latin.txt"
  latin.write_bytes("grün".encode("latin-1"))
  assert_user_error(
    unclip(run_python, "sample", model, to, f"--prompts={latin}"), "UTF-8"
  )
  assert_user_error(
    unclip(run_python, "sample", "--model=/no/such", to, "--prompt=a"),
    "/no/such",
  )
  assert_user_error(
    unclip(
      run_python,
      "train",
      "--config=configs/emoji/clip.py:smoke",
      f"--workdir={tmp_path / 'run'}",
      "--config.optim.lerning_rate=1",
    ),
    "learning_rate",
  )
  assert not (tmp_path / "x").exists()


def test_a_protocol_on_the_model(out, tmp_path, run_python):
  report = tmp_path / "sweep.json"
  arguments = (
    *("evaluate", "--model", str(out / "model"), "--out", str(report)),
    *("--protocol", "guidance_sweep", "--protocol.guidance_scales=(1.0,)"),
  )
  process = unclip(run_python, *arguments, "--protocol.num_images=6")
  assert process.returncode == 0, process.stderr
  written = json.loads(report.read_text())
  assert written["options"]["num_images"] == written["rows"][0]["count"] == 6
  assert "| guidance_scale |" in process.stdout
  assert_user_error(
    unclip(run_python, *arguments, "--protocol.images=6"), "num_images"
  )


def test_same_seed_same_pictures_whatever_the_batch(pipe):
  prompts = ["a red circle", "a blue square", "a ring"]
  all_at_once = pipe(prompts, seed=5, output_type="np").images
  one_by_one = pipe(prompts, seed=5, output_type="np", batch_size=1).images
  padded = pipe(prompts, seed=5, output_type="np", batch_size=2).images
  np.testing.assert_allclose(one_by_one, all_at_once, atol=1e-3)
  np.testing.assert_allclose(padded, all_at_once, atol=1e-3)
  other = pipe(prompts, seed=6, output_type="np").images
  # Two steps of training draw little; still ten times the tolerance above.
  assert np.abs(other - all_at_once).max() > 0.01


def test_each_stage_compiles_once(pipe):
  pipe(["one"], batch_size=1)
  counts = {key: fn._cache_size() for key, fn in pipe._jitted.items()}
  pipe(["two"], batch_size=1, seed=9)
  assert {key: fn._cache_size() for key, fn in pipe._jitted.items()} == counts


def test_injected_noise_is_used(pipe):
  D = pipe.parts["clip"].config.model.embed_dim
  rng = np.random.default_rng(0)
  shapes = {
    "prior": (3, 4, D),  # two steps and x_T; two candidates of two prompts
    "decoder": (3, 2, 16, 16, 3),
    "upsampler_64": (3, 2, 64, 64, 3),
  }
  noise = {k: rng.normal(size=v).astype("f4") for k, v in shapes.items()}
  options = dict(noise=noise, output_type="np")
  a = pipe(["x", "y"], seed=0, **options).images
  b = pipe(["x", "y"], seed=1, **options).images
  np.testing.assert_array_equal(a, b)
  split = pipe(["x", "y"], batch_size=1, **options).images
  np.testing.assert_allclose(split, a, atol=1e-3)
  del noise["decoder"]
  with pytest.raises(errors.UserError, match="decoder"):
    pipe(["x", "y"], **options)


def test_callback_counts_every_step(pipe):
  calls = []
  pipe(["x"], callback=lambda *args: calls.append(args))
  assert calls == [
    (stage, step, 2)
    for stage in ("prior", "decoder", "upsampler_64")
    for step in (1, 2)
  ]


def test_saved_and_loaded_is_the_same_model(pipe, out, tmp_path):
  pipe.save_pretrained(str(tmp_path))
  again = pipelines.UnCLIPPipeline.from_pretrained(str(tmp_path))
  a = pipe(["a red circle"], output_type="np").images
  b = again(["a red circle"], output_type="np").images
  np.testing.assert_array_equal(a, b)
  fingerprints = [p.parts["prior"].fingerprint for p in (pipe, again)]
  run = inference.load(str(out / "prior"))
  assert {*fingerprints} == {run.fingerprint}
  for path in tmp_path.rglob("*"):
    assert path.is_dir() or path.suffix in (
      ".json",
      ".safetensors",
      ".model",
    )


def test_a_decoder_of_another_clip_is_refused(out, tmp_path):
  model = tmp_path / "model"
  shutil.copytree(out / "model", model)
  clip = model_folder.load_model(model / "clip")
  params = clip.variables["params"]
  params["logit_scale"] = params["logit_scale"] + 1
  model_folder.save_model(model / "clip", clip.config, clip.variables, {}, {})
  with pytest.raises(errors.UserError, match=clip.fingerprint):
    pipelines.UnCLIPPipeline.from_pretrained(str(model))


def test_no_prompt_and_missing_parts_are_user_errors(pipe, tmp_path):
  with pytest.raises(errors.UserError, match="no prompt"):
    pipe([])
  with pytest.raises(errors.UserError, match=r"model_index\.json"):
    pipelines.UnCLIPPipeline.from_pretrained(str(tmp_path))
