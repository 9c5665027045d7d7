"""The peers' side of bench.py: each built as its documentation recommends.

A peer that cannot be imported is skipped with a line. Every module in torch is
trained by `_train_contender`; what differs is the network and its loss.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from launch import bench_cases
from launch.bench_cases import Arrays, Contender, Options

Loss = Callable[[], Any]


def contenders(case: str, options: Options, *args: Any) -> dict[str, Contender]:
  """Name -> contender, of the case's peers that are installed.

  Args:
    args: what the case hands to its peers: sizes and inputs.
  """
  found = {}
  for name, make in _PEERS[case].items():
    try:
      import torch

      torch.set_num_threads(options.threads)
      torch.manual_seed(0)
      found[name] = make(options, *args)
    except ImportError as error:
      print(f"{case}: {name} is skipped: {error}", flush=True)
  return found


def _train_contender(
  options: Options,
  module: Any,
  loss_of: Callable[[Any], Any],
  num_examples: int,
) -> Contender:
  """Forward, backward and AdamW.

  Args:
    module: has the parameters.
    loss_of: the loss that a network, compiled or not, gives.
  """
  import torch

  module.train()
  network = torch.compile(module) if options.compile else module
  optimizer = torch.optim.AdamW(
    module.parameters(), lr=1e-4, weight_decay=0.01, fused=True
  )

  def run() -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(
      "cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"
    ):
      loss = loss_of(network)
    loss.backward()
    optimizer.step()
    loss.item()

  sizes = [x.numel() for x in module.parameters() if x.requires_grad]
  return Contender(run, num_examples, sum(sizes))


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Torch's copies; pictures as NCHW in channels_last."""
  import torch

  tensors = {}
  for name, array in arrays.items():
    x = torch.from_numpy(array)
    tensors[name] = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
  return tensors


def _open_clip(
  options: Options, size: bench_cases.ClipSize, batch: Arrays
) -> Contender:
  import open_clip

  x = _tensors(batch)
  model = open_clip.model.CLIP(
    embed_dim=size.embed_dim,
    vision_cfg=dict(
      image_size=size.image_size,
      layers=size.depth,
      width=size.vision_width,
      patch_size=size.patch_size,
    ),
    text_cfg=dict(
      context_length=size.context_length,
      vocab_size=size.vocab_size,
      width=size.text_width,
      heads=size.text_width // 64,
      layers=size.depth,
    ),
  )
  loss = open_clip.ClipLoss()
  tokens = x["text_tokens"].long()
  image = x["image"].contiguous()
  return _train_contender(
    options, model, lambda net: loss(*net(image, tokens)[:3]), size.batch
  )


def _transformers(
  options: Options, size: bench_cases.ClipSize, batch: Arrays
) -> Contender:
  import transformers

  x = _tensors(batch)
  tower = dict(
    num_hidden_layers=size.depth,
    hidden_act="gelu",
    projection_dim=size.embed_dim,
  )
  config = transformers.CLIPConfig(
    text_config=dict(
      tower,
      vocab_size=size.vocab_size,
      hidden_size=size.text_width,
      intermediate_size=4 * size.text_width,
      num_attention_heads=size.text_width // 64,
      max_position_embeddings=size.context_length,
      bos_token_id=size.vocab_size - 2,
      eos_token_id=size.vocab_size - 1,
    ),
    vision_config=dict(
      tower,
      hidden_size=size.vision_width,
      intermediate_size=4 * size.vision_width,
      num_attention_heads=size.vision_width // 64,
      image_size=size.image_size,
      patch_size=size.patch_size,
    ),
    projection_dim=size.embed_dim,
  )
  config._attn_implementation = "sdpa"
  model = transformers.CLIPModel(config)
  inputs = dict(
    input_ids=x["text_tokens"].long(),
    attention_mask=x["text_mask"].long(),
    pixel_values=x["image"].contiguous(),
    return_loss=True,
  )
  return _train_contender(
    options, model, lambda net: net(**inputs).loss, size.batch
  )


