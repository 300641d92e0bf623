#include "emulator.h"

extern "C" void bcmf_emulated_set_order(int order) { emulator::order = static_cast<emulator::Order>(order); }
