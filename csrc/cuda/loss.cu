#include "loss.h"

#include <cuda_runtime_api.h>

#include "../device/launch.cuh"
#include "../device/loss.cuh"

namespace bcmf::cuda {
namespace {

using device::Count;
using device::kThreads;

int64_t tiles_of(const LossArgs& args) {
  return (args.N * args.H * args.W + device::kTilePixels - 1) / device::kTilePixels;
}

// How the scratch memory is divided: every part starts at a multiple of 8 bytes.
struct Scratch {
  double* partials;  // (2, tiles)
  Count* histogram;  // (kDigits,), with OHEM
  void* selection;   // Selection<Acc>, with OHEM
  int64_t bytes;

  Scratch(const LossArgs& args, void* memory) {
    char* at = static_cast<char*>(memory);
    partials = reinterpret_cast<double*>(at);
    at += 2 * tiles_of(args) * sizeof(double);
    histogram = reinterpret_cast<Count*>(at);
    at += args.ohem ? kDigits * sizeof(Count) : 0;
    selection = at;
    at += args.ohem ? sizeof(Selection<double>) : 0;
    bytes = at - static_cast<char*>(memory);
  }
};

// Finds the smallest loss that is kept, and sums up the kept ones. Every level is always launched: whether it is needed
// only the device knows.
template <typename Acc>
void ohem(const LossArgs& args, const Scratch& scratch, unsigned tiles, Stream stream) {
  auto* selection = static_cast<Selection<Acc>*>(scratch.selection);
  BCMF_LAUNCH(device::ohem_begin<Acc>, 1, kThreads, stream, args, scratch.partials, tiles, selection,
              scratch.histogram);
  for (int level = 0; level < kLevels<Acc>; ++level) {
    BCMF_LAUNCH(device::ohem_count<Acc>, tiles, kThreads, stream, args, selection, level, scratch.histogram);
    BCMF_LAUNCH(device::ohem_choose<Acc>, 1, kThreads, stream, selection, level, scratch.histogram);
  }
  BCMF_LAUNCH(device::ohem_sum_tiles<Acc>, tiles, kThreads, stream, args, selection, scratch.partials);
}

template <typename Scalar>
void forward(const LossArgs& args, void* memory, Stream stream) {
  using Acc = typename device::AccOf<Scalar>::type;
  const Scratch scratch(args, memory);
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  if (tiles > 0) {
    BCMF_LAUNCH(device::loss_forward_tiles<Scalar>, tiles, kThreads, stream, args, scratch.partials);
    if (args.ohem) ohem<Acc>(args, scratch, tiles, stream);
  }
  BCMF_LAUNCH(device::loss_finish<Acc>, 1, kThreads, stream, args, scratch.partials, tiles);
}

template <typename Scalar>
void backward(const LossArgs& args, Stream stream) {
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  if (tiles > 0) BCMF_LAUNCH(device::loss_backward_tiles<Scalar>, tiles, kThreads, stream, args);
}

}  // namespace

int64_t loss_scratch_bytes(const LossArgs& args) { return Scratch(args, nullptr).bytes; }

int loss_forward(const LossArgs& args, void* scratch, Stream stream) {
  switch (args.logits.type) {
    case LogitType::f16:
      forward<__half>(args, scratch, stream);
      break;
    case LogitType::bf16:
      forward<__nv_bfloat16>(args, scratch, stream);
      break;
    case LogitType::f32:
      forward<float>(args, scratch, stream);
      break;
    case LogitType::f64:
      forward<double>(args, scratch, stream);
      break;
  }
  return cudaGetLastError();
}

int loss_backward(const LossArgs& args, Stream stream) {
  switch (args.logits.type) {
    case LogitType::f16:
      backward<__half>(args, stream);
      break;
    case LogitType::bf16:
      backward<__nv_bfloat16>(args, stream);
      break;
    case LogitType::f32:
      backward<float>(args, stream);
      break;
    case LogitType::f64:
      backward<double>(args, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace bcmf::cuda
