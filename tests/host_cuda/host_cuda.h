// The atoms of atoms.cuh for the host, with the meaning that the PTX documentation gives them.
//
// Run a kernel by calling its host function as ever: launch() emulates the grid. options() chooses the mode and the
// seed, register_global() says which global memory exists, last_error() explains a launch that failed.
#pragma once

#include "cuda_words.h"
#include "host_launch.h"
#include "host_sm80.h"
#include "host_sm90.h"
