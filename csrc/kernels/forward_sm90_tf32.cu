#include "forward_sm90.cuh"

namespace pointfuse::sm90 {

template cudaError_t launch_forward<float>(const ForwardArguments&, cudaStream_t);

}  // namespace pointfuse::sm90