def _dalle2_prior(
  options: Options, size: bench_cases.PriorSize, given: Arrays
) -> Contender:
  import dalle2_pytorch

  x = _tensors(given)
  network = dalle2_pytorch.DiffusionPriorNetwork(
    dim=size.width,
    depth=size.depth,
    dim_head=64,
    heads=size.width // 64,
    num_timesteps=1000,
    max_text_len=size.context_length,
  )
  model = dalle2_pytorch.DiffusionPrior(
    net=network,
    image_embed_dim=size.width,
    timesteps=1000,
    cond_drop_prob=0.1,
    condition_on_text_encodings=True,
  )

  def loss_of(net: Any) -> Any:
    return net(
      text_embed=x["text_embed"],
      # It multiplies the tensor that it is given, in place.
      image_embed=x["image_embed"].clone(),
      text_encodings=x["text_encodings"],
    )

  return _train_contender(options, model, loss_of, size.batch)


def _eps_loss(image: Any, predict: Callable[[Any, Any], Any]) -> Any:
  """The squared error of eps at random timesteps, cosine schedule."""
  import torch

  B = len(image)
  timesteps = torch.randint(0, 1000, (B,))
  angle = (timesteps / 1000 + 0.008) / 1.008 * torch.pi / 2
  alpha = torch.cos(angle)[:, None, None, None]
  noise = torch.randn_like(image)
  x_t = alpha * image + (1 - alpha**2).sqrt() * noise
  eps = predict(x_t, timesteps)
  return torch.nn.functional.mse_loss(eps.float(), noise)


def _unet_fields(size: bench_cases.UnetSize) -> dict[str, Any]:
  """What both of diffusers' U-Nets share with ours."""
  return dict(
    sample_size=size.image_size,
    out_channels=3,
    block_out_channels=[size.channels * m for m in size.channel_mult],
    layers_per_block=size.num_res_blocks,
    attention_head_dim=64,
    resnet_time_scale_shift="scale_shift",
  )


def _channels_last(model: Any) -> Any:
  import torch

  return model.to(memory_format=torch.channels_last)


def _diffusers_decoder(
  options: Options, size: bench_cases.UnetSize, given: Arrays
) -> Contender:
  import diffusers
  import torch

  x = _tensors(given)
  attending = len(size.attention_resolutions)
  plain = len(size.channel_mult) - attending
  width = 4 * size.channels
  model = diffusers.UNet2DConditionModel(
    **_unet_fields(size),
    in_channels=3,
    down_block_types=(
      *("ResnetDownsampleBlock2D",) * plain,
      *("SimpleCrossAttnDownBlock2D",) * attending,
    ),
    up_block_types=(
      *("SimpleCrossAttnUpBlock2D",) * attending,
      *("ResnetUpsampleBlock2D",) * plain,
    ),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    cross_attention_dim=width,
    class_embed_type="identity",
  )
  model = _channels_last(model)
  # 4 tokens of the image embedding, then the text.
  context = torch.randn(size.batch, 4 + size.context_length, width)
  emb = torch.randn(size.batch, width)

  def loss_of(net: Any) -> Any:
    return _eps_loss(
      x["image"],
      lambda x_t, timesteps: (
        net(x_t, timesteps, context, class_labels=emb).sample
      ),
    )

  return _train_contender(options, model, loss_of, size.batch)


def _dalle2_decoder(
  options: Options, size: bench_cases.UnetSize, given: Arrays
) -> Contender:
  import dalle2_pytorch

  x = _tensors(given)
  mult = size.dalle_channel_mult
  model = dalle2_pytorch.Unet(
    dim=size.dalle_channels,
    dim_mults=mult,
    cond_dim=size.dalle_channels,
    image_embed_dim=size.embed_dim,
    text_embed_dim=size.embed_dim,
    max_text_len=size.context_length,
    self_attn=[False] + [True] * (len(mult) - 1),
    cond_on_text_encodings=True,
    cond_on_image_embeds=True,
  )
  model = _channels_last(model)

  def loss_of(net: Any) -> Any:
    return _eps_loss(
      x["image"],
      lambda x_t, timesteps: net(
        x_t,
        timesteps,
        image_embed=x["image_embed"],
        text_encodings=x["text_encodings"],
        image_cond_drop_prob=0.1,
        text_cond_drop_prob=0.5,
      ),
    )

  return _train_contender(options, model, loss_of, size.batch)


