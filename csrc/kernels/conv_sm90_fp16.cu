#include "conv_sm90.cuh"

namespace pointfuse::sm90 {

template cudaError_t launch_conv<half_t>(const Arguments&, cudaStream_t);

}  // namespace pointfuse::sm90
