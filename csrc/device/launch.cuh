// The one place that knows how a kernel starts. Kernels themselves stay free of <<<>>>, so that a CPU emulator can run
// them.
#pragma once

#define BCMF_LAUNCH(kernel, grid, block, stream, ...) kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
