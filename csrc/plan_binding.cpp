// The planner for Python: pointfuse._plan. Plans can be made, printed and tested where there is neither CUDA nor torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/describe.h"
#include "kernels/plan.h"

namespace py = pybind11;
using namespace pointfuse;

namespace {

using Indices = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// A row of numbers for each index.
template <size_t kColumns, class Function>
py::array_t<int64_t> rows(const Indices& indices, Function function) {
  const int64_t count = indices.size();
  py::array_t<int64_t> result({count, static_cast<int64_t>(kColumns)});
  for (int64_t i = 0; i < count; ++i) {
    const std::array<int64_t, kColumns> row = function(indices.data()[i]);
    for (size_t column = 0; column < kColumns; ++column) {
      result.mutable_data()[i * static_cast<int64_t>(kColumns) + static_cast<int64_t>(column)] = row[column];
    }
  }
  return result;
}

std::string text_of(const Problem& problem, const Plan& plan) {
  std::vector<char> buffer(static_cast<size_t>(describe(problem, plan, nullptr, 0)) + 1);
  describe(problem, plan, buffer.data(), static_cast<int>(buffer.size()));
  return buffer.data();
}

Device named_device(const std::string& name) {
  if (const Device* device = device_by_name(name.c_str())) return *device;
  std::string names;
  for (const NamedDevice& known : kDevices) names += (names.empty() ? "" : ", ") + std::string(known.name);
  throw py::value_error("there is no device '" + name + "'; the names are " + names);
}

// Strides as a tuple (outer, channel, height, width).
template <Strides Problem::* kField>
void strides(py::class_<Problem>& problem, const char* name) {
  problem.def_property(
      name,
      [](const Problem& p) {
        const Strides& s = p.*kField;
        return std::make_tuple(s.outer, s.channel, s.height, s.width);
      },
      [](Problem& p, const std::array<int64_t, 4>& s) { p.*kField = {s[0], s[1], s[2], s[3]}; });
}

void define_problem(py::module_& module) {
  py::enum_<DType>(module, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  py::enum_<Activation>(module, "Activation")
      .value("identity", Activation::kIdentity)
      .value("leaky_relu", Activation::kLeakyRelu)
      .value("relu", Activation::kRelu)
      .value("relu6", Activation::kRelu6)
      .value("silu", Activation::kSilu);
  py::enum_<Residual>(module, "Residual")
      .value("none", Residual::kNone)
      .value("add_act", Residual::kAddAct)
      .value("act_add", Residual::kActAdd);

  py::class_<Problem> problem(module, "Problem");
  problem.def(py::init([] { return Problem{}; }))
      .def(py::init<const Problem&>())
      .def_readwrite("batch", &Problem::batch)
      .def_readwrite("c_in", &Problem::c_in)
      .def_readwrite("height", &Problem::height)
      .def_readwrite("width", &Problem::width)
      .def_readwrite("c_out", &Problem::c_out)
      .def_readwrite("kernel_h", &Problem::kernel_h)
      .def_readwrite("kernel_w", &Problem::kernel_w)
      .def_readwrite("stride_h", &Problem::stride_h)
      .def_readwrite("stride_w", &Problem::stride_w)
      .def_readwrite("padding_h", &Problem::padding_h)
      .def_readwrite("padding_w", &Problem::padding_w)
      .def_readwrite("dtype", &Problem::dtype)
      .def_readwrite("tf32", &Problem::tf32)
      .def_readwrite("x_alignment", &Problem::x_alignment)
      .def_readwrite("weight_alignment", &Problem::weight_alignment)
      .def_readwrite("y_alignment", &Problem::y_alignment)
      .def_readwrite("residual_alignment", &Problem::residual_alignment)
      .def_readwrite("bias", &Problem::bias)
      .def_readwrite("batch_norm", &Problem::batch_norm)
      .def_readwrite("activation", &Problem::activation)
      .def_readwrite("residual", &Problem::residual)
      .def_readwrite("constant_weight", &Problem::constant_weight)
      .def_readwrite("statistics", &Problem::statistics)
      .def_property_readonly("out_height", &Problem::out_height)
      .def_property_readonly("out_width", &Problem::out_width)
      .def_property_readonly("pixels", &Problem::pixels);
  strides<&Problem::x>(problem, "x");
  strides<&Problem::weight>(problem, "weight");
  strides<&Problem::y>(problem, "y");
  strides<&Problem::residual_strides>(problem, "residual_strides");
}

void define_device(py::module_& module) {
  py::class_<Device>(module, "Device")
      .def_readonly("architecture", &Device::architecture)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared_bytes_per_block", &Device::shared_bytes_per_block)
      .def_readonly("shared_bytes_per_multiprocessor", &Device::shared_bytes_per_multiprocessor)
      .def_readonly("l2_bytes", &Device::l2_bytes)
      .def_readonly("clock_ghz", &Device::clock_ghz)
      .def_readonly("memory_gb_s", &Device::memory_gb_s)
      .def_readonly("half_tflops", &Device::half_tflops)
      .def_readonly("tf32_tflops", &Device::tf32_tflops)
      .def_readonly("fp32_tflops", &Device::fp32_tflops);
  module.def("device_by_name", &named_device);
  module.def("device_names", [] {
    std::vector<std::string> names;
    for (const NamedDevice& known : kDevices) names.emplace_back(known.name);
    return names;
  });
  module.def("estimate_device", &estimate_device, py::arg("architecture"), py::arg("multiprocessors"),
             py::arg("shared_bytes_per_block"), py::arg("shared_bytes_per_multiprocessor"), py::arg("l2_bytes"),
             py::arg("clock_ghz"), py::arg("memory_gb_s"));
}

void define_plan(py::module_& module) {
  py::enum_<Kernel>(module, "Kernel")
      .value("none", Kernel::kNone)
      .value("sm_80", Kernel::kSm80)
      .value("sm_90", Kernel::kSm90);
  py::class_<Plan>(module, "Plan")
      .def_readonly("kernel", &Plan::kernel)
      .def_readonly("tile", &Plan::tile)
      .def_readonly("block_channels", &Plan::block_channels)
      .def_readonly("block_pixels", &Plan::block_pixels)
      .def_readonly("block_k", &Plan::block_k)
      .def_readonly("stages", &Plan::stages)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("split_k", &Plan::split_k)
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("channel_tiles", &Plan::channel_tiles)
      .def_readonly("pixel_tiles", &Plan::pixel_tiles)
      .def_readonly("planes", &Plan::planes)
      .def_readonly("grid", &Plan::grid)
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_readonly("x_vector", &Plan::x_vector)
      .def_readonly("weight_vector", &Plan::weight_vector)
      .def_readonly("y_vector", &Plan::y_vector)
      .def_readonly("vectorised", &Plan::vectorised)
      .def_readonly("x_pixel_major", &Plan::x_pixel_major)
      .def_readonly("y_pixel_major", &Plan::y_pixel_major)
      .def_readonly("tensor_store", &Plan::tensor_store)
      .def_readonly("predicted_us", &Plan::predicted_us)
      .def_readonly("floor_us", &Plan::floor_us)
      .def_readonly("refusal", &Plan::refusal);
  py::class_<Cost>(module, "Cost")
      .def_readonly("launch_us", &Cost::launch_us)
      .def_readonly("fill_us", &Cost::fill_us)
      .def_readonly("arithmetic_us", &Cost::arithmetic_us)
      .def_readonly("chip_us", &Cost::chip_us)
      .def_readonly("memory_us", &Cost::memory_us)
      .def_readonly("epilogue_us", &Cost::epilogue_us)
      .def_readonly("reduction_us", &Cost::reduction_us)
      .def_property_readonly("total_us", &Cost::total_us);

  module.def("make_plan", &make_plan, py::arg("problem"), py::arg("device"), py::arg("kernel"), py::arg("tile"),
             py::arg("split_k"));
  module.def("select_plan", &select_plan, py::arg("problem"), py::arg("device"));
  module.def("describe", &text_of, py::arg("problem"), py::arg("plan"));
  module.def("cooperative_refusal", &cooperative_refusal, py::arg("problem"), py::arg("plan"), py::arg("device"));
  module.def("statistics_parts", &statistics_parts, py::arg("plan"), py::arg("problem"));
  module.def("predict", &predict, py::arg("problem"), py::arg("device"), py::arg("plan"));
  module.def("occupancy", &cost::occupancy, py::arg("plan"), py::arg("device"));
  module.def("registers_per_thread", &cost::registers_per_thread, py::arg("plan"));
  module.attr("SM80_TILES") = sm80::kTileCount;
  module.attr("SM90_TILES") = sm90::kTileCount;
  module.attr("SPLITS") = std::vector<int32_t>(std::begin(kSplits), std::end(kSplits));
}

// What the kernels call, over arrays of indices.
void define_schedule(py::module_& module) {
  module.def("k_steps", &k_steps, py::arg("problem"), py::arg("block_k"));
  module.def("split_range", [](int32_t steps, int32_t split_k, int32_t split) {
    const Range range = split_range(steps, split_k, split);
    return std::make_tuple(range.begin, range.end);
  });
  module.def("tile_stride", &tile_stride);
  module.def("blocks", [](const Plan& plan, const Indices& blocks) {
    return rows<2>(blocks, [&](int64_t block) -> std::array<int64_t, 2> {
      return {first_tile(plan, block), split_of(plan, block)};
    });
  });
  module.def("decode_tiles", [](const Plan& plan, const Indices& tiles) {
    return rows<3>(tiles, [&](int64_t tile) -> std::array<int64_t, 3> {
      const TileStart start = decode_tile(plan, tile);
      return {start.channel, start.plane, start.pixel};
    });
  });
  module.def("decode_k_steps", [](const Problem& problem, int32_t block_k, const Indices& steps) {
    return rows<3>(steps, [&](int64_t step) -> std::array<int64_t, 3> {
      const KStep decoded = decode_k_step(problem, block_k, static_cast<int32_t>(step));
      return {decoded.tap_h, decoded.tap_w, decoded.channel};
    });
  });
  module.def("decode_pixels", [](const Problem& problem, const Indices& pixels) {
    return rows<3>(pixels, [&](int64_t p) -> std::array<int64_t, 3> {
      const Pixel pixel = decode_pixel(problem, p);
      return {pixel.n, pixel.h, pixel.w};
    });
  });
  module.def("input_pixels", [](const Problem& problem, const Indices& pixels, int32_t tap_h, int32_t tap_w) {
    return rows<3>(pixels, [&](int64_t p) -> std::array<int64_t, 3> {
      const InputPixel input = input_pixel(problem, decode_pixel(problem, p), tap_h, tap_w);
      return {input.h, input.w, input.inside};
    });
  });
  module.def("element_offset", [](const std::array<int64_t, 4>& strides, const std::array<int64_t, 4>& index) {
    return element_offset({strides[0], strides[1], strides[2], strides[3]}, index[0], index[1], index[2], index[3]);
  });
  module.def("swizzled_offset", &swizzled_offset, py::arg("row"), py::arg("byte"));
}

}  // namespace

PYBIND11_MODULE(_plan, module) {
  module.doc() = "Which kernel runs a convolution unit on a device, how, and what it should cost.";
  define_problem(module);
  define_device(module);
  define_plan(module);
  define_schedule(module);
}
