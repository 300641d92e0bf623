#include "cuda/lmfm/lmfm.h"

#include <type_traits>

#include "cuda/lmfm/kernels.cuh"
#include "cuda/with_scalar.cuh"

namespace bcmf::cuda {
namespace {

using namespace device;

// A block works on this many channels in channels_last, where they are neighbours in memory, and on one otherwise.
constexpr int kSideBySide = 4;
constexpr int kPixelsOfAThread = 4;  // in eval mode, where several blocks share the pixels of a channel

bool side_by_side(const NormReluArgs& args) {
  for (int b = 0; b < args.branches; ++b)
    if (args.branch[b].out.stride_c != 1) return false;
  return true;
}

// Calls f(scalar, side) with a value of the maps' dtype, and with the number of a block's channels as a constant.
template <typename F>
void with_types(const NormReluArgs& args, F f) {
  with_scalar(args.type, [&](auto scalar) {
    if (side_by_side(args))
      f(scalar, std::integral_constant<int, kSideBySide>());
    else
      f(scalar, std::integral_constant<int, 1>());
  });
}

// The blocks of a launch, of which `parts` share the pixels of the same channels, and the bytes of scratch memory that
// all of them need together.
struct Grid {
  unsigned blocks, parts, pixels_of_a_part;
  int64_t scratch;
};

template <typename Acc>
Grid pool_grid(const NormReluArgs& args, int side, bool backward) {
  const unsigned parts = args.training || backward ? 1 : static_cast<unsigned>(args.N);  // an image each
  const unsigned blocks = static_cast<unsigned>(groups_of(args.branch[0].C, side)) * parts;
  return {blocks, parts, 0, blocks * pool_block_bytes<Acc>(args, side, parts)};
}

template <typename Acc>
Grid add_grid(const NormReluArgs& args, int side, bool backward) {
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
  with_types(args, [&](auto x, auto side) { bytes = pool_grid<Acc<decltype(x)>>(args, side, backward).scratch; });
  return bytes;
}
int64_t add_scratch(const NormReluArgs& args, bool backward) {
  int64_t bytes = 0;
  with_types(args, [&](auto x, auto side) { bytes = add_grid<Acc<decltype(x)>>(args, side, backward).scratch; });
  return bytes;
}

int pool_forward(const NormReluArgs& args, void* scratch, Stream stream) {
  with_types(args, [&](auto x, auto side) {
    using Scalar = decltype(x);
    const Grid grid = pool_grid<Acc<Scalar>>(args, side, false);
    launch(device::pool_forward<Scalar, side>, grid.blocks, kNormThreads, 0, stream, args, grid.parts,
           static_cast<char*>(scratch));
  });
  return cudaGetLastError();
}
int pool_backward(const NormReluArgs& args, void* scratch, Stream stream) {
  with_types(args, [&](auto x, auto side) {
    using Scalar = decltype(x);
    const Grid grid = pool_grid<Acc<Scalar>>(args, side, true);
    launch(device::pool_backward<Scalar, side>, grid.blocks, kNormThreads, 0, stream, args,
           static_cast<char*>(scratch));
  });
  return cudaGetLastError();
}

int add_forward(const NormReluArgs& args, void* scratch, Stream stream) {
  with_types(args, [&](auto x, auto side) {
    using Scalar = decltype(x);
    const Grid grid = add_grid<Acc<Scalar>>(args, side, false);
    launch(device::add_forward<Scalar, side>, grid.blocks, kNormThreads, 0, stream, args, grid.parts,
           grid.pixels_of_a_part, static_cast<char*>(scratch));
  });
  return cudaGetLastError();
}
int add_backward(const NormReluArgs& args, void* scratch, Stream stream) {
  with_types(args, [&](auto x, auto side) {
    using Scalar = decltype(x);
    const Grid grid = add_grid<Acc<Scalar>>(args, side, true);
    launch(device::add_backward<Scalar, side>, grid.blocks, kNormThreads, 0, stream, args, static_cast<char*>(scratch));
  });
  return cudaGetLastError();
}

}  // namespace bcmf::cuda
