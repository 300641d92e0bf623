// In the place of csrc/cuda/library.h: the CUDA kernels run on CPU tensors, under a name of their own.
#pragma once

#include "stable.h"

#define BCMF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(bcmf_ptx, CPU, m)
