#include <cuda_runtime_api.h>

#include "emulator.h"

extern "C" __attribute__((visibility("default"))) void bcmf_emulated_set_shared_memory(int bytes) {
  emulator::shared_memory = bytes;
}
extern "C" __attribute__((visibility("default"))) void bcmf_emulated_set_order(int order) {
  emulator::order = static_cast<emulator::Order>(order);
}
