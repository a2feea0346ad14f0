"""How large the kernels' tiles are: what a configuration may be, and which one a call gets.

A call belongs to a shape class; a table per device family lists configurations for some classes, and a call takes that
of the nearest. What ``pointfuse tune`` measured on this machine goes before what the package ships. No configuration
is wrong for any call that it fits: the choice is one of speed.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("table.json")
FAMILIES = ("sm_80", "sm_90", "sm_100")
KERNELS = ("1x1", "3x3")
LAYOUTS = ("channels_last", "NCHW")
# The products' type: fp16 and bf16 alike, fp32 rounded to TF32, or fp32 kept, as three TF32 products each.
PRODUCTS = ("half", "tf32", "fp32")

# Fewer steps than these are not worth a part of their own: its sum goes through memory, to a second kernel.
_LEAST_STEPS = 12
# Blocks of a split sum that share a multiprocessor: each waits for memory most of the time.
_BLOCKS_TOGETHER = 2
# Beside tiles, a kernel keeps barriers in shared memory.
_SHARED_EXTRA = 1024


@dataclass(frozen=True)
class Chip:
    """A GPU as far as configurations depend on it.

    Attributes:
        family: whose table it uses, one of ``FAMILIES``.
        processors: its multiprocessors.
        shared_bytes: the shared memory that one block may have.
        descriptors: whether tensor descriptors are loaded by hardware (TMA).
    """

    family: str
    processors: int
    shared_bytes: int
    descriptors: bool

    @classmethod
    def of(cls, capability: tuple[int, int], processors: int, shared_bytes: int) -> Chip:
        """The chip by its compute capability. Those without Hopper's or Blackwell's tensor cores are as Ampere."""
        family = {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")
        return cls(family, processors, shared_bytes, family != "sm_80")


# What stands for each family where no GPU is at hand: A100, H100 and B200.
REFERENCE_CHIPS = {
    "sm_80": Chip.of((8, 0), 108, 163 << 10),
    "sm_90": Chip.of((9, 0), 132, 227 << 10),
    "sm_100": Chip.of((10, 0), 148, 227 << 10),
}


@dataclass(frozen=True)
class ShapeClass:
    """Calls that share a configuration. The sizes are powers of two, rounded up from the call's.

    Attributes:
        kernel: ``"1x1"`` or ``"3x3"``.
        layout: ``"channels_last"`` where the input's channels lie side by side, else ``"NCHW"``.
        products: one of ``PRODUCTS``.
        pixels: of the output, the batch's together.
        c_out: output channels.
        c_in: input channels.
    """

    kernel: str
    layout: str
    products: str
    pixels: int
    c_out: int
    c_in: int

    @classmethod
    def of(cls, kernel: str, layout: str, products: str, pixels: int, c_out: int, c_in: int) -> ShapeClass:
        """The class of a call, from its exact sizes."""
        return cls(kernel, layout, products, *(1 << max(0, n - 1).bit_length() for n in (pixels, c_out, c_in)))

    @property
    def element_bytes(self) -> int:
        return 2 if self.products == "half" else 4

    @property
    def taps(self) -> int:
        return 9 if self.kernel == "3x3" else 1

    def distance(self, other: ShapeClass) -> float:
        """How unlike two classes of one kernel, layout and products are: doublings, the pixels' first."""
        doublings = [abs(math.log2(a / b)) for a, b in zip(self._sizes, other._sizes, strict=True)]
        return doublings[0] + 0.5 * doublings[1] + 0.25 * doublings[2]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.pixels, self.c_out, self.c_in

    def __str__(self) -> str:
        return f"{self.kernel} {self.layout} {self.products} {self.pixels}x{self.c_in}->{self.c_out}"

    @classmethod
    def parse(cls, text: str) -> ShapeClass:
        """The inverse of ``str``. Raises ``ValueError`` for anything else."""
        try:
            kernel, layout, products, sizes = text.split(" ")
            pixels, channels = sizes.split("x")
            c_in, c_out = channels.split("->")
            found = cls(kernel, layout, products, int(pixels), int(c_out), int(c_in))
        except ValueError as error:
            raise ValueError(f"{text!r} is no shape class, such as '1x1 channels_last half 256x1024->512'") from error
        if kernel not in KERNELS or layout not in LAYOUTS or products not in PRODUCTS or min(found._sizes) < 1:
            raise ValueError(f"{text!r} is no shape class: {KERNELS}, {LAYOUTS}, {PRODUCTS} and sizes from 1")
        return found


