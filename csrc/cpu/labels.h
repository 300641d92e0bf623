#pragma once

#include <ATen/core/Tensor.h>

namespace bcmf::cpu {

// Writes label maps with `classes` in place of what does not count, and returns how many pixels are out of range.
int64_t read_labels(const at::Tensor& prediction, const at::Tensor& target, int64_t classes, int64_t ignore_index,
                    const at::Tensor& guess, const at::Tensor& truth);

// Adds to pairs (rows, columns): how many pixels have which a and b; neither below rows or columns.
void count_pairs(const at::Tensor& a, const at::Tensor& b, const at::Tensor& pairs);

}  // namespace bcmf::cpu
