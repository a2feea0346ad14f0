// training.cuh for fp16.
#include "training.cuh"

namespace pointfuse::training {

cudaError_t normalise_fp16(const Normalise& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<half_t, NormaliseKernel>(operation, multiprocessors, stream);
}
cudaError_t sums_fp16(const Sums& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<half_t, SumsKernel>(operation, multiprocessors, stream);
}
cudaError_t gradients_fp16(const Gradients& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<half_t, GradientsKernel>(operation, multiprocessors, stream);
}

}  // namespace pointfuse::training
