#include "cuda/srm.h"

#include <type_traits>

#include "cuda/kernels/srm.cuh"
#include "cuda/scratch.h"
#include "cuda/with_scalar.cuh"

namespace bcmf::cuda {
namespace {

using namespace device;

template <typename Acc>
struct Scratch : SrmScratch<Acc> {
  int64_t bytes;

  Scratch(const SrmArgs& args, void* memory) {
    const int64_t pixels = args.N * args.H * args.W;
    Cutter cutter(memory);
    this->reads = cutter.take<KeptReads<Acc>>(pixels);
    this->pulls = cutter.take<Acc>(kOffsets * pixels);
    this->weights = cutter.take<Acc>(kNeighbours * pixels);
    this->bounds = cutter.take<CellBounds>(args.N * chunks_of(args));
    this->listed = cutter.take<int>(pixels);
    this->starts = cutter.take<int>(args.N * (args.h * args.w + 1));
    bytes = cutter.bytes();
  }
};

// Calls f(scalar, side) with a value of the maps' dtype, and with the number of channels that a thread takes at once as
// a constant: 16 bytes of fp32, or one channel where not all pixels begin at multiples of so many.
template <typename F>
void with_types(const SrmArgs& args, F f) {
  with_scalar(args.type, [&](auto scalar) {
    constexpr int kSide = sizeof(scalar) == sizeof(double) ? 2 : 4;
    bool aligned = args.C % kSide == 0;
    for (const void* map :
         {args.low, args.residual, static_cast<const void*>(args.out), static_cast<const void*>(args.grad_low)})
      aligned = aligned && reinterpret_cast<uintptr_t>(map) % (kSide * sizeof(scalar)) == 0;
    if (aligned)
      f(scalar, std::integral_constant<int, kSide>());
    else
      f(scalar, std::integral_constant<int, 1>());
  });
}

unsigned blocks_for(int64_t tasks, int64_t of_a_block) {
  return static_cast<unsigned>((tasks + of_a_block - 1) / of_a_block);
}

}  // namespace

int64_t srm_scratch(const SrmArgs& args) {
  return args.type == FloatType::f64 ? Scratch<double>(args, nullptr).bytes : Scratch<float>(args, nullptr).bytes;
}

int srm_forward(const SrmArgs& args, Stream stream) {
  with_types(args, [&](auto scalar, auto side) {
    launch(device::srm_forward<decltype(scalar), side>, blocks_for(args.N * args.H * args.W, kSrmPixels), kThreads, 0,
           stream, args);
  });
  return cudaGetLastError();
}

int srm_backward(const SrmArgs& args, void* memory, Stream stream) {
  with_types(args, [&](auto scalar, auto side) {
    using Scalar = decltype(scalar);
    using Acc = typename AccOf<Scalar>::type;
    const SrmScratch<Acc> scratch = Scratch<Acc>(args, memory);
    launch(srm_pulls<Scalar, side>, static_cast<unsigned>(args.N * chunks_of(args)), kThreads, 0, stream, args,
           scratch);
    launch(srm_offsets<Scalar>, blocks_for(args.N * args.H * args.W, kThreads), kThreads, 0, stream, args, scratch);
    SharedCutter shared;
    const auto counts = shared.take<int>(kWarps * kListedCells);
    launch(srm_list<Acc>, static_cast<unsigned>(args.N * ranges_of(args)), kThreads, shared.bytes(), stream, args,
           scratch, counts);
    launch(srm_low<Scalar, side>, blocks_for(low_tasks<side>(args), kWarps), kThreads, 0, stream, args, scratch);
  });
  return cudaGetLastError();
}

}  // namespace bcmf::cuda
