"""Compiler flags and the environment of a run, for each platform.

The one place for them. Every flag is known to jaxlib 0.10.2 or libtpu 0.0.42,
which refuse to start at a flag that they do not know. None was timed here:
where the effect is a figure, it is the compiler's own estimate. A run replaces
a variable by `--env NAME=VALUE` of its launcher.

Sources, as named below:
  library   MaxText, benchmarks/xla_flags_library.py
  maxtext   MaxText, src/maxtext/configs/tpu/GENERATION/*.sh
  recipes   AI-Hypercomputer/tpu-recipes, training/ironwood
  jax       docs.jax.dev: GPU performance tips, persistent compilation cache
  nvidia    docs.nvidia.com/jax-toolbox: environment variables, GPU performance
"""

from __future__ import annotations

_ASYNC_ALL_GATHER = (
  # Gathers of sharded weights run beside what does not need them. maxtext: v4.
  "--xla_enable_async_all_gather=true",
)
_FUSED_ALL_GATHER = (
  *_ASYNC_ALL_GATHER,
  # Steps of a gather become parts of the fusions that compute meanwhile, over
  # several of them. library: all gathers; maxtext: v5e, v5p, v6e.
  "--xla_tpu_enable_async_collective_fusion=true",
  "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
  "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
  "--xla_tpu_overlap_compute_collective_tc=true",
)
_DATA_PARALLEL = (
  # The sums of gradients over slices overlap with the backward pass, also
  # where they differ in size. library; maxtext: v5e, v5p.
  "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
  "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
_REDUCE_SCATTER = (
  # Layouts that turn an all-reduce with a slice behind it into a
  # reduce-scatter: half of the traffic of FSDP's gradients. library.
  "--xla_tpu_use_minor_sharding_for_major_trivial_input=true",
  "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1",
  "--xla_tpu_assign_all_reduce_scatter_layout=true",
)
_NO_WINDOWED_EINSUM = (
  # Under FSDP the compiler splits each matmul into a ring of thousands of
  # permutes; not so above this size in MiB. A transformer of 304 M parameters
  # on v5e:4x4, compiled: 0.32 s a step by its estimate, 0.11 s with this flag.
  "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
)

# Generation of TPU -> LIBTPU_INIT_ARGS.
LIBTPU_INIT_ARGS: dict[str, tuple[str, ...]] = {
  "v4": (*_ASYNC_ALL_GATHER, *_NO_WINDOWED_EINSUM),
  "v5e": (
    *_FUSED_ALL_GATHER,
    *_DATA_PARALLEL,
    *_REDUCE_SCATTER,
    *_NO_WINDOWED_EINSUM,
  ),
  "v5p": (
    *_FUSED_ALL_GATHER,
    *_DATA_PARALLEL,
    *_REDUCE_SCATTER,
    *_NO_WINDOWED_EINSUM,
    # Gathers stay outside of the fusions that both cores share, so that they
    # can be asynchronous. maxtext: v5p.
    "--xla_tpu_megacore_fusion_allow_ags=false",
    # Permutes in the background, and the gathers of the backward pass one
    # layer ahead. maxtext: v5p.
    "--xla_enable_async_collective_permute=true",
    "--xla_tpu_enable_ag_backward_pipelining=true",
  ),
  "v6e": (
    *_FUSED_ALL_GATHER,
    *_REDUCE_SCATTER,
    *_NO_WINDOWED_EINSUM,
    # 96 MiB of on-chip memory for one fusion: larger tiles, less traffic to
    # HBM. library: dense models; maxtext: v6e.
    "--xla_tpu_scoped_vmem_limit_kib=98304",
  ),
  "tpu7x": (
    *_ASYNC_ALL_GATHER,
    *_NO_WINDOWED_EINSUM,
    # 64 MiB here. recipes.
    "--xla_tpu_scoped_vmem_limit_kib=65536",
    # The SparseCores do the collectives while the TensorCores compute.
    # recipes; library: SparseCore offloading.
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "--xla_tpu_enable_all_gather_offload_tracing=true",
    "--xla_tpu_use_tc_device_shape_on_sc=true",
    "--xla_sc_disable_megacore_partitioning=true",
  ),
}

# XLA_FLAGS of NVIDIA GPUs (A100, H100).
GPU_XLA_FLAGS = (
  # Collectives are moved to where computation hides them. jax; nvidia sets it
  # in its images.
  "--xla_gpu_enable_latency_hiding_scheduler=true",
  # Collectives are merged up to 128 MiB, about a layer's weights of the paper's
  # models: few large ones cost less than many small ones. jax.
  "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
  "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
  "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
)

# The same as programs.run sets: the CPU's default convolutions are slower.
CPU_XLA_FLAGS = (
  "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
)

# What glibc's malloc is told on CPU, where every step allocates its temporaries
# anew: to keep what is freed. Else the system hands out the same memory page by
# page at each step: an eighth of the CPU time of a large one. Nothing
# is given back before the end: a run holds the most that it ever used.
CPU_MALLOC = {
  "MALLOC_ARENA_MAX": "1",
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": "1000000000000",
  "MALLOC_TOP_PAD_": "67108864",
}

PLATFORMS = (*LIBTPU_INIT_ARGS, "gpu", "cpu")


def cache(folder: str) -> dict[str, str]:
  """Environment that keeps compiled programs in a folder.

  Every process reads it and process 0 alone writes (jax): where a run has
  several hosts, it has to be a place that all of them see.
  """
  return {
    "JAX_COMPILATION_CACHE_DIR": folder,
    # A start compiles dozens of small programs beside the one of the step; by
    # default, what takes less than a second is not kept, nor what is small.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def environment(
  platform: str, *, cache_dir: str, simulated_devices: int = 0
) -> dict[str, str]:
  """The environment variables of a run.

  Args:
    platform: one of PLATFORMS.
    cache_dir: where compiled programs are kept; see `cache`.
    simulated_devices: of "cpu" only: in how many devices the CPU is split; 0
      leaves it one.
  """
  if platform == "cpu":
    xla_flags = CPU_XLA_FLAGS
    variables = {"JAX_PLATFORMS": "cpu", **CPU_MALLOC}
    if simulated_devices:
      count = f"--xla_force_host_platform_device_count={simulated_devices}"
      xla_flags = (*xla_flags, count)
      # XLA sizes its thread pool by this: devices that wait for each other in
      # a collective hang where it is as small as the number of cores.
      variables["NPROC"] = "64"
    variables["XLA_FLAGS"] = " ".join(xla_flags)
  elif platform == "gpu":
    variables = {
      "XLA_FLAGS": " ".join(GPU_XLA_FLAGS),
      # The rest is for NVIDIA's libraries; the default is 0.75. nvidia.
      "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    }
  else:
    variables = {"LIBTPU_INIT_ARGS": " ".join(LIBTPU_INIT_ARGS[platform])}
  return {**variables, **cache(cache_dir)}
