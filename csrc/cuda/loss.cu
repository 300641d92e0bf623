#include "loss.h"

#include <cuda_runtime_api.h>

#include "../device/launch.cuh"
#include "../device/loss.cuh"

namespace bcmf::cuda {
namespace {

int64_t tiles(const LossArgs& args) {
  return (args.N * args.H * args.W + device::kTilePixels - 1) / device::kTilePixels;
}

template <typename Scalar>
void forward(const LossArgs& args, double* scratch, Stream stream) {
  using Acc = typename device::AccOf<Scalar>::type;
  const unsigned grid = static_cast<unsigned>(tiles(args));
  if (grid > 0) BCMF_LAUNCH(device::loss_forward_tiles<Scalar>, grid, device::kThreads, stream, args, scratch);
  BCMF_LAUNCH(device::loss_finish<Acc>, 1, device::kThreads, stream, args, scratch, tiles(args));
}

template <typename Scalar>
void backward(const LossArgs& args, Stream stream) {
  const unsigned grid = static_cast<unsigned>(tiles(args));
  if (grid > 0) BCMF_LAUNCH(device::loss_backward_tiles<Scalar>, grid, device::kThreads, stream, args);
}

}  // namespace

int64_t loss_scratch_size(const LossArgs& args) { return 2 * tiles(args); }

int loss_forward(const LossArgs& args, double* scratch, Stream stream) {
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
