// csrc/cuda/loss.cu, with the kernels of csrc/device behind it, as g++ sees it. Every launcher has a file like this.
#include "../../../csrc/cuda/loss.cu"
