// What the kernels cannot say in C++ alone: how one starts, and how a block gets its shared memory. g++ takes both from
// the emulator of python_tests/emulator, and so runs the same kernels on the CPU.
#pragma once

// A kernel with several template parameters stands in parentheses: its commas would split the macro's arguments.
#if defined(__CUDACC__)
#define BCMF_LAUNCH(kernel, grid, block, stream, ...) kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#define BCMF_SHARED(type, name, count) __shared__ type name[count]
#else
#include <emulator.h>
#endif
