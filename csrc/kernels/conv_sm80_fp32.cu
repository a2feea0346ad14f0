// conv_sm80.cuh for strict fp32.
#include "conv_sm80.cuh"

namespace pointfuse::sm80 {

cudaError_t run_fp32(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  return dispatch<FmaWarp>(plan, problem, operands, stream);
}

}  // namespace pointfuse::sm80
