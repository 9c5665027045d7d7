r"""Karlo at full size with random weights: conversion, speed and memory.

  pip install torch==2.13.0 diffusers transformers   # for the CPU
  python launch/bench_karlo.py --dir /tmp/karlo [--stage decoder]

Writes the weights once (14 GB), converts them, and draws with diffusers and
with this project in turn, a stage after the other, for both models do not fit
into memory at once. Prints a table of seconds and of peak memory; memory is
that of a process of its own, which loads the stage and draws once.

On CPU set XLA_FLAGS as the README says.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from unclip_jax import tensor_files

DIR = flags.DEFINE_string("dir", None, "Folder for the weights.", required=True)
STAGE = flags.DEFINE_multi_enum(
  "stage", [], ["prior", "decoder", "upsampler_256"], "Default: all."
)
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is timed.", 1)
MEMORY = flags.DEFINE_bool("memory", True, "Whether to measure memory too.")
ALONE = flags.DEFINE_enum(
  "alone", None, ["ours", "theirs"], "Load and draw once, print peak memory."
)

# Stage -> denoising steps that are timed.
STEPS = {"prior": 25, "decoder": 2, "upsampler_256": 2}
PROMPT = "a frog"

Draw = Callable[[], Any]


def make_weights(folder: pathlib.Path) -> None:
  """Karlo's networks as diffusers saves them, with random weights."""
  import diffusers
  import torch
  import transformers
  from diffusers.pipelines.deprecated.unclip.text_proj import (
    UnCLIPTextProjModel,
  )

  channels = (320, 640, 960, 1280)
  super_resolution = dict(
    sample_size=256,
    in_channels=6,
    out_channels=3,
    block_out_channels=channels,
    layers_per_block=3,
    down_block_types=("ResnetDownsampleBlock2D",) * 4,
    up_block_types=("ResnetUpsampleBlock2D",) * 4,
    add_attention=False,
  )
  with torch.device("meta"):
    modules = {
      "prior": diffusers.PriorTransformer(),
      "text_proj": UnCLIPTextProjModel(
        time_embed_dim=1280, cross_attention_dim=1536
      ),
      "decoder": diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        block_out_channels=channels,
        layers_per_block=3,
        down_block_types=(
          "ResnetDownsampleBlock2D",
          *("SimpleCrossAttnDownBlock2D",) * 3,
        ),
        up_block_types=(
          *("SimpleCrossAttnUpBlock2D",) * 3,
          "ResnetUpsampleBlock2D",
        ),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=64,
        cross_attention_dim=1536,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
      ),
      "super_res_first": diffusers.UNet2DModel(**super_resolution),
      "super_res_last": diffusers.UNet2DModel(**super_resolution),
      "text_encoder": transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
          hidden_size=768,
          intermediate_size=3072,
          projection_dim=768,
          num_hidden_layers=12,
          num_attention_heads=12,
          bos_token_id=49406,
          eos_token_id=49407,
        )
      ),
    }
  rng = np.random.default_rng(0)

  def draw(shape: tuple[int, ...]) -> np.ndarray:
    return 0.02 * rng.standard_normal(shape, np.float32)

  for name, module in modules.items():
    (folder / name).mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model"
    if name == "text_encoder":
      stem = "model"
      module.config.save_pretrained(folder / name)
    else:
      module.save_config(folder / name)
    tensor_files.write_safetensors(
      folder / name / f"{stem}.safetensors",
      {
        key: tensor_files.LazyArray(
          tuple(x.shape),
          np.dtype(np.float32),
          lambda shape=tuple(x.shape): draw(shape),
        )
        for key, x in module.state_dict().items()
        if x.is_floating_point()
      },
      {"format": "pt"},
    )
  for name, fields in {
    "prior": dict(prediction_type="sample", clip_sample_range=5.0),
    "decoder": dict(variance_type="learned_range"),
    "super_res": dict(),
  }.items():
    scheduler = diffusers.UnCLIPScheduler(**fields)
    scheduler.save_pretrained(folder / f"{name}_scheduler")
  _write_tokenizer(folder / "tokenizer")


