// The passes of training.h for Python's tests, in the emulator or on a GPU, on tensors given by address. y and tensors
// of its shape come dense, as [outer, channels, inner].
#include <stdexcept>
#include <string>

#include "binding.h"
#include "training.h"

namespace pointfuse::testing {
namespace {

struct Call {
  const py::dict& tensors;
  const py::dict& options;
  training::Pass pass{};

  Call(const py::dict& tensors, const py::dict& options) : tensors(tensors), options(options) {
    const Tensor y = tensor("y");
    pass.dtype = y.dtype;
    pass.outer = y.sizes.at(0), pass.channels = y.sizes.at(1), pass.inner = y.sizes.at(2);
    pass.alignment = 16;
    for (const char* name : {"y", "residual", "grad_out", "out", "dy", "d_residual"}) {
      const Tensor like_y = tensor(name);
      if (like_y.data) pass.alignment = std::min(pass.alignment, like_y.alignment());
    }
    pass.y = y.data, pass.residual = tensor("residual").data;
    pass.mean = floats("mean"), pass.rstd = floats("rstd");
    pass.gamma = channels<const void*>("gamma"), pass.beta = channels<const void*>("beta");
    pass.activation = activation_of(option<std::string>("activation"));
    pass.residual_order = option<std::string>("residual_order") == "add_act" ? Residual::kAddAct : Residual::kActAdd;
    pass.negative_slope = option<float>("negative_slope");
  }

  Tensor tensor(const char* name) const { return Tensor(tensors, name); }
  float* floats(const char* name) const { return reinterpret_cast<float*>(tensor(name).data); }

  template <class Pointer>
  training::Channels<Pointer> channels(const char* name) const {
    const Tensor values = tensor(name);
    return {values.data, values.dtype};
  }

  training::Parts parts() const {
    const Tensor parts = tensor("parts");
    if (!parts.data) return {};
    return {reinterpret_cast<float*>(parts.data), static_cast<int32_t>(parts.sizes.at(0))};
  }

  template <class T>
  T option(const char* name) const {
    return options[name].cast<T>();
  }
};

void begin(bool late, uint64_t seed) {
  forget_memory();
  set_options(late, seed);
}

void finish(cudaError_t error) {
  const std::string message = failure(error);
  if (!message.empty()) throw std::runtime_error(message);
}

using Run = cudaError_t (*)(const Call& call, int32_t multiprocessors);

// Raises RuntimeError where the launch fails.
template <Run kRun>
void run(const py::dict& tensors, const py::dict& options, int32_t multiprocessors, bool late, uint64_t seed) {
  begin(late, seed);
  finish(kRun(Call(tensors, options), multiprocessors));
}

cudaError_t normalise(const Call& call, int32_t multiprocessors) {
  training::Normalise operation{};
  operation.pass = call.pass, operation.parts = call.parts(), operation.out = call.tensor("out").data;
  if (operation.parts.values) operation.mean = call.floats("mean"), operation.rstd = call.floats("rstd");
  operation.running_mean = call.channels<void*>("running_mean");
  operation.running_var = call.channels<void*>("running_var");
  operation.momentum = call.option<float>("momentum"), operation.eps = call.option<float>("eps");
  return training::normalise(operation, multiprocessors, nullptr);
}

cudaError_t sums(const Call& call, int32_t multiprocessors) {
  const training::Parts parts = call.parts();
  const int32_t count = training::sums_parts(call.pass, multiprocessors);
  if (parts.count != count) throw py::value_error("parts must be " + std::to_string(count));
  return training::sums({call.pass, call.tensor("grad_out").data, const_cast<float*>(parts.values)}, multiprocessors,
                        nullptr);
}

cudaError_t gradients(const Call& call, int32_t multiprocessors) {
  return training::gradients(
      {call.pass, call.tensor("grad_out").data, call.parts(), call.option<float>("elements"), call.tensor("dy").data,
       call.tensor("d_residual").data, call.floats("d_gamma"), call.floats("d_beta")},
      multiprocessors, nullptr);
}

// `parts` to `merged`, both [count, fields, channels].
void merge(const py::dict& tensors, bool late, uint64_t seed) {
  begin(late, seed);
  const Tensor parts(tensors, "parts"), merged(tensors, "merged");
  const auto merge = parts.sizes.at(1) == 3 ? training::merge_moments : training::merge_sums;
  finish(merge({reinterpret_cast<float*>(parts.data), static_cast<int32_t>(parts.sizes.at(0))}, parts.sizes.at(2),
               reinterpret_cast<float*>(merged.data), nullptr));
}

// How the pass over these tensors is cut: numbers in a vector, and parts of its sums.
py::tuple cut(const py::dict& tensors, const py::dict& options, int32_t multiprocessors) {
  const Call call(tensors, options);
  return py::make_tuple(training::vector_of(call.pass), training::sums_parts(call.pass, multiprocessors));
}

}  // namespace

void define_training(py::module_& module) {
  const auto define = [&](const char* name, auto function) {
    module.def(name, function, py::arg("tensors"), py::arg("options"), py::kw_only(), py::arg("multiprocessors") = 132,
               py::arg("late") = true, py::arg("seed") = 0);
  };
  define("normalise", &run<normalise>);
  define("sums", &run<sums>);
  define("gradients", &run<gradients>);
  module.def("merge", &merge, py::arg("tensors"), py::kw_only(), py::arg("late") = true, py::arg("seed") = 0);
  module.def("cut", &cut, py::arg("tensors"), py::arg("options"), py::kw_only(), py::arg("multiprocessors") = 132);
}

}  // namespace pointfuse::testing