def _diffusers_upsampler(
  options: Options, size: bench_cases.UnetSize, batch: Arrays
) -> Contender:
  import diffusers
  import torch

  x = _tensors(batch)
  levels = len(size.channel_mult)
  model = diffusers.UNet2DModel(
    **_unet_fields(size),
    in_channels=6,
    down_block_types=("ResnetDownsampleBlock2D",) * levels,
    up_block_types=("ResnetUpsampleBlock2D",) * levels,
    add_attention=False,
  )
  model = _channels_last(model)

  def loss_of(net: Any) -> Any:
    enlarged = torch.nn.functional.interpolate(
      x["low_res"], scale_factor=4, mode="bilinear"
    )
    return _eps_loss(
      x["image"],
      lambda x_t, timesteps: (
        net(torch.cat([x_t, enlarged], dim=1), timesteps).sample
      ),
    )

  return _train_contender(options, model, loss_of, size.batch)


def _torchvision_transform(image_size: int) -> Any:
  import torch
  from torchvision.transforms import v2

  return v2.Compose(
    [
      v2.Resize(image_size, v2.InterpolationMode.BICUBIC, antialias=True),
      v2.CenterCrop(image_size),
      v2.ToImage(),
      v2.ToDtype(torch.float32, scale=True),
      v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
  )


def _torchvision_data(
  options: Options, folder: pathlib.Path, batch_size: int
) -> Contender:
  from PIL import Image

  transforms = map(_torchvision_transform, (64, 224))
  paths = sorted(folder.glob("*.jpg"))
  return _data_contender(
    options, _Pictures(paths, Image.open, *transforms), batch_size
  )


def _webdataset_tar(
  options: Options, folder: pathlib.Path, batch_size: int, num_batches: int
) -> Contender:
  import webdataset

  transforms = [_torchvision_transform(size) for size in (64, 224)]

  def both(sample: tuple[Any, str]) -> tuple[Any, ...]:
    picture, text = sample
    return *(transform(picture) for transform in transforms), text

  urls = sorted(map(str, folder.glob("*.tar")))
  dataset = (
    webdataset.WebDataset(urls, shardshuffle=len(urls))
    .shuffle(1000)
    .decode("pilrgb")
    .to_tuple("jpg", "txt")
    .map(both)
    .batched(batch_size)
  )
  loader = webdataset.WebLoader(
    dataset, batch_size=None, num_workers=options.threads
  )
  return Contender(
    lambda: bench_cases.seconds_of_batches(loader, num_batches),
    batch_size * num_batches,
  )


def _pillow_data(
  options: Options, folder: pathlib.Path, batch_size: int
) -> Contender:
  import torch
  from PIL import Image, ImageOps

  def transform(image_size: int) -> Callable[[Any], Any]:
    def apply(picture: Any) -> Any:
      import numpy as np

      size = (image_size, image_size)
      small = ImageOps.fit(picture, size, Image.Resampling.BICUBIC)
      pixels = np.asarray(small, np.float32) / 127.5 - 1
      return torch.from_numpy(pixels).permute(2, 0, 1)

    return apply

  paths = sorted(folder.glob("*.jpg"))
  return _data_contender(
    options,
    _Pictures(paths, Image.open, transform(64), transform(224)),
    batch_size,
  )


class _Pictures:
  """A map-style dataset: both sizes of a picture, from one decoding."""

  def __init__(
    self,
    paths: list[pathlib.Path],
    read: Callable[[pathlib.Path], Any],
    *transforms: Callable[[Any], Any],
  ):
    self._paths = paths
    self._read = read
    self._transforms = transforms

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> list[Any]:
    with self._read(self._paths[index]) as picture:
      picture = picture.convert("RGB")
    return [transform(picture) for transform in self._transforms]


def _data_contender(
  options: Options, pictures: _Pictures, batch_size: int
) -> Contender:
  import torch

  loader = torch.utils.data.DataLoader(
    pictures, batch_size, shuffle=True, num_workers=options.threads
  )
  return Contender(
    lambda: bench_cases.seconds_of_batches(loader, len(loader)), len(pictures)
  )


_PEERS = {
  "clip": {"open_clip": _open_clip, "transformers": _transformers},
  "prior": {"dalle2-pytorch": _dalle2_prior},
  "decoder": {
    "diffusers": _diffusers_decoder,
    "dalle2-pytorch": _dalle2_decoder,
  },
  "upsampler": {"diffusers": _diffusers_upsampler},
  "data": {
    "DataLoader, Pillow": _pillow_data,
    "DataLoader, torchvision": _torchvision_data,
  },
  "tar": {"webdataset, torchvision": _webdataset_tar},
}
