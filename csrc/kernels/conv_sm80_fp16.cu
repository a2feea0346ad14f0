// conv_sm80.cuh for fp16.
#include "conv_sm80.cuh"

namespace pointfuse::sm80 {

template <int kTile>
using HalfWarp = TensorWarp<HalfProducts<half_t>, kTile>;

cudaError_t run_fp16(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  return dispatch<HalfWarp>(plan, problem, operands, stream);
}

}  // namespace pointfuse::sm80
