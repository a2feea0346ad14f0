// conv_sm80.cuh for fp32 with products rounded to TF32.
#include "conv_sm80.cuh"

namespace pointfuse::sm80 {

template <int kTile>
using Tf32Warp = TensorWarp<Tf32Products, kTile>;

cudaError_t run_tf32(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  return dispatch<Tf32Warp>(plan, problem, operands, stream);
}

}  // namespace pointfuse::sm80
