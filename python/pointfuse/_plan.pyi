"""The planner: csrc/kernels/plan.h through csrc/plan_binding.cpp."""

from typing import Any

from numpy.typing import ArrayLike, NDArray

Quadruple = tuple[int, int, int, int]

class DType:
    float32: DType
    float16: DType
    bfloat16: DType
    name: str

class Activation:
    identity: Activation
    leaky_relu: Activation
    relu: Activation
    relu6: Activation
    silu: Activation
    name: str

class Residual:
    none: Residual
    add_act: Residual
    act_add: Residual
    name: str

class Kernel:
    none: Kernel
    sm_80: Kernel
    sm_90: Kernel
    name: str

class Problem:
    batch: int
    c_in: int
    height: int
    width: int
    c_out: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dtype: DType
    tf32: bool
    x: Quadruple
    weight: Quadruple
    y: Quadruple
    residual_strides: Quadruple
    x_alignment: int
    weight_alignment: int
    y_alignment: int
    residual_alignment: int
    bias: bool
    batch_norm: bool
    activation: Activation
    residual: Residual
    constant_weight: bool
    statistics: bool
    @property
    def out_height(self) -> int: ...
    @property
    def out_width(self) -> int: ...
    @property
    def pixels(self) -> int: ...
    def __init__(self, other: Problem = ...) -> None: ...

class Device:
    architecture: int
    multiprocessors: int
    shared_bytes_per_block: int
    shared_bytes_per_multiprocessor: int
    l2_bytes: int
    clock_ghz: float
    memory_gb_s: float
    half_tflops: float
    tf32_tflops: float
    fp32_tflops: float

class Plan:
    kernel: Kernel
    tile: int
    block_channels: int
    block_pixels: int
    block_k: int
    stages: int
    threads: int
    split_k: int
    cluster: int
    channel_tiles: int
    pixel_tiles: int
    planes: int
    grid: int
    shared_bytes: int
    workspace_bytes: int
    x_vector: int
    weight_vector: int
    y_vector: int
    vectorised: bool
    x_pixel_major: bool
    y_pixel_major: bool
    tensor_store: bool
    predicted_us: float
    floor_us: float
    refusal: str | None

class Cost:
    launch_us: float
    fill_us: float
    arithmetic_us: float
    chip_us: float
    memory_us: float
    epilogue_us: float
    reduction_us: float
    total_us: float

SM80_TILES: int
SM90_TILES: int
SPLITS: list[int]

def device_by_name(name: str) -> Device: ...
def device_names() -> list[str]: ...
def estimate_device(
    architecture: int,
    multiprocessors: int,
    shared_bytes_per_block: int,
    shared_bytes_per_multiprocessor: int,
    l2_bytes: int,
    clock_ghz: float,
    memory_gb_s: float,
) -> Device: ...
def make_plan(problem: Problem, device: Device, kernel: Kernel, tile: int, split_k: int) -> Plan: ...
def select_plan(problem: Problem, device: Device) -> Plan: ...
def describe(problem: Problem, plan: Plan) -> str: ...
def cooperative_refusal(problem: Problem, plan: Plan, device: Device) -> str | None: ...
def statistics_parts(plan: Plan, problem: Problem) -> int: ...
def predict(problem: Problem, device: Device, plan: Plan) -> Cost: ...
def occupancy(plan: Plan, device: Device) -> int: ...
def registers_per_thread(plan: Plan) -> int: ...
def k_steps(problem: Problem, block_k: int) -> int: ...
def split_range(steps: int, split_k: int, split: int) -> tuple[int, int]: ...
def tile_stride(plan: Plan) -> int: ...
def blocks(plan: Plan, blocks: ArrayLike) -> NDArray[Any]: ...
def decode_tiles(plan: Plan, tiles: ArrayLike) -> NDArray[Any]: ...
def decode_k_steps(problem: Problem, block_k: int, steps: ArrayLike) -> NDArray[Any]: ...
def decode_pixels(problem: Problem, pixels: ArrayLike) -> NDArray[Any]: ...
def input_pixels(problem: Problem, pixels: ArrayLike, tap_h: int, tap_w: int) -> NDArray[Any]: ...
def element_offset(strides: Quadruple, index: Quadruple) -> int: ...
def swizzled_offset(row: int, byte: int) -> int: ...
