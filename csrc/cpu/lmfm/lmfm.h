#pragma once

#include "common/lmfm.h"

namespace bcmf::cpu {

// bcmf::pool_norm_relu and bcmf::add_norm_relu run on torch's threads. The forward fills out and stats, the backward
// the gradients of maps and grad_norms.
void pool_forward(const NormReluArgs& args);
void pool_backward(const NormReluArgs& args);
void add_forward(const NormReluArgs& args);
void add_backward(const NormReluArgs& args);

}  // namespace bcmf::cpu