@dataclass(frozen=True)
class Config:
    """Sizes of a kernel's tiles, and how it hides latency.

    Attributes:
        block_channels, block_pixels, block_k: output channels and pixels of a tile, input channels of a step.
        stages: steps whose loads are under way together.
        warps: of 32 threads, in a block.
        split_k: into how many parts the sum over input channels and taps is split, where tiles are too few for the
            chip; a second kernel adds them up.
        flatten: whether a program that walks over several tiles loads the next one's operands while it finishes one.
    """

    block_channels: int
    block_pixels: int
    block_k: int
    stages: int
    warps: int
    split_k: int = 1
    flatten: bool = False

    def tiles(self, shape: ShapeClass) -> int:
        """Tiles that cover a class's largest output."""
        return math.ceil(shape.pixels / self.block_pixels) * math.ceil(shape.c_out / self.block_channels)

    def steps(self, shape: ShapeClass) -> int:
        """Steps of a class's longest sum."""
        return math.ceil(shape.c_in / self.block_k) * shape.taps

    @property
    def accumulators(self) -> int:
        """fp32 sums that each thread holds."""
        return self.block_channels * self.block_pixels // (32 * self.warps)

    def shared_bytes(self, shape: ShapeClass) -> int:
        """Shared memory that the kernel takes at most: the steps under way, or later the tile on its way out.

        A kernel that is flattened needs both at once, the tile being rounded already.
        """
        operands = self.block_channels + self.block_pixels
        steps = self.stages * operands * self.block_k * shape.element_bytes
        if shape.products == "fp32":
            # The parts that TF32 cuts off.
            steps += operands * self.block_k * 4
        tile = self.block_channels * self.block_pixels
        if self.flatten:
            steps += tile * shape.element_bytes
        return max(steps, tile * 4) + _SHARED_EXTRA

    def refusal(self, shape: ShapeClass, chip: Chip) -> str | None:
        """Why no kernel of this configuration is made for a class on a chip, or ``None``: the one place that says."""
        sizes = (self.block_channels, self.block_pixels, self.block_k, self.warps)
        if any(n < 1 or n & (n - 1) for n in sizes):
            return "blocks and warps must be powers of two"
        if not (16 <= self.block_channels <= 256 and 16 <= self.block_pixels <= 256):
            return "a tile has from 16 to 256 channels and pixels"
        if not 16 <= self.block_k <= 256 or self.block_k * shape.element_bytes < 32:
            return "a step has from 16 to 256 input channels, and at least 32 bytes of them"
        if self.warps not in (4, 8):
            return "a block has 4 or 8 warps"
        if not 1 <= self.stages <= 8 or self.split_k < 1:
            return "there are from 1 to 8 stages and at least one part"
        if self.accumulators > self._most_accumulators(shape, chip):
            return f"{self.accumulators} sums a thread spill"
        if shape.layout == "NCHW" and self._gathers_too_much(shape, chip):
            return "elements gathered one by one spill"
        if chip.family == "sm_80" and shape.products == "fp32" and self.block_k > 16:
            return "both parts of a step's products spill"
        if self.shared_bytes(shape) > chip.shared_bytes:
            return f"it takes {self.shared_bytes(shape)} bytes of shared memory, a block may have {chip.shared_bytes}"
        return None

    def fitted(self, shape: ShapeClass, chip: Chip) -> Config:
        """This configuration with fewer stages where a chip has less shared memory than its family's first."""
        found = self
        while found.stages > 1 and found.shared_bytes(shape) > chip.shared_bytes:
            found = replace(found, stages=found.stages - 1)
        return found

    @staticmethod
    def _most_accumulators(shape: ShapeClass, chip: Chip) -> int:
        """As compiled kernels showed: one more doubling spills. Ampere holds operands in registers too."""
        nchw, fp32 = shape.layout == "NCHW", shape.products == "fp32"
        if chip.family == "sm_80":
            return 32 if nchw or fp32 else 64
        if nchw:
            return 32 if shape.element_bytes == 4 else 64
        return 64 if fp32 else 128

    def _gathers_too_much(self, shape: ShapeClass, chip: Chip) -> bool:
        """As compiled kernels showed, for channels that no step divides, with a residual."""
        ampere = chip.family == "sm_80"
        most = 8 if shape.element_bytes == 4 else 16 if ampere else 32
        return self.block_pixels * self.block_k > most * 32 * self.warps or (ampere and self.block_k > 32)


