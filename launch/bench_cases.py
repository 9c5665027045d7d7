"""The cases of bench.py: what each builds and times, on our side.

The peers' side is bench_peers.py; both are given the same sizes and inputs.
jax and torch are imported inside functions, when the threads are settled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
  """What the flags of bench.py say."""

  size: str  # "small", "large" or "tiny"
  dtype: str
  threads: int
  peers: bool
  compile: bool


@dataclasses.dataclass(frozen=True)
class Contender:
  """One who is timed."""

  # One unit of work, done when it returns; its seconds, if not all count.
  run: Callable[[], float | None]
  examples: int  # in a run
  num_params: int | None = None


@dataclasses.dataclass(frozen=True)
class ClipSize:
  batch: int = 32
  image_size: int = 224
  patch_size: int = 32
  vision_width: int = 768
  text_width: int = 512
  depth: int = 12
  vocab_size: int = 49_408
  context_length: int = 77
  embed_dim: int = 512


@dataclasses.dataclass(frozen=True)
class PriorSize:
  batch: int = 16
  width: int = 512  # also of embeddings and text states; heads of 64
  depth: int = 6
  context_length: int = 77


@dataclasses.dataclass(frozen=True)
class UnetSize:
  batch: int = 4
  image_size: int = 64
  channels: int = 64
  channel_mult: tuple[int, ...] = (1, 2, 3)
  num_res_blocks: int = 2
  attention_resolutions: tuple[int, ...] = (32, 16)  # all but the first
  embed_dim: int = 512  # of the image embedding and of text states
  context_length: int = 77
  # Of dalle2-pytorch's network with as many parameters.
  dalle_channels: int = 64
  dalle_channel_mult: tuple[int, ...] = (1, 2, 4)


CLIP_SIZES = {
  "small": ClipSize(),
  "large": ClipSize(),
  "tiny": ClipSize(4, 32, 16, 64, 64, 1, 49_408, 16, 32),
}
PRIOR_SIZES = {
  "small": PriorSize(),
  "large": PriorSize(batch=8, width=1024, depth=20),
  "tiny": PriorSize(2, 64, 1, 8),
}
DECODER_SIZES = {
  "small": UnetSize(),
  "large": UnetSize(
    channels=128,
    channel_mult=(1, 2, 3, 4),
    attention_resolutions=(32, 16, 8),
    dalle_channels=160,
  ),
  "tiny": UnetSize(2, 16, 64, (1, 2), 1, (8,), 32, 8, 16, (1, 2)),
}
UPSAMPLER_SIZES = {
  name: dataclasses.replace(size, attention_resolutions=())
  for name, size in DECODER_SIZES.items()
}


class GivenEmbeddings:
  """Stands where a task has its CLIP: all that it would encode is given.

  Its variables are the batch's `text_embed` and `text_encodings`; pictures are
  their embeddings.
  """

  def encode_image(self, variables: Any, image: Any) -> Any:
    return image

  def encode_text(self, variables: Any, tokens: Any, mask: Any) -> Any:
    return variables["text_embed"], variables["text_encodings"]


def _drop(result: Any) -> None:
  """For runs whose result is of no use."""
  del result


def normal(*shape: int) -> np.ndarray:
  """Draws, the same each time: no contender sees other numbers."""
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def caption_arrays(size: Any, vocab_size: int = 49_408) -> Arrays:
  """Full captions, which end with the last token of CLIP's vocabulary."""
  shape = (size.batch, size.context_length)
  tokens = np.random.default_rng(0).integers(1, vocab_size - 2, shape)
  tokens[:, -1] = vocab_size - 1
  return {
    "text_tokens": tokens.astype(np.int32),
    "text_mask": np.ones(shape, bool),
  }


def condition_arrays(size: Any, width: int) -> Arrays:
  """Embeddings and text states, as a CLIP would give them."""
  B, L = size.batch, size.context_length
  return {
    "image_embed": normal(B, width),
    "text_embed": normal(B, width),
    "text_encodings": normal(B, L, width),
  }


