// conv_sm80.cuh for bf16.
#include "conv_sm80.cuh"

namespace pointfuse::sm80 {

template <int kTile>
using BFloat16Warp = TensorWarp<HalfProducts<bfloat16_t>, kTile>;

cudaError_t run_bf16(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  return dispatch<BFloat16Warp>(plan, problem, operands, stream);
}

}  // namespace pointfuse::sm80