@dataclass(frozen=True)
class Entry:
    """A configuration of the table, and how it came there.

    Attributes:
        config: the configuration.
        us: its time in microseconds, or ``None`` where it was not measured.
        aten_us: the time of PyTorch's own operators in the same run, or ``None``.
    """

    config: Config
    us: float | None = None
    aten_us: float | None = None

    @property
    def faster_than_aten(self) -> bool:
        """Whether it was measured, and measured faster."""
        return self.us is not None and self.aten_us is not None and self.us < self.aten_us

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain data for JSON."""
        times = {"us": self.us, "aten_us": self.aten_us}
        return asdict(self.config) | {name: time for name, time in times.items() if time is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        """The inverse of :meth:`to_dict`. Raises ``ValueError`` where the data are not an entry's."""
        try:
            numbers = dict(data)
            us, aten_us = (None if (t := numbers.pop(k, None)) is None else float(t) for k in ("us", "aten_us"))
            flatten = bool(numbers.pop("flatten", False))
            return cls(Config(**{k: int(v) for k, v in numbers.items()}, flatten=flatten), us, aten_us)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{data!r} is no entry of a table of configurations: {error}") from error


Table = Mapping[ShapeClass, Entry]


@functools.cache
def shipped(family: str) -> Table:
    """The package's table for a device family."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))[family]
    return {ShapeClass.parse(name): Entry.from_dict(row) for name, row in rows.items()}


def choose(shape: ShapeClass, chip: Chip, measured: Table) -> Config:
    """The configuration for a class on a chip.

    The class's own entry of ``measured``, this machine's table, or else that of the nearest class in the shipped table,
    with fewer stages on chips of less shared memory, and with no more parts than the class has work for.
    """
    entry = measured.get(shape)
    if entry is not None and entry.config.refusal(shape, chip) is None:
        return entry.config
    rows = shipped(chip.family)
    config = rows[min((row for row in rows if _alike(row, shape)), key=shape.distance)].config.fitted(shape, chip)
    room = _BLOCKS_TOGETHER * chip.processors // config.tiles(shape)
    return replace(config, split_k=max(1, min(config.split_k, room, config.steps(shape) // _LEAST_STEPS)))


def candidates(shape: ShapeClass, chip: Chip) -> Iterator[Config]:
    """The configurations that tuning tries: the default, then the valid ones not plainly worse than another of them."""
    default = choose(shape, chip, {})
    yield default
    # A step of 128 bytes fills what a descriptor loads at once. Gathered elements and TF32's parts need registers.
    k_bytes = 128 if shape.layout == "channels_last" and shape.products != "fp32" else 64
    sizes = itertools.product(
        (64, 128, 256), (16, 32, 64, 128, 256), (k_bytes, 2 * k_bytes), (3, 4), (4, 8), (1, 2, 4, 8), (False, True)
    )
    for block_channels, block_pixels, step_bytes, stages, warps, split_k, flatten in sizes:
        block_k = step_bytes // shape.element_bytes
        config = Config(block_channels, block_pixels, block_k, stages, warps, split_k, flatten)
        # A wider step keeps as much under way as another stage.
        narrow = step_bytes == k_bytes or stages == 3
        new = narrow and config != default
        if new and config.refusal(shape, chip) is None and _worth_trying(config, shape, chip):
            yield config


def _worth_trying(config: Config, shape: ShapeClass, chip: Chip) -> bool:
    if config.block_channels > max(64, shape.c_out) or config.block_pixels > max(16, shape.pixels):
        return False
    # Eight warps have too little to do with fewer sums.
    if config.warps == 8 and config.accumulators < 32:
        return False
    tiles, jobs = config.tiles(shape), config.tiles(shape) * config.split_k
    most_parts = min(8, max(1, config.steps(shape) // 4))
    if config.split_k > most_parts or (config.split_k > 1 and jobs > _BLOCKS_TOGETHER * chip.processors):
        return False
    # Half the chip idle, though the tiles could be smaller or the parts more.
    if 2 * jobs <= chip.processors and (config.split_k < most_parts or config.block_pixels > 16):
        return False
    # Small tiles load more for each product, which nothing makes up for once there are waves of them.
    if tiles > 8 * chip.processors and config.block_channels * config.block_pixels < 64 * 128:
        return False
    # Only programs that walk load ahead.
    walks = chip.descriptors and shape.layout == "channels_last" and tiles > _BLOCKS_TOGETHER * chip.processors
    return walks or not config.flatten


def _alike(a: ShapeClass, b: ShapeClass) -> bool:
    return (a.kernel, a.layout, a.products) == (b.kernel, b.layout, b.products)
