// The entry to training.cuh: from the tensors' dtype to the file that has it; and the merging of parts.
#include "training.cuh"

namespace pointfuse::training {

template <class Operation>
using Run = cudaError_t(const Operation& operation, int32_t multiprocessors, cudaStream_t stream);
Run<Normalise> normalise_fp32, normalise_fp16, normalise_bf16;
Run<Sums> sums_fp32, sums_fp16, sums_bf16;
Run<Gradients> gradients_fp32, gradients_fp16, gradients_bf16;

template <class Part>
static cudaError_t launch_merge(const Parts& parts, int64_t channels, float* merged, cudaStream_t stream) {
  const LaunchConfig config{ceil_divide(channels, kMergeWidth), kMergeThreads, kMergeThreads * int(sizeof(Part)), 1,
                            true};
  return launch(config, stream, merge<Part>, parts, channels, merged);
}

cudaError_t merge_moments(const Parts& parts, int64_t channels, float* merged, cudaStream_t stream) {
  return launch_merge<Moments>(parts, channels, merged, stream);
}

cudaError_t merge_sums(const Parts& parts, int64_t channels, float* merged, cudaStream_t stream) {
  return launch_merge<DzSums>(parts, channels, merged, stream);
}

template <class Operation>
static cudaError_t run(const Operation& operation, int32_t multiprocessors, cudaStream_t stream, Run<Operation>* fp32,
                       Run<Operation>* fp16, Run<Operation>* bf16) {
  switch (operation.pass.dtype) {
    case DType::kFloat16:
      return fp16(operation, multiprocessors, stream);
    case DType::kBFloat16:
      return bf16(operation, multiprocessors, stream);
    default:
      return fp32(operation, multiprocessors, stream);
  }
}

cudaError_t normalise(const Normalise& operation, int32_t multiprocessors, cudaStream_t stream) {
  return run(operation, multiprocessors, stream, normalise_fp32, normalise_fp16, normalise_bf16);
}

cudaError_t sums(const Sums& operation, int32_t multiprocessors, cudaStream_t stream) {
  return run(operation, multiprocessors, stream, sums_fp32, sums_fp16, sums_bf16);
}

cudaError_t gradients(const Gradients& operation, int32_t multiprocessors, cudaStream_t stream) {
  return run(operation, multiprocessors, stream, gradients_fp32, gradients_fp16, gradients_bf16);
}

}  // namespace pointfuse::training
