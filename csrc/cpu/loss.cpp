#include "loss.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <vector>

#include "loss_kernel.h"

namespace bcmf::cpu {
namespace {

// torch's own choice, so that ATEN_CPU_CAPABILITY speaks for these kernels too.
const LossKernels& kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return loss_kernels_avx512;
  if (capability == "AVX2") return loss_kernels_avx2;
#endif
  return loss_kernels_baseline;
}

size_t acc_size(const LossArgs& args) { return args.logits.type == LogitType::f64 ? sizeof(double) : sizeof(float); }

template <typename F>
void for_tiles(const LossArgs& args, F run) {
  const int64_t tiles = args.N * tiles_per_image(args);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(scratch_size(args) * acc_size(args) + 63);
    const auto aligned = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
    run(begin, end, reinterpret_cast<void*>(aligned));
  });
}

void store(void* to, double value, bool is_double) {
  if (is_double)
    *static_cast<double*>(to) = value;
  else
    *static_cast<float*>(to) = static_cast<float>(value);
}

}  // namespace

const char* loss_capability() {
  const LossKernels* k = &kernels();
#if defined(__x86_64__)
  if (k == &loss_kernels_avx512) return "AVX512";
  if (k == &loss_kernels_avx2) return "AVX2";
#endif
  return "baseline";
}

int64_t loss_forward(const LossArgs& args) {
  std::vector<LossPartial> partials(args.N * tiles_per_image(args));
  for_tiles(args, [&](int64_t begin, int64_t end, void* scratch) {
    kernels().forward(args, begin, end, scratch, partials.data());
  });
  LossPartial sum = {0, 0, 0};
  for (const LossPartial& partial : partials) {
    sum.weighted_nll += partial.weighted_nll;
    sum.weight += partial.weight;
    sum.bad_labels += partial.bad_labels;
  }
  const bool is_double = args.logits.type == LogitType::f64;
  store(args.denominator, sum.weight, is_double);
  store(args.total, sum.weight != 0 ? sum.weighted_nll / sum.weight : 0, is_double);
  return sum.bad_labels;
}

void loss_backward(const LossArgs& args) {
  for_tiles(args, [&](int64_t begin, int64_t end, void* scratch) { kernels().backward(args, begin, end, scratch); });
}

}  // namespace bcmf::cpu
