#pragma once

struct CUstream_st;

namespace bcmf::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// What CUDA says of an error.
const char* error_text(int error);

}  // namespace bcmf::cuda
