// bcmf::srm on the CPU.

#include <algorithm>
#include <vector>

#include "cpu/axis.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "srm_tensors.h"

namespace bcmf {
namespace {

using namespace cpu;

template <typename Acc>
struct Axes {
  Axis<Acc> down, across;
  explicit Axes(const SrmArgs& args) : down(args.h, args.H, false), across(args.w, args.W, false) {}
};

template <typename Acc>
void run_forward(const SrmArgs& args, const SrmKernels<Acc>& kernels) {
  const Axes<Acc> axes(args);
  const SrmWork<Acc> work = {axes.down.table(), axes.across.table()};
  parallel_for(0, args.N * args.H, 1, [&](int64_t begin, int64_t end) { kernels.forward(args, work, begin, end); });
}

// How many channels of an image a thread adds up: all of them, unless there are more threads than images.
int64_t channels_of_a_task(const SrmArgs& args) {
  constexpr int64_t kCacheLine = 32;  // entries of 16 bits, of which two threads do not write the same line
  const int64_t tasks = std::max<int64_t>(1, get_num_threads() / args.N);
  return ((args.C + tasks - 1) / tasks + kCacheLine - 1) / kCacheLine * kCacheLine;
}

template <typename Acc>
void run_backward(const SrmArgs& args, const SrmKernels<Acc>& kernels, const Kind& kind) {
  const Axes<Acc> axes(args);
  const int64_t rows = args.N * args.H, pixels = rows * args.W, entries = args.N * args.C * args.h * args.w;
  const bool narrow = args.type == FloatType::f16 || args.type == FloatType::bf16;
  const int64_t count = (2 * kOffsets + kNeighbours) * pixels + (narrow ? entries : 0);
  const Tensor memory = make_dense({count}, {1}, kind);
  Acc* const scratch = static_cast<Acc*>(memory.data_ptr());
  SrmWork<Acc> work = {axes.down.table(), axes.across.table(), scratch};
  work.pulls = work.positions + kOffsets * pixels;
  work.weights = work.pulls + kOffsets * pixels;
  work.sums = narrow ? work.weights + kNeighbours * pixels : static_cast<Acc*>(args.grad_low);
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { kernels.find_pulls(args, work, begin, end); });
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(kOffsets * (args.W + 2));
    kernels.gather_offsets(args, work, begin, end, sums.data());
  });
  const int64_t size = channels_of_a_task(args), tasks = (args.C + size - 1) / size;
  parallel_for(0, args.N * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task % tasks * size;
      kernels.add_low(args, work, task / tasks, c, std::min(c + size, args.C));
    }
  });
}

void forward(const SrmArgs& args, const Tensor&) {
  args.type == FloatType::f64 ? run_forward(args, isa().srm.f64) : run_forward(args, isa().srm.f32);
}

void backward(const SrmArgs& args, const Tensor& like) {
  const Kind kind = kind_of(like).with(acc_type(like));
  args.type == FloatType::f64 ? run_backward(args, isa().srm.f64, kind) : run_backward(args, isa().srm.f32, kind);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bcmf, CPU, m) { register_srm<forward, backward>(m); }

}  // namespace bcmf