def train_contender(
  task: Any, batch: Arrays, clip: Arrays | None = None
) -> Contender:
  """The trainer's step of a task, on one batch again and again.

  Args:
    clip: variables of `GivenEmbeddings`.
  """
  import jax
  import ml_collections

  from unclip_jax import optim, trainer

  tx, _ = optim.make_optimizer(
    ml_collections.ConfigDict(
      dict(learning_rate=1e-4, schedule="constant", weight_decay=0.01)
    ),
    num_steps=1000,
  )
  frozen = {} if clip is None else {"clip": clip}
  frozen |= task.prepare(frozen, [batch])
  state = jax.jit(lambda rng: trainer.init_state(task, tx, rng, batch, frozen))(
    jax.random.key(0)
  )
  step = jax.jit(
    trainer.make_train_step(task, tx, ema_decay=0.999), donate_argnums=0
  )
  inputs = jax.device_put((frozen, batch, jax.random.key(1)))

  def run() -> None:
    nonlocal state
    state, metrics = step(state, *inputs)
    jax.block_until_ready((state, metrics))

  sizes = [x.size for x in jax.tree.leaves(state.params)]
  rows = len(next(iter(batch.values())))
  return Contender(run, rows, sum(sizes))


def peers(case: str, options: Options, *args: Any) -> dict[str, Contender]:
  """Whoever of the case's peers is installed; a line for each who is not."""
  if not options.peers:
    return {}
  from launch import bench_peers

  return bench_peers.contenders(case, options, *args)


@contextlib.contextmanager
def clip(options: Options) -> Iterator[dict[str, Contender]]:
  from unclip_jax.models import clip as model_lib
  from unclip_jax.tasks import clip as task_lib

  size = CLIP_SIZES[options.size]
  model = model_lib.Model(
    image_size=size.image_size,
    patch_size=size.patch_size,
    vision_width=size.vision_width,
    vision_depth=size.depth,
    vision_num_heads=size.vision_width // 64,
    vocab_size=size.vocab_size,
    context_length=size.context_length,
    text_width=size.text_width,
    text_depth=size.depth,
    text_num_heads=size.text_width // 64,
    embed_dim=size.embed_dim,
    activation="gelu",
    dtype=options.dtype,
  )
  batch = caption_arrays(size, size.vocab_size)
  batch["image"] = normal(size.batch, size.image_size, size.image_size, 3)
  yield {
    "ours": train_contender(task_lib.Task(model, {}), batch),
    **peers("clip", options, size, batch),
  }


def _prior(options: Options) -> tuple[PriorSize, Any]:
  from unclip_jax.models import prior as model_lib

  size = PRIOR_SIZES[options.size]
  return size, model_lib.Model(
    embed_dim=size.width,
    text_width=size.width,
    context_length=size.context_length,
    width=size.width,
    depth=size.depth,
    num_heads=size.width // 64,
    mlp_ratio=5,
    dtype=options.dtype,
  )


@contextlib.contextmanager
def prior(options: Options) -> Iterator[dict[str, Contender]]:
  from unclip_jax.tasks import prior_diffusion

  size, model = _prior(options)
  given = condition_arrays(size, size.width)
  batch = {**caption_arrays(size), "clip_image": given["image_embed"]}
  task = prior_diffusion.Task(model, {"clip": GivenEmbeddings()})
  yield {
    "ours": train_contender(task, batch, given),
    **peers("prior", options, size, given),
  }


def _unet(options: Options, size: UnetSize, **fields: Any) -> Any:
  from unclip_jax.models import unet

  return unet.Model(
    image_size=size.image_size,
    out_channels=3,
    channels=size.channels,
    channel_mult=size.channel_mult,
    num_res_blocks=size.num_res_blocks,
    attention_resolutions=size.attention_resolutions,
    dtype=options.dtype,
    **fields,
  )


