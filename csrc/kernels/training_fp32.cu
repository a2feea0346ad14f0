// training.cuh for fp32.
#include "training.cuh"

namespace pointfuse::training {

cudaError_t normalise_fp32(const Normalise& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<float, NormaliseKernel>(operation, multiprocessors, stream);
}
cudaError_t sums_fp32(const Sums& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<float, SumsKernel>(operation, multiprocessors, stream);
}
cudaError_t gradients_fp32(const Gradients& operation, int32_t multiprocessors, cudaStream_t stream) {
  return dispatch<float, GradientsKernel>(operation, multiprocessors, stream);
}

}  // namespace pointfuse::training
