"""Reading compiled programs, and compiling for slices that are not there."""

import importlib.util
import json
import re
import textwrap

import jax
import jax.numpy as jnp
import pytest

from launch import compiling, hlo
from launch.topologies import TOPOLOGIES
from unclip_jax import partitioning
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

# Long lines are put together where "\\" ends them.
TEXT = textwrap.dedent(
  r"""
  HloModule jit_step

  %add (a: f32[], b: f32[]) -> f32[] {
    ROOT %sum = f32[] add(%a, %b)
  }

  %fused (p: bf16[16,8]) -> bf16[16,8] {
    %p = bf16[16,8]{1,0} parameter(0)
    ROOT %slow = bf16[16,8]{1,0:T(8,128)(2,1)} negate(%p), \
      backend_config={"estimated_cycles":"7"}
  }

  %all-reduce-scatter.1 (input: f32[64,8]) -> f32[4,8] {
    %input = f32[64,8]{1,0} parameter(0)
    %reduced = f32[64,8]{1,0} all-reduce(%input), to_apply=%add
    ROOT %own = f32[4,8]{1,0} dynamic-slice(%reduced, %i, %z)
  }

  %body (state: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
    %weights = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%shard), channel_id=7
    %again = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%shard), channel_id=7
    %work = bf16[16,8]{1,0} fusion(%weights), kind=kLoop, calls=%fused, \
      backend_config={"estimated_cycles":"100"}
    ROOT %next = (s32[], bf16[16,8]{1,0}) tuple(%i, %work)
  }

  %condition (state: (s32[], bf16[16,8])) -> pred[] {
    %limit = s32[] constant(24)
    ROOT %less = pred[] compare(%i, %limit), direction=LT
  }

  ENTRY %main (p0: f32[64,8]) -> f32[4,8] {
    %loop = (s32[], bf16[16,8]{1,0}) while(%start), \
      condition=%condition, body=%body
    %rows = (f32[4,8]{1,0}, f32[512,4,8]{2,1,0:T(8,128)}) \
      all-gather-start(%x), dimensions={0}
    %done = f32[512,4,8]{2,1,0} all-gather-done(%rows)
    %sums = (f32[], f32[10]{0}) all-reduce(%a, %b), to_apply=%add
    %unknown = f32[4]{0} custom-call(%x), \
      backend_config={"estimated_cycles":"9000000000000"}
    ROOT %scattered = f32[4,8]{1,0} fusion(%p0), kind=kCustom, \
      calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"30"}
  }
  """
)
TEXT = re.sub(r"\\\n\s+", "", TEXT)


def test_a_program_is_read_with_its_loops():
  program = hlo.read(TEXT)
  assert program.cycles == 24 * 100 + 30
  assert program.bytes_by_kind() == {
    "all-gather": 24 * 16 * 8 * 2 + 512 * 4 * 8 * 4,
    "all-reduce": 4 + 40,
    "reduce-scatter": 64 * 8 * 4,
  }
  assert program.gathers_of(512) == [(512, 4, 8)]
  assert program.gathers_of(64) == []
  largest = program.largest(1)[0]
  assert (largest.kind, largest.times) == ("all-gather", 1)


def test_a_loop_that_says_its_length_is_believed():
  text = TEXT.replace(
    "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
  )
  assert hlo.read(text).cycles == 3 * 100 + 30


def test_a_real_program():
  def f(w):
    return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), w)

  text = jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text()
  _, computations = hlo._parse(text)
  trips = [
    hlo._trips(instruction, computations)
    for instructions in computations.values()
    for instruction in instructions
    if instruction.opcode == "while"
  ]
  assert trips == [7]
  assert hlo.read(text).collectives == ()


def test_rows_of_the_table():
  result = dict(name="clip", topology="v5e-256", failed="stopped after 9 s")
  assert compiling.cells(result)["fits"] == "not compiled: stopped after 9 s"
  result = dict(
    name="clip",
    topology="v5e-256",
    mesh=dict(data=16, fsdp=16, tensor=1),
    batch_size=64,
    num_microbatches=2,
    tflop_per_device=1.25,
    fits=False,
    reason="too large",
  )
  row = compiling.cells(result)
  assert row["mesh"] == "data 16 x fsdp 16"
  assert row["batch"] == "64 / 2" and row["fits"] == "no: too large"


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)


@needs_libtpu
def test_compiles_what_fits_and_says_what_does_not(tmp_path, run_python):
  def compile_for(*flags):
    run_python(
      *("launch/aot.py", "--config=configs/emoji/clip.py:smoke"),
      *("--topology=v5e-8", f"--out={tmp_path}", *flags),
      timeout=180,
    )
    (result,) = json.loads((tmp_path / "aot.json").read_text())
    return result

  result = compile_for("--config.mesh.fsdp=2")
  assert result["fits"] and result["mesh"] == dict(data=4, fsdp=2, tensor=1)
  assert 0 < result["argument_bytes"] < 2**20
  assert result["alias_bytes"] > 0  # the state is donated
  assert result["collective_bytes"]["all-gather"] > 0
  made = (tmp_path / "aot.md").read_text()
  assert "| yes |" in made
  files = set(tmp_path.iterdir())
  assert compile_for("--config.mesh.fsdp=2") == result  # not made again
  assert set(tmp_path.iterdir()) == files
  wide = compile_for(
    "--config.model.text_width=32768", "--config.model.text_depth=2"
  )
  assert not wide["fits"]
  assert "RESOURCE_EXHAUSTED" in wide["reason"] and "hbm" in (
    wide["reason"].lower()
  )


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e-1", "v6e-256", "v5p-128", "2xv5e-256"])
def test_topologies(name):
  devices = TOPOLOGIES[name].devices()
  expected = {"v5e-1": 1, "v6e-256": 256, "v5p-128": 64, "2xv5e-256": 512}
  assert len(devices) == expected[name]
  slices = {getattr(d, "slice_index", 0) for d in devices}
  assert len(slices) == (2 if name.startswith("2x") else 1)


@needs_libtpu
def test_what_draws_is_compiled_too():
  config = config_lib.load("configs/emoji/prior.py:smoke")
  result = compiling.compile_part(config, "v5e-8", "sample", "fast")
  assert result["fits"] and result["batch_size"] == config.eval_batch_size
  assert result["temp_bytes"] > 0 and result["tflop_per_device"] > 0
  config = config_lib.load("configs/emoji/clip.py:smoke")
  with pytest.raises(errors.UserError, match="'clip' draws nothing"):
    compiling.compile_part(config, "v5e-8", "sample", "fast")


@needs_libtpu
def test_replicas_go_across_slices():
  devices = TOPOLOGIES["2xv5e-256"].devices()
  mesh = partitioning.make_mesh(dict(data=-1, fsdp=16), devices)
  assert dict(mesh.shape) == dict(data=32, fsdp=16, tensor=1)
  for replica in mesh.devices:
    assert len({d.slice_index for d in replica.ravel()}) == 1
  with pytest.raises(errors.UserError, match="not a multiple of the 2 slices"):
    partitioning.make_mesh(dict(data=1, fsdp=512), devices)


def test_mistakes_are_told_in_a_line(tmp_path, run_python):
  process = run_python(
    *("launch/aot.py", "--config=configs/emoji/clip.py:smoke"),
    *("--topology=v5e-7", f"--out={tmp_path}"),
    check=False,
  )
  assert process.returncode == 2
  assert process.stderr.startswith("error: topology 'v5e-7' is unknown")
