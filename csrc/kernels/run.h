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
}

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

}  // namespace pointfuse