@contextlib.contextmanager
def decoder(options: Options) -> Iterator[dict[str, Contender]]:
  from unclip_jax.tasks import decoder as task_lib

  size = DECODER_SIZES[options.size]
  model = _unet(
    options, size, image_embed_dim=size.embed_dim, text_width=size.embed_dim
  )
  task = task_lib.Task(
    model, {"clip": GivenEmbeddings()}, process=dict(variance="fixed_small")
  )
  given = condition_arrays(size, size.embed_dim)
  batch = {
    "image": normal(size.batch, size.image_size, size.image_size, 3),
    "clip_image": given["image_embed"],
    **caption_arrays(size),
  }
  yield {
    "ours": train_contender(task, batch, given),
    **peers("decoder", options, size, {**given, "image": batch["image"]}),
  }


@contextlib.contextmanager
def upsampler(options: Options) -> Iterator[dict[str, Contender]]:
  from unclip_jax.tasks import upsampler as task_lib

  size = UPSAMPLER_SIZES[options.size]
  side = size.image_size
  batch = {
    "image": normal(size.batch, side, side, 3),
    "low_res": normal(size.batch, side // 4, side // 4, 3),
  }
  task = task_lib.Task(_unet(options, size), {})
  yield {
    "ours": train_contender(task, batch),
    **peers("upsampler", options, size, batch),
  }


@contextlib.contextmanager
def sampling(options: Options) -> Iterator[dict[str, Contender]]:
  import jax
  import jax.numpy as jnp

  from unclip_jax.diffusion import process as process_lib

  size, model = _prior(options)
  size = dataclasses.replace(size, batch=min(size.batch, 4))
  condition = jax.device_put(condition_arrays(size, size.width))
  x_t = condition.pop("image_embed")
  timesteps = jnp.zeros(size.batch, jnp.int32)
  variables = jax.jit(model.init)(
    jax.random.key(0), x_t, timesteps, **condition
  )
  process = process_lib.Process(prediction="x_start")

  def draw(variables: Any, condition: Any, use_cache: bool) -> Any:
    cache = None
    if use_cache:
      cache = model.apply(variables, **condition, method=model.prefill)

    def denoise_fn(x_t: Any, timesteps: Any) -> Any:
      if use_cache:
        return model.apply(
          variables, x_t, timesteps, cache, method=model.denoise
        )
      return model.apply(variables, x_t, timesteps, **condition)[0]

    return process.sample(
      denoise_fn,
      x_t.shape,
      jax.random.key(2),
      sampler="ddpm",
      num_sample_steps=25,
    )

  draw = jax.jit(draw, static_argnums=2)

  def contender(use_cache: bool) -> Contender:
    return Contender(
      lambda: _drop(draw(variables, condition, use_cache).block_until_ready()),
      size.batch,
    )

  yield {
    "with the cache": contender(True),
    "without the cache": contender(False),
  }


def data_contender(
  options: Options,
  config: Mapping[str, Any],
  batch_size: int,
  num_batches: int,
) -> Contender:
  """Our batches of a `config.data`."""
  from unclip_jax.data import pipeline

  def run() -> float:
    # Anew each time: it keeps pictures that it has seen.
    ours = pipeline.DataPipeline.from_config(config, seed=0)
    ours = dataclasses.replace(ours, num_threads=options.threads)
    ours.num_examples("train")
    batches = ours.train_batches(0, batch_size)
    with contextlib.closing(batches):
      return seconds_of_batches(batches, num_batches)

  return Contender(run, batch_size * num_batches)


def write_pictures(folder: pathlib.Path, count: int, image_size: int) -> None:
  """So many JPEGs with captions; 16 are drawn, the others are links."""
  from PIL import Image

  for i in range(count):
    path = folder / f"{i:06d}.jpg"
    if i >= 16:
      os.link(folder / f"{i % 16:06d}.jpg", path)
    else:
      # Smooth, with some noise: of a photograph's size in bytes.
      rng = np.random.default_rng(i)
      small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
      large = small.resize((image_size, image_size), Image.Resampling.BICUBIC)
      noise = rng.normal(0, 8, (image_size, image_size, 3))
      pixels = np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)
      data = io.BytesIO()
      Image.fromarray(pixels).save(data, "JPEG", quality=90)
      path.write_bytes(data.getvalue())
  rows = [
    json.dumps({"file_name": f"{i:06d}.jpg", "text": f"picture {i % 16}"})
    for i in range(count)
  ]
  (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


@contextlib.contextmanager
def data(options: Options) -> Iterator[dict[str, Contender]]:
  tiny = options.size == "tiny"
  batch_size, num_batches, image_size = (4, 2, 32) if tiny else (32, 16, 512)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name) / "pictures"
    folder.mkdir()
    write_pictures(folder, batch_size * num_batches, image_size)
    config = dict(
      source_name="unclip_jax.data.folder",
      source=dict(folder=str(folder), data_dir=name, holdout=0.0),
      preprocess=dict(image_size=64, clip_image_size=224, context_length=16),
    )

    yield {
      "ours": data_contender(options, config, batch_size, num_batches),
      **peers("data", options, folder, batch_size),
    }


