// csrc/cuda/loss.cu, with the kernels of csrc/cuda/kernels behind it, as g++ sees it. Every launcher has a file like
// this.
#include "cuda/loss.cu"
