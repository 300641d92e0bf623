// A helper of all launchers, which turns a dtype that is known at run time into a C++ type.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/kernels/scalars.cuh"

namespace bcmf::cuda {

// Calls f(scalar) with a value of this dtype's C++ type; only its type matters.
template <typename F>
inline void with_scalar(FloatType type, F f) {
  switch (type) {
    case FloatType::f16:
      return f(__half());
    case FloatType::bf16:
      return f(__nv_bfloat16());
    case FloatType::f32:
      return f(float());
    case FloatType::f64:
      return f(double());
  }
}

}  // namespace bcmf::cuda
