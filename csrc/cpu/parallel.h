// torch's pool of threads.
#pragma once

#include "stable.h"

namespace bcmf::cpu {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

}  // namespace bcmf::cpu
