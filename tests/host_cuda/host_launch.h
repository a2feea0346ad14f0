// launch(): the grid runs here and now, cluster after cluster.
#pragma once

#include <tuple>

#include "cuda_words.h"
#include "machine.h"

namespace pointfuse {

namespace host {

constexpr int kMaxSharedBytes = 227 * 1024;

inline cudaError_t check(const LaunchConfig& config) {
  if (config.grid <= 0 || config.grid > 0x7fffffff || config.threads <= 0 || config.threads > 1024 ||
      config.threads % host_cuda::kWarp || config.cluster < 1 || config.cluster > 16 || config.grid % config.cluster)
    return refuse(cudaErrorInvalidConfiguration,
                  host_cuda::format("launch: a grid of %lld blocks of %d threads in clusters of %d",
                                    (long long)config.grid, config.threads, config.cluster));
  if (config.cooperative && config.cluster > 1)
    return refuse(cudaErrorInvalidConfiguration, "launch: the emulator has no clusters in a cooperative grid");
  if (config.shared_bytes < 0 || config.shared_bytes > kMaxSharedBytes)
    return refuse(cudaErrorInvalidValue, host_cuda::format("launch: %d bytes of shared memory", config.shared_bytes));
  return cudaSuccess;
}

}  // namespace host

template <class... Parameters, class... Args>
cudaError_t launch(const LaunchConfig& config, cudaStream_t, void (*kernel)(Parameters...), Args&&... args) {
  if (const cudaError_t error = host::check(config)) return error;
  const std::tuple<Parameters...> parameters(std::forward<Args>(args)...);
  host_cuda::Machine machine({config.grid, config.threads, config.shared_bytes, config.cluster, config.cooperative},
                             [&] { std::apply(kernel, parameters); });
  host_cuda::running_machine() = &machine;
  const std::string message = machine.run();
  host_cuda::running_machine() = nullptr;
  return message.empty() ? cudaSuccess : host::refuse(cudaErrorLaunchFailure, message);
}

}  // namespace pointfuse
