// csrc/cuda/lmfm.cu, as g++ sees it.
#include "../../../csrc/cuda/lmfm.cu"
