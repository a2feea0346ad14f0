// The kernels for Python's tests, in the emulator or on a GPU: run() plans one candidate, launches it on tensors given
// by address, and waits for it.
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "binding.h"
#include "plan.h"
#include "run.h"

using namespace pointfuse;
using namespace pointfuse::testing;

namespace {

struct Unit {
  Problem problem{};
  Operands operands{};
};

Unit unit_of(const py::dict& tensors, const py::dict& options) {
  const Tensor x(tensors, "x"), weight(tensors, "weight"), y(tensors, "y"), residual(tensors, "residual");
  const Tensor bias(tensors, "bias"), mean(tensors, "mean"), var(tensors, "var"), gamma(tensors, "gamma"),
      beta(tensors, "beta"), parts(tensors, "parts");
  const auto pair = [&](const char* name) { return options[name].cast<std::pair<int32_t, int32_t>>(); };
  Unit unit;
  Problem& p = unit.problem;
  p.batch = x.sizes.at(0), p.c_in = x.sizes.at(1), p.height = x.sizes.at(2), p.width = x.sizes.at(3);
  p.c_out = weight.sizes.at(0);
  p.kernel_h = static_cast<int32_t>(weight.sizes.at(2)), p.kernel_w = static_cast<int32_t>(weight.sizes.at(3));
  std::tie(p.stride_h, p.stride_w) = pair("stride");
  std::tie(p.padding_h, p.padding_w) = pair("padding");
  p.dtype = x.dtype;
  p.tf32 = options["tf32"].cast<bool>();
  p.x = x.four(), p.weight = weight.four(), p.y = y.four();
  p.x_alignment = x.alignment(), p.weight_alignment = weight.alignment(), p.y_alignment = y.alignment();
  p.bias = bias.data, p.batch_norm = mean.data;
  p.activation = activation_of(options["activation"].cast<std::string>());
  p.constant_weight = options["constant_weight"].cast<bool>();
  p.statistics = parts.data;
  if (residual.data) {
    p.residual = options["residual_order"].cast<std::string>() == "add_act" ? Residual::kAddAct : Residual::kActAdd;
    p.residual_strides = residual.four();
    p.residual_alignment = residual.alignment();
  }
  unit.operands = {x.data,
                   weight.data,
                   y.data,
                   residual.data,
                   bias.data,
                   mean.data,
                   var.data,
                   gamma.data,
                   beta.data,
                   bias.dtype,
                   mean.dtype,
                   options["eps"].cast<float>(),
                   options["negative_slope"].cast<float>(),
                   nullptr,
                   reinterpret_cast<float*>(parts.data)};
  return unit;
}

py::dict described(const Plan& plan) {
  py::dict result;
  result["x_vector"] = plan.x_vector;
  result["weight_vector"] = plan.weight_vector;
  result["y_vector"] = plan.y_vector;
  result["vectorised"] = plan.vectorised;
  result["x_pixel_major"] = plan.x_pixel_major;
  result["y_pixel_major"] = plan.y_pixel_major;
  result["split_k"] = plan.split_k;
  result["grid"] = plan.grid;
  return result;
}

// Raises ValueError where there is no such plan and RuntimeError where the launch fails. `general` asks the sm_80
// kernel for its general path where the vectorised one would do, `grid` the sm_90 kernel for so many blocks.
py::dict run_unit(const py::dict& tensors, const py::dict& options, const std::string& kernel, int tile, int split_k,
                  bool general, int64_t grid, bool late, uint64_t seed) {
  forget_memory();
  Unit unit = unit_of(tensors, options);
  const Kernel which = kernel == "sm80" ? Kernel::kSm80 : Kernel::kSm90;
  Device device = *device_by_name("h100");
  device.architecture = architecture();
  Plan plan = make_plan(unit.problem, device, which, tile, split_k);
  if (plan.refusal) throw py::value_error(plan.refusal);
  if (general) plan.vectorised = false;
  if (grid > 0) plan.grid = grid;
  const int64_t parts = unit.problem.statistics ? tensors["parts"].attr("shape")[py::int_(0)].cast<int64_t>() : 0;
  if (unit.problem.statistics && parts != statistics_parts(plan, unit.problem))
    throw py::value_error("parts must be " + std::to_string(statistics_parts(plan, unit.problem)));

  Workspace workspace(plan.workspace_bytes);
  unit.operands.workspace = workspace.data();
  set_options(late, seed);
  const std::string message = failure(run(plan, unit.problem, unit.operands, nullptr));
  if (!message.empty()) throw std::runtime_error(message);
  return described(plan);
}

// A training forward in one launch: run_unit's of the convolution, then what `batch` and its options say.
void run_training_forward(const py::dict& tensors, const py::dict& options, const py::dict& batch, int tile, bool late,
                          uint64_t seed) {
  forget_memory();
  Unit unit = unit_of(tensors, options);
  const Device& device = *device_by_name("h100");
  const Plan plan = make_plan(unit.problem, device, Kernel::kSm90, tile, 1);
  if (plan.refusal) throw py::value_error(plan.refusal);
  if (const char* reason = cooperative_refusal(unit.problem, plan, device)) throw py::value_error(reason);
  const Tensor out(batch, "out"), residual(batch, "residual"), gamma(batch, "gamma"), beta(batch, "beta"),
      running_mean(batch, "running_mean"), running_var(batch, "running_var"), mean(batch, "mean"), rstd(batch, "rstd"),
      arrived(batch, "arrived");
  const Residual order =
      options["residual_order"].cast<std::string>() == "add_act" ? Residual::kAddAct : Residual::kActAdd;
  const Forward forward{out.data,
                        residual.data,
                        order,
                        activation_of(batch["activation"].cast<std::string>()),
                        options["negative_slope"].cast<float>(),
                        batch["momentum"].cast<float>(),
                        options["eps"].cast<float>(),
                        gamma.data,
                        beta.data,
                        running_mean.data,
                        running_var.data,
                        gamma.dtype,
                        beta.dtype,
                        running_mean.dtype,
                        running_var.dtype,
                        reinterpret_cast<float*>(mean.data),
                        reinterpret_cast<float*>(rstd.data),
                        reinterpret_cast<uint32_t*>(arrived.data)};
  set_options(late, seed);
  const std::string message = failure(run_forward(plan, unit.problem, unit.operands, forward, nullptr));
  if (!message.empty()) throw std::runtime_error(message);
}

}  // namespace

PYBIND11_MODULE(POINTFUSE_TEST_MODULE, module) {
  module.def("run", &run_unit, py::arg("tensors"), py::arg("options"), py::kw_only(), py::arg("kernel"),
             py::arg("tile"), py::arg("split_k") = 1, py::arg("general") = false, py::arg("grid") = 0,
             py::arg("late") = true, py::arg("seed") = 0);
  module.def("forward", &run_training_forward, py::arg("tensors"), py::arg("options"), py::arg("batch"), py::kw_only(),
             py::arg("tile"), py::arg("late") = true, py::arg("seed") = 0);
  define_training(module);
  module.attr("tiles") = py::dict(py::arg("sm80") = sm80::kTileCount, py::arg("sm90") = sm90::kTileCount);
}
