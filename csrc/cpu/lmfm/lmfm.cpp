#include "cpu/lmfm/lmfm.h"

#include <algorithm>
#include <memory>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace bcmf::cpu {
namespace {

// In channels_last, where the channels of a pixel are neighbours in memory, a task has several units: four if there are
// enough tasks for all threads.
int64_t units_of_a_task(const NormReluArgs& args, int branches, int64_t lanes, int64_t parts) {
  for (int b = 0; b < branches; ++b)
    if (args.branch[b].out.stride_c != 1) return 1;
  int64_t units = 0;
  for (int b = 0; b < branches; ++b) units += (args.branch[b].C + lanes - 1) / lanes;
  return std::clamp<int64_t>(units * parts / (2 * static_cast<int64_t>(get_num_threads())), 1, 4);
}

// Runs a kernel on all tasks of the first `branches` branches.
template <typename Acc>
void run_tasks(const NormReluArgs& args, const LmfmKernels<Acc>& kernels, typename LmfmKernels<Acc>::Kernel kernel,
               int branches, int64_t scratch_of_a_lane, bool backward) {
  const int64_t parts = args.N / images_at_once(args, backward);
  const int64_t units = units_of_a_task(args, branches, kernels.lanes, parts), channels = units * kernels.lanes;
  int64_t tasks = 0;
  for (int b = 0; b < branches; ++b) tasks += parts * ((args.branch[b].C + channels - 1) / channels);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<char[]> scratch(new char[channels * scratch_of_a_lane * sizeof(Acc) + 63]);
    const auto aligned = (reinterpret_cast<uintptr_t>(scratch.get()) + 63) / 64 * 64;
    kernel(args, units, begin, end, reinterpret_cast<Acc*>(aligned));
  });
}

template <typename F>
void with_kernels(const NormReluArgs& args, F f) {
  args.type == FloatType::f64 ? f(isa().lmfm.f64) : f(isa().lmfm.f32);
}

}  // namespace

void pool_forward(const NormReluArgs& args) {
  with_kernels(args, [&](const auto& k) { run_tasks(args, k, k.pool_forward, 1, pool_scratch(args, false), false); });
}
void pool_backward(const NormReluArgs& args) {
  with_kernels(args, [&](const auto& k) { run_tasks(args, k, k.pool_backward, 1, pool_scratch(args, true), true); });
}
void add_forward(const NormReluArgs& args) {
  with_kernels(
      args, [&](const auto& k) { run_tasks(args, k, k.add_forward, args.branches, add_scratch(args, false), false); });
}
void add_backward(const NormReluArgs& args) {
  with_kernels(
      args, [&](const auto& k) { run_tasks(args, k, k.add_backward, args.branches, add_scratch(args, true), true); });
}

}  // namespace bcmf::cpu