def write_tars(folder: pathlib.Path, pictures: pathlib.Path) -> None:
  """The JPEGs of a folder with a caption each, in four tars."""
  for number in range(4):
    with tarfile.open(folder / f"{number:05d}.tar", "w") as file:
      for path in sorted(pictures.glob("*.jpg"))[number::4]:
        text = f"picture {path.stem}".encode()
        # Not `add`, which would keep the links that the pictures are.
        for suffix, data in (("jpg", path.read_bytes()), ("txt", text)):
          info = tarfile.TarInfo(f"{path.stem}.{suffix}")
          info.size = len(data)
          file.addfile(info, io.BytesIO(data))


@contextlib.contextmanager
def tar(options: Options) -> Iterator[dict[str, Contender]]:
  tiny = options.size == "tiny"
  batch_size, num_batches, image_size = (4, 4, 32) if tiny else (32, 32, 512)
  with tempfile.TemporaryDirectory() as name:
    pictures, folder = pathlib.Path(name, "pictures"), pathlib.Path(name, "tar")
    pictures.mkdir()
    folder.mkdir()
    write_pictures(pictures, batch_size * num_batches, image_size)
    write_tars(folder, pictures)
    source = dict(path=str(folder), data_dir=name, holdout=0.0)
    sizes = dict(image_size=64, clip_image_size=224, context_length=16)

    def contender(**fields: Any) -> Contender:
      config = dict(
        source_name="unclip_jax.data.tar",
        source=source,
        preprocess={**sizes, **fields},
      )
      return data_contender(options, config, batch_size, num_batches)

    yield {
      "ours": contender(),
      "ours, fast_jpeg": contender(fast_jpeg=True),
      **peers("tar", options, folder, batch_size, num_batches),
    }


def seconds_of_batches(batches: Iterable[Any], count: int) -> float:
  """Seconds from asking for the first batch to having the last."""
  begin = time.monotonic()
  iterator = iter(batches)
  for _ in range(count):
    next(iterator)
  return time.monotonic() - begin


@contextlib.contextmanager
def start(options: Options) -> Iterator[dict[str, Contender]]:
  del options
  root = pathlib.Path(__file__).resolve().parents[1]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    numbers = itertools.count()

    def run(cache: pathlib.Path) -> float:
      workdir = folder / f"run_{next(numbers)}"
      process = subprocess.run(
        [
          *(sys.executable, "-m", "unclip_jax.train"),
          "--config=configs/emoji/prior.py:smoke",
          f"--workdir={workdir}",
        ],
        cwd=root,
        env={
          **os.environ,
          "JAX_COMPILATION_CACHE_DIR": str(cache),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
      )
      if process.returncode:
        raise RuntimeError(f"the run failed:\n{process.stderr}")
      account = json.loads((workdir / "timing.json").read_text())
      return account["sessions"][0]["seconds"]["startup"]

    yield {
      "warm cache": Contender(lambda: run(folder / "cache"), 1),
      "cold": Contender(lambda: run(folder / f"{next(numbers)}"), 1),
    }


CASES: Mapping[str, Callable[[Options], Any]] = {
  "clip": clip,
  "prior": prior,
  "decoder": decoder,
  "upsampler": upsampler,
  "sampling": sampling,
  "data": data,
  "tar": tar,
  "start": start,
}


def contenders(case: str, options: Options) -> Any:
  """The context in which a case's contenders are ready, ours first."""
  return CASES[case](options)
