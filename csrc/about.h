// What the library of kernels tells of itself, as C functions, so that any program can ask for it: module.cpp, and
// bcmf_ext/dispatch.py where a Python has no module.
#pragma once

#define BCMF_EXPORT extern "C" __attribute__((visibility("default")))

// Returns JSON: the compiler, cuda_archs (in the form of TORCH_CUDA_ARCH_LIST; empty without CUDA), and the instruction
// set of the CPU's kernels that is in use.
BCMF_EXPORT const char* bcmf_build_info();

// Returns JSON of what bcmf_ext/ops.py and the kernels have to agree on: the entries of sums, summary and terms, of
// which "bcl" (twice) and "selected" have MAX_STEPS places, and the options of bcmf::loss with their types.
BCMF_EXPORT const char* bcmf_contract();

// Gives the system the memory that the CPU's kernels keep from step to step (cpu/memory.h).
BCMF_EXPORT void bcmf_release_kept_memory();
