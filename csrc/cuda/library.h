// Where the CUDA kernels are registered. A program that runs them without a GPU puts a file of its own in the place of
// this one.
#pragma once

#include "stable.h"

#define BCMF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(bcmf, CUDA, m)
