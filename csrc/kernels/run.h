// Launches a plan. The one entry to the kernels; it neither allocates nor synchronises.
#pragma once

#include "atoms.cuh"
#include "plan.h"

namespace pointfuse {

namespace sm80 {
cudaError_t run(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream);
}
namespace sm90 {
cudaError_t run(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream);
cudaError_t run_forward(const Plan& plan, const Problem& problem, const Operands& operands, const Forward& forward,
                        cudaStream_t stream);
}  // namespace sm90

// `plan` is make_plan's or select_plan's for this problem.
inline cudaError_t run(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  switch (plan.kernel) {
    case Kernel::kSm80:
      return sm80::run(plan, problem, operands, stream);
    case Kernel::kSm90:
      return sm90::run(plan, problem, operands, stream);
    default:
      return cudaErrorNotSupported;
  }
}

// A training forward in one launch: run() with statistics, and what `forward` says. cooperative_refusal() must be null.
inline cudaError_t run_forward(const Plan& plan, const Problem& problem, const Operands& operands,
                               const Forward& forward, cudaStream_t stream) {
  return sm90::run_forward(plan, problem, operands, forward, stream);
}

}  // namespace pointfuse
