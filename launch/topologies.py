"""TPU slices that programs can be compiled for, without having them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from unclip_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice as `jax.experimental.topologies` describes it.

  Attributes:
    name: libtpu's name of the grid of chips.
    clock: of the chip, in Hz: what the compiler's cycles are of.
    chip_config: libtpu's; "megacore" where two cores are one device.
    wrap: along which axes of the grid the links close to a ring; the compiler
      makes reduce-scatters on rings only.
    num_slices: connected by the data-centre network.
    chips_per_host: bounds of a host in the grid.
  """

  name: str
  clock: float
  chip_config: str = "default"
  wrap: tuple[bool, bool, bool] = (False, False, False)
  num_slices: int = 1
  chips_per_host: tuple[int, int, int] = (2, 2, 1)

  def devices(self) -> Sequence[Any]:
    """Devices that can be compiled for and hold nothing.

    Raises:
      UserError: libtpu is not installed.
    """
    from jax.experimental import topologies

    os.environ.update(_LIBTPU)
    try:
      return topologies.get_topology_desc(
        platform="tpu",
        topology_name=self.name,
        chip_config_name=self.chip_config,
        chips_per_host_bounds=self.chips_per_host,
        num_slices=self.num_slices,
        wrap=self.wrap,
      ).devices
    except (RuntimeError, NotImplementedError, ImportError) as e:
      raise UserError(
        f"no TPU compiler ({e}): install the extra tpu, pip install -e '.[tpu]'"
      ) from e


# libtpu may ask no machine what it is, and several processes may compile.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _v5e(grid: str, *wrap: bool, **fields: Any) -> Topology:
  return Topology(f"v5e:{grid}", 1.5e9, wrap=(*wrap, False), **fields)


def _v6e(grid: str, *wrap: bool, **fields: Any) -> Topology:
  return Topology(f"v6e:{grid}", 1.75e9, wrap=(*wrap, False), **fields)


def _v5p(grid: str, wrap: bool) -> Topology:
  return Topology(f"v5p:{grid}", 1.75e9, "megacore", (wrap,) * 3)


# The number in a name is the vendor's: chips of v5e and v6e, cores (two a chip)
# of v4 and v5p.
TOPOLOGIES = {
  "v5e-1": _v5e("1x1", False, False, chips_per_host=(1, 1, 1)),
  "v5e-4": _v5e("2x2", False, False),
  "v5e-8": _v5e("2x4", False, False),
  "v5e-16": _v5e("4x4", False, False),
  "v5e-64": _v5e("8x8", False, False),
  "v5e-128": _v5e("8x16", False, True),
  "v5e-256": _v5e("16x16", True, True),
  "2xv5e-256": _v5e("16x16", True, True, num_slices=2),
  "v6e-1": _v6e("1x1", False, False, chips_per_host=(1, 1, 1)),
  "v6e-4": _v6e("2x2", False, False),
  "v6e-8": _v6e("2x4", False, False),
  "v6e-16": _v6e("4x4", False, False),
  "v6e-256": _v6e("16x16", True, True),
  "2xv6e-256": _v6e("16x16", True, True, num_slices=2),
  "v5p-8": _v5p("2x2x1", False),
  "v5p-32": _v5p("2x2x4", False),
  "v5p-128": _v5p("4x4x4", True),
  "v5p-512": _v5p("4x8x8", True),
  "v4-8": Topology("v4:2x2x1", 1.05e9, "megacore"),
  "v4-128": Topology("v4:4x4x4", 1.05e9, "megacore", (True,) * 3),
}
