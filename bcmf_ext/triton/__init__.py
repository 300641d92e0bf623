"""The ops as Triton kernels, for GPUs where the CUDA library was not built. One file per op; imported when first used,
because importing triton takes a while."""
