// csrc/cuda/lmfm/lmfm.cu, as g++ sees it.
#include "cuda/lmfm/lmfm.cu"
