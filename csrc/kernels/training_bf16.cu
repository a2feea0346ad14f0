// training.cuh for bf16.
#include "training.cuh"

namespace pointfuse::training {

cudaError_t normalise_bf16(const Normalise& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<bfloat16_t, NormaliseKernel>(operation, multiprocessors, stream);
}
cudaError_t sums_bf16(const Sums& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<bfloat16_t, SumsKernel>(operation, multiprocessors, stream);
}
cudaError_t gradients_bf16(const Gradients& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<bfloat16_t, GradientsKernel>(operation, multiprocessors, stream);
}

}  // namespace pointfuse::training
