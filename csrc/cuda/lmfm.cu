#include "lmfm.h"

#include <type_traits>

#include "../device/lmfm.cuh"
#include "launcher.cuh"

namespace bcmf::cuda {
namespace {

using namespace device;

// Channels of a block: neighbours in memory where there are any, in channels_last.
constexpr int kSideBySide = 4;
constexpr int kPixelsOfAThread = 4;  // in eval mode, where blocks share the pixels

bool side_by_side(const NormReluArgs& args) {
  for (int b = 0; b < args.branches; ++b)
    if (args.branch[b].out.stride_c != 1) return false;
  return true;
}

// f(scalar, side): of the maps' dtype, and a constant with the channels of a block.
template <typename F>
void with_types(const NormReluArgs& args, F f) {
  with_scalar(args.type, [&](auto scalar) {
    if (side_by_side(args))
      f(scalar, std::integral_constant<int, kSideBySide>());
    else
      f(scalar, std::integral_constant<int, 1>());
  });
}

// Blocks, of which `parts` share the pixels of their channels, and the bytes of scratch memory of all.
struct Plan {
  unsigned blocks, parts, pixels_of_a_part;
  int64_t scratch;
};

template <typename Acc>
Plan plan_pools(const NormReluArgs& args, int side, bool backward) {
  const unsigned parts = args.training || backward ? 1 : static_cast<unsigned>(args.N);  // an image each
  const unsigned blocks = static_cast<unsigned>(groups_of(args.branch[0].C, side)) * parts;
  return {blocks, parts, 0, blocks * pool_block_bytes<Acc>(args, side, parts)};
}

template <typename Acc>
Plan plan_sums(const NormReluArgs& args, int side, bool backward) {
  const int64_t all = args.N * args.branch[0].H * args.branch[0].W;
  const int64_t each = args.training || backward ? all : kPixelsOfAThread * kNormThreads / side;
  const int64_t parts = (all + each - 1) / each;
  int64_t blocks = 0;
  for (int b = 0; b < args.branches; ++b) blocks += groups_of(args.branch[b].C, side) * parts;
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(parts), static_cast<unsigned>(each),
          blocks * add_block_bytes<Acc>(args, side, backward)};
}

template <typename Scalar>
using Acc = typename AccOf<Scalar>::type;

}  // namespace

int64_t pool_scratch(const NormReluArgs& args, bool backward) {
  int64_t bytes = 0;
  with_types(args, [&](auto x, auto side) { bytes = plan_pools<Acc<decltype(x)>>(args, side, backward).scratch; });
  return bytes;
}
int64_t add_scratch(const NormReluArgs& args, bool backward) {
  int64_t bytes = 0;
  with_types(args, [&](auto x, auto side) { bytes = plan_sums<Acc<decltype(x)>>(args, side, backward).scratch; });
  return bytes;
}

int pool_forward(const NormReluArgs& args, void* scratch, Stream stream) {
  with_types(args, [&](auto x, auto side) {
    using Scalar = decltype(x);
    const Plan plan = plan_pools<Acc<Scalar>>(args, side, false);
    launch(device::pool_forward<Scalar, side>, plan.blocks, kNormThreads, 0, stream, args, plan.parts,
           static_cast<char*>(scratch));
  });
  return cudaGetLastError();
}
int pool_backward(const NormReluArgs& args, void* scratch, Stream stream) {
  with_types(args, [&](auto x, auto side) {
    using Scalar = decltype(x);
    const Plan plan = plan_pools<Acc<Scalar>>(args, side, true);
    launch(device::pool_backward<Scalar, side>, plan.blocks, kNormThreads, 0, stream, args,
           static_cast<char*>(scratch));
  });
  return cudaGetLastError();
}

int add_forward(const NormReluArgs& args, void* scratch, Stream stream) {
  with_types(args, [&](auto x, auto side) {
    using Scalar = decltype(x);
    const Plan plan = plan_sums<Acc<Scalar>>(args, side, false);
    launch(device::add_forward<Scalar, side>, plan.blocks, kNormThreads, 0, stream, args, plan.parts,
           plan.pixels_of_a_part, static_cast<char*>(scratch));
  });
  return cudaGetLastError();
}
int add_backward(const NormReluArgs& args, void* scratch, Stream stream) {
  with_types(args, [&](auto x, auto side) {
    using Scalar = decltype(x);
    const Plan plan = plan_sums<Acc<Scalar>>(args, side, true);
    launch(device::add_backward<Scalar, side>, plan.blocks, kNormThreads, 0, stream, args, static_cast<char*>(scratch));
  });
  return cudaGetLastError();
}

}  // namespace bcmf::cuda
