#pragma once

struct CUstream_st;

namespace bcmf::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Returns CUDA's own words for an error.
const char* error_text(int error);

}  // namespace bcmf::cuda