def _write_tokenizer(folder: pathlib.Path) -> None:
  """A vocabulary of CLIP's size, of which only single letters are used."""
  import tokenizers

  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokens = [*letters, *(f"{x}</w>" for x in letters)]
  tokens += [f"unused{i}</w>" for i in range(49_408 - len(tokens) - 2)]
  tokens += ["<|startoftext|>", "<|endoftext|>"]
  folder.mkdir(exist_ok=True)
  vocab = {token: i for i, token in enumerate(tokens)}
  (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
  (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def ours(model: pathlib.Path, stage: str, steps: int) -> Draw:
  """Draws one picture's stage with this project."""
  import jax.numpy as jnp

  from unclip_jax import inference, pipelines

  names = ["clip", "decoder", *({stage} - {"decoder"})]
  # What a pipeline must have and this stage does not read stays in its file.
  read = {stage} if stage.startswith("upsampler") else {"clip", stage}
  parts: dict[str, Any] = {}
  for name in names:
    parts[name] = inference.load(
      str(model / name), upstream_models=parts, lazy=name not in read
    )
  pipe = pipelines.UnCLIPPipeline(parts)
  batch = dict(pipe.tokenize([PROMPT]))
  batch["image_embed"] = np.zeros((1, 768), np.float32)
  batch["low_res"] = np.zeros((1, 64, 64, 3), np.float32)
  shapes = {"prior": (768,), "decoder": (64, 64, 3)}
  shape = shapes.get(stage, (256, 256, 3))
  noise = np.random.default_rng(0).standard_normal(
    (steps + 1, 1, *shape), np.float32
  )
  options = pipe.options(stage, {"num_sample_steps": steps})

  def draw() -> Any:
    weights = pipe.weights(stage)
    return pipe._run(
      stage, weights, batch, None, options, {"noise": jnp.asarray(noise)}, None
    )

  def draw_and_wait() -> None:
    for x in draw().values():
      x.block_until_ready()

  return draw_and_wait


def theirs(folder: pathlib.Path, stage: str, steps: int) -> Draw:
  """Draws one picture's stage with diffusers, as its pipeline does."""
  import torch
  import transformers
  from diffusers import (
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
  )
  from diffusers.pipelines.deprecated.unclip.text_proj import (
    UnCLIPTextProjModel,
  )

  torch.set_num_threads(os.cpu_count())
  torch.set_grad_enabled(False)
  name = "super_res" if stage == "upsampler_256" else stage
  scheduler = UnCLIPScheduler.from_pretrained(folder / f"{name}_scheduler")
  if name == "super_res":
    first, last = (
      UNet2DModel.from_pretrained(folder / f"super_res_{x}").eval()
      for x in ("first", "last")
    )
  else:
    kind = PriorTransformer if stage == "prior" else UNet2DConditionModel
    network = kind.from_pretrained(folder / stage).eval()
    encoder = transformers.CLIPTextModelWithProjection.from_pretrained(
      folder / "text_encoder"
    ).eval()
    projections = UnCLIPTextProjModel.from_pretrained(folder / "text_proj")
  tokens = torch.zeros((1, 77), dtype=torch.long)
  tokens[:, 0], tokens[:, 1:] = 49406, 49407
  mask = torch.arange(77)[None] < 5

  def encode() -> tuple[Any, Any]:
    rows = [encoder(tokens), encoder(tokens)]
    return (
      torch.cat([x.text_embeds for x in rows]),
      torch.cat([x.last_hidden_state for x in rows]),
    )

  def loop(x: Any, predict: Callable[..., Any]) -> None:
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    for i, t in enumerate(timesteps):
      following = timesteps[i + 1] if i + 1 < steps else None
      x = scheduler.step(
        predict(x, t, i), t, x, prev_timestep=following
      ).prev_sample

  def guided(output: Any, scale: float) -> Any:
    uncond, cond = output.chunk(2)
    if output.shape[1] != 6:
      return uncond + scale * (cond - uncond)
    guided = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
    return torch.cat([guided, cond[:, 3:]], dim=1)

  def draw_prior() -> None:
    embed, states = encode()
    masks = torch.cat([mask, mask])

    def predict(x: Any, t: Any, i: int) -> Any:
      output = network(torch.cat([x, x]), t, embed, states, masks)
      return guided(output.predicted_image_embedding, 4.0)

    loop(torch.randn(1, 768), predict)

  def draw_decoder() -> None:
    embed, states = encode()
    context, emb = projections(
      image_embeddings=torch.zeros(1, 768),
      prompt_embeds=embed,
      text_encoder_hidden_states=states,
      do_classifier_free_guidance=True,
    )
    masks = torch.nn.functional.pad(torch.cat([mask, mask]), (4, 0), value=True)

    def predict(x: Any, t: Any, i: int) -> Any:
      output = network(
        torch.cat([x, x]),
        t,
        encoder_hidden_states=context,
        class_labels=emb,
        attention_mask=masks,
      ).sample
      return guided(output, 8.0)

    loop(torch.randn(1, 3, 64, 64), predict)

  def draw_upsampler() -> None:
    enlarged = torch.nn.functional.interpolate(
      torch.zeros(1, 3, 64, 64),
      size=[256, 256],
      mode="bicubic",
      align_corners=False,
      antialias=True,
    )

    def predict(x: Any, t: Any, i: int) -> Any:
      network = last if i == steps - 1 else first
      return network(torch.cat([x, enlarged], dim=1), t).sample

    loop(torch.randn(1, 3, 256, 256), predict)

  return {
    "prior": draw_prior,
    "decoder": draw_decoder,
    "upsampler_256": draw_upsampler,
  }[stage]


def _peak_gib(command: list[str]) -> float:
  """Peak memory of a process, as it says itself in its last line."""
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  return float(result.stdout.splitlines()[-1])


def _print_peak() -> None:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"{peak:.2f}")


def convert(folder: pathlib.Path, model: pathlib.Path) -> None:
  command = [sys.executable, "-c", _CONVERT, str(folder), str(model)]
  start = time.monotonic()
  peak = _peak_gib(command)
  seconds = time.monotonic() - start
  files = list(folder.rglob("*.safetensors"))
  size = sum(path.stat().st_size for path in files) / 2**30
  counts = {
    path.parent.name: len(tensor_files.read_safetensors(path)[0])
    for path in sorted(files)
  }
  print(f"converted {counts} tensors, {size:.2f} GiB")
  print(f"in {seconds:.1f} s; peak memory {peak:.2f} GiB", flush=True)


_CONVERT = """
import resource, sys
from unclip_jax import stages
from unclip_jax.interop import karlo
stages.write_index(sys.argv[2], karlo.convert_in(*sys.argv[1:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def main(argv: list[str]) -> None:
  del argv
  root = pathlib.Path(DIR.value)
  folder, model = root / "diffusers", root / "model"
  stages = STAGE.value or list(STEPS)
  if ALONE.value:
    (stage,) = stages
    make = ours if ALONE.value == "ours" else theirs
    where = model if ALONE.value == "ours" else folder
    make(where, stage, STEPS[stage])()
    _print_peak()
    return
  if not (folder / "tokenizer" / "vocab.json").exists():
    make_weights(folder)
  if not (model / "model_index.json").exists():
    convert(folder, model)
  for stage in stages:
    if MEMORY.value:
      base = [sys.executable, __file__, f"--dir={root}", f"--stage={stage}"]
      peaks = {
        who: _peak_gib([*base, f"--alone={who}"]) for who in ("theirs", "ours")
      }
      ratio = peaks["ours"] / peaks["theirs"]
      print(
        f"{stage}: peak memory {peaks['ours']:.2f} GiB, diffusers "
        f"{peaks['theirs']:.2f} GiB, ratio {ratio:.2f}",
        flush=True,
      )
    steps = STEPS[stage]
    draws = {
      "theirs": theirs(folder, stage, steps),
      "ours": ours(model, stage, steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for name, draw in draws.items():
      start = time.monotonic()
      draw()
      first = time.monotonic() - start
      print(f"{stage}: {name}, first call {first:.2f} s", flush=True)
    for _ in range(ROUNDS.value):
      for name, draw in draws.items():
        start = time.monotonic()
        draw()
        seconds[name].append(time.monotonic() - start)
    middle = {name: statistics.median(x) for name, x in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"])]
    print(
      f"{stage}: {steps} steps, ours {middle['ours']:.2f} s "
      f"({middle['ours'] / steps:.3f} a step), diffusers "
      f"{middle['theirs']:.2f} s ({middle['theirs'] / steps:.3f}), ratio "
      f"{statistics.median(ratios):.3f}",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
