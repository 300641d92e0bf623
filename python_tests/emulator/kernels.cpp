// Every launcher of csrc/cuda, with the kernels of csrc/device behind it, as g++ sees them: one line each.
#include "../../csrc/cuda/loss.cu"

extern "C" void bcmf_emulated_set_order(int order) { emulator::order = static_cast<emulator::Order>(order); }
