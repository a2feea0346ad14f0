// The entry to conv_sm80.cuh: from the arithmetic that a problem asks for to the file that has it.
#include "run.h"

namespace pointfuse::sm80 {

using Run = cudaError_t(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream);
Run run_fp16, run_bf16, run_tf32, run_fp32;

cudaError_t run(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  if (problem.pixels() == 0 || problem.c_out == 0) return cudaSuccess;
  switch (problem.dtype) {
    case DType::kFloat16:
      return run_fp16(plan, problem, operands, stream);
    case DType::kBFloat16:
      return run_bf16(plan, problem, operands, stream);
    default:
      return (problem.tf32 ? run_tf32 : run_fp32)(plan, problem, operands, stream);
  }
}

}  // namespace pointfuse::sm80
