// The emulated binding allocates by the dispatcher, as on a GPU: the shim for the CPU goes past it, and past the tests'
// canaries. Included before torch_binding.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>

namespace host_cuda {

inline AOTITorchError empty_strided(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                    int32_t device_type, int32_t device, AtenTensorHandle* made) {
  using torch::stable::detail::from;
  const auto type = static_cast<torch::headeronly::ScalarType>(dtype);
  const torch::stable::Device where(static_cast<torch::headeronly::DeviceType>(device_type), device);
  std::array<StableIValue, 6> stack{from(torch::headeronly::IntHeaderOnlyArrayRef(sizes, rank)),
                                    from(torch::headeronly::IntHeaderOnlyArrayRef(strides, rank)),
                                    from(std::optional(type)),
                                    from(std::optional<torch::headeronly::Layout>()),
                                    from(std::optional(where)),
                                    from(std::optional<bool>())};
  const AOTITorchError error = torch_call_dispatcher("aten::empty_strided", "", stack.data(), TORCH_ABI_VERSION);
  if (error == TORCH_SUCCESS) *made = torch::stable::detail::to<AtenTensorHandle>(stack[0]);
  return error;
}

}  // namespace host_cuda

#define aoti_torch_empty_strided host_cuda::empty_strided
