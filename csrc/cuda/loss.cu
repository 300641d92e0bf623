#include "cuda/loss.h"

#include <type_traits>

#include "cuda/kernels/argmax.cuh"
#include "cuda/kernels/dense.cuh"
#include "cuda/kernels/gather.cuh"
#include "cuda/kernels/ohem.cuh"
#include "cuda/kernels/quads.cuh"
#include "cuda/limits.h"
#include "cuda/scratch.h"
#include "cuda/with_scalar.cuh"

namespace bcmf::cuda {
namespace {

using namespace device;

template <typename Acc>
struct ForwardScratch {
  double* partials;  // (rows_of(args), tiles)
  Count* histogram;  // (kDigits,), with OHEM
  Selection<Acc>* selection;
  Scores<Acc> scores;  // of BCL's steps
  int64_t bytes;

  ForwardScratch(const LossArgs& args, void* memory) {
    Cutter cutter(memory);
    partials = cutter.take<double>(rows_of(args) * tiles_of(args));
    histogram = cutter.take<Count>(args.ohem ? kDigits : 0);
    selection = cutter.take<Selection<Acc>>(args.ohem ? 1 : 0);
    scores.map = cutter.take<Acc>(args.bcl_steps * args.N * args.H * args.W);
    scores.patches = cutter.take<PatchScores>(args.bcl_steps * Marks::patch_count(args));
    bytes = cutter.bytes();
  }
};

// Tells whether there are fewer logits than labels, and no more along either axis. In fp64, which is for checks, their
// kernels would take too much shared memory.
bool is_upsampled(const LossArgs& args) {
  return args.resampled() && args.h <= args.H && args.w <= args.W && args.logits.type != FloatType::f64;
}

// Tells whether a block of the current device can have that much dynamic shared memory, beside the static memory of the
// kernels.
bool fits_shared(int64_t bytes) {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes + kMostStatic <= most;
}

// Returns how much dynamic shared memory that is.
template <typename Memory>
int64_t bytes_of(const LossArgs& args) {
  SharedCutter shared;
  Memory(args, shared);
  return shared.bytes();
}

// Tells whether dense_backward_quads takes these logits. On small GPUs CPG's largest window leaves it too little shared
// memory.
bool has_quads(const LossArgs& args) { return is_upsampled(args) && fits_shared(bytes_of<QuadMemory<float>>(args)); }

// Holds the gradients of resampled logits, which low_gather_* then brings back to the logits' own size.
template <typename Acc>
struct BackwardScratch {
  Acc* gradients;  // (tiles, C, cells_down, cells_across) of quads, (N, C, H, W) of others
  int64_t bytes;

  BackwardScratch(const LossArgs& args, void* memory) {
    const int64_t cells = most_cells(kRows, args.h, args.H) * most_cells(kColumns, args.w, args.W);
    Cutter cutter(memory);
    gradients = cutter.take<Acc>(!args.resampled() ? 0
                                 : has_quads(args) ? args.C * tiles_of(args) * cells
                                                   : args.C * args.N * args.H * args.W);
    bytes = cutter.bytes();
  }
};

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

// Finds the smallest loss that is kept, and sums up the kept ones. All levels are always launched, because only the
// device knows whether they are needed.
template <typename Acc>
void ohem_select(const LossArgs& args, const ForwardScratch<Acc>& scratch, unsigned tiles, Stream stream) {
  launch(ohem_begin<Acc>, 1, kThreads, 0, stream, args, scratch.partials, tiles, scratch.selection, scratch.histogram);
  for (int level = 0; level < kLevels<Acc>; ++level) {
    launch(ohem_count<Acc>, tiles < 512 ? tiles : 512, kThreads, 0, stream, args, scratch.selection, level,
           scratch.histogram);
    launch(ohem_choose<Acc>, 1, kThreads, 0, stream, scratch.selection, level, scratch.histogram);
  }
  launch(ohem_sum<Acc>, tiles, kThreads, 0, stream, args, Marks(args), scratch.selection, scratch.partials);
}

// Calls f with a label of that type.
template <typename F>
void with_label(LabelType type, F f) {
  switch (type) {
    case LabelType::u8:
      return f(uint8_t{});
    case LabelType::i16:
      return f(int16_t{});
    case LabelType::i32:
      return f(int32_t{});
    case LabelType::i64:
      return f(int64_t{});
  }
}

template <typename Source>
void launch_sums(const LossArgs& args, void* memory, Stream stream) {
  using Acc = typename Source::Acc;
  using Entries = typename Source::Entries;
  const ForwardScratch<Acc> scratch(args, memory);
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  if (tiles > 0) {
    const Marks marks(args);
    const auto partials_of = [&](Sum entry) { return scratch.partials + int64_t{kSumRows + entry} * tiles; };
    with_label(args.labels.type, [&](auto label) {
      launch(read_labels<decltype(label)>, tiles, kThreads, 0, stream, args, marks, partials_of(kValidPixels));
    });
    SharedCutter shared;
    const ForwardMemory<Source> shared_memory(args, shared);
    launch(dense_forward<Source>, tiles, kThreads, shared.bytes(), stream, args, marks, shared_memory, scratch.scores,
           scratch.partials);
    if (args.ohem) ohem_select<Acc>(args, scratch, tiles, stream);
    if (args.bcl_steps > 0)
      launch(bcl_select<Entries>, (tiles + kWarps - 1) / kWarps, kThreads, 0, stream, args, marks, scratch.scores,
             partials_of(kBclSums));
    if (args.cpg_radius > 0) {
      SharedCutter shared_by_window;
      const WindowMemory<Acc> window(args, 0, shared_by_window);
      launch(cpg_compare<Entries>, tiles, kThreads, shared_by_window.bytes(), stream, args, marks, window,
             partials_of(kCpgSum));
    }
  }
  launch(add_tiles<Acc>, kSums, kThreads, 0, stream, args, scratch.partials, tiles);
}

template <typename Source, typename Sink>
void launch_backward(const LossArgs& args, const Sink& sink, Stream stream) {
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  SharedCutter shared;
  const BackwardMemory<Source> memory(args, shared);
  if (tiles > 0)
    launch(dense_backward<Source, Sink>, tiles, kThreads, shared.bytes(), stream, args, Marks(args), memory, sink);
}

template <typename Scalar>
void launch_quads(const LossArgs& args, float* gradients, Stream stream) {
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  SharedCutter shared;
  const QuadMemory<float> memory(args, shared);
  if (tiles > 0)
    launch(dense_backward_quads<Scalar>, tiles, kThreads, shared.bytes(), stream, args, Marks(args), memory, gradients);
  const unsigned blocks = blocks_for(gathering_threads(args));
  if (blocks > 0)
    launch(low_gather_tiles<Scalar>, blocks, kThreads, 0, stream, args, gradients, most_cells(kRows, args.h, args.H),
           most_cells(kColumns, args.w, args.W));
}

template <typename Scalar>
void launch_resampled_backward(const LossArgs& args, void* memory, Stream stream) {
  using Acc = typename AccOf<Scalar>::type;
  const BackwardScratch<Acc> scratch(args, memory);
  if constexpr (!std::is_same_v<Scalar, double>)
    if (has_quads(args)) return launch_quads<Scalar>(args, scratch.gradients, stream);
  const int64_t map = args.H * args.W;
  const MapView view = {
      scratch.gradients, FloatType::f32, args.C * map, map, args.W, 1};  // StoreAny does not read the type
  launch_backward<Resampled<Scalar>>(args, StoreAny<Acc, Acc>{view}, stream);
  const unsigned blocks = blocks_for(args.N * args.C * args.h * args.w);
  if (blocks > 0) launch(low_gather_pixels<Scalar>, blocks, kThreads, 0, stream, args, scratch.gradients);
}

template <typename Source>
void launch_argmax(const LossArgs& args, void* classes, Stream stream) {
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  SharedCutter shared;
  const auto staged = Source::take(args, shared);
  if (tiles > 0) launch(argmax<Source>, tiles, kThreads, shared.bytes(), stream, args, staged, classes);
}

// A type that is passed as a value.
template <typename T>
struct Type {
  using type = T;
};

// Tells whether the blocks of both dense kernels get the shared memory that they take with this source.
template <typename Source>
bool fits_dense(const LossArgs& args) {
  return fits_shared(bytes_of<ForwardMemory<Source>>(args)) && fits_shared(bytes_of<BackwardMemory<Source>>(args));
}

// Calls f(source, sink) with the Types that are fastest for logits and gradients of this layout and of the labels'
// size. For fp64 these are always the general ones: the others are not compiled.
template <typename Scalar, typename F>
void with_layout(const LossArgs& args, const MapView& grad, F f) {
  using Acc = typename AccOf<Scalar>::type;
  if constexpr (std::is_same_v<Scalar, Acc> && sizeof(Acc) == 8) {
    f(Type<DirectAny<Scalar>>(), Type<StoreAny<Scalar, Acc>>());
  } else {
    const auto both = [&](auto can_read) { return can_read(args.logits, args) && can_read(grad, args); };
    if (both(DirectRows<Scalar>::can_read))
      f(Type<DirectRows<Scalar>>(), Type<StoreRows<Scalar>>());
    else if (both(DirectPixels<Scalar>::can_read) && fits_dense<DirectPixels<Scalar>>(args))
      f(Type<DirectPixels<Scalar>>(), Type<StorePixels<Scalar>>());
    else
      f(Type<DirectAny<Scalar>>(), Type<StoreAny<Scalar, Acc>>());
  }
}

// Calls f(source) with the Type for logits of another size.
template <typename Scalar, typename F>
void with_resampled(const LossArgs& args, F f) {
  if constexpr (!std::is_same_v<Scalar, double>)
    if (is_upsampled(args)) return f(Type<Upsampled<Scalar>>());
  f(Type<Resampled<Scalar>>());
}

}  // namespace

int64_t loss_stats_maps(const LossArgs& args) { return stats_maps(args); }

int64_t loss_mark_bytes(const LossArgs& args) { return Marks::bytes(args); }

int64_t loss_sums_scratch(const LossArgs& args) {
  const bool wide = args.logits.type == FloatType::f64;
  return wide ? ForwardScratch<double>(args, nullptr).bytes : ForwardScratch<float>(args, nullptr).bytes;
}

int64_t loss_backward_scratch(const LossArgs& args) {
  const bool wide = args.logits.type == FloatType::f64;
  return wide ? BackwardScratch<double>(args, nullptr).bytes : BackwardScratch<float>(args, nullptr).bytes;
}

int loss_sums(const LossArgs& args, void* scratch, Stream stream) {
  with_scalar(args.logits.type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    if (args.resampled())
      return with_resampled<Scalar>(
          args, [&](auto source) { launch_sums<typename decltype(source)::type>(args, scratch, stream); });
    with_layout<Scalar>(args, args.logits, [&](auto source, auto /*sink*/) {
      launch_sums<typename decltype(source)::type>(args, scratch, stream);
    });
  });
  return cudaGetLastError();
}

int loss_finish(const LossArgs& args, FloatType acc, Stream stream) {
  if (acc == FloatType::f64)
    launch(device::loss_finish<double>, 1, 1, 0, stream, args);
  else
    launch(device::loss_finish<float>, 1, 1, 0, stream, args);
  return cudaGetLastError();
}

int loss_backward(const LossArgs& args, void* memory, Stream stream) {
  with_scalar(args.logits.type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    if (args.resampled()) return launch_resampled_backward<Scalar>(args, memory, stream);
    with_layout<Scalar>(args, args.grad, [&](auto source, auto sink) {
      launch_backward<typename decltype(source)::type>(args, typename decltype(sink)::type{args.grad}, stream);
    });
  });
  return cudaGetLastError();
}

bool loss_backward_fits(const LossArgs& args) {
  if (args.logits.type != FloatType::f64) return true;  // half as much is enough
  return fits_shared(bytes_of<BackwardMemory<DirectAny<double>>>(args));
}

int upsample_argmax(const LossArgs& args, void* classes, Stream stream) {
  with_scalar(args.logits.type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    if (args.resampled())
      return with_resampled<Scalar>(
          args, [&](auto source) { launch_argmax<typename decltype(source)::type>(args, classes, stream); });
    with_layout<Scalar>(args, args.logits, [&](auto source, auto /*sink*/) {
      launch_argmax<typename decltype(source)::type>(args, classes, stream);
    });
  });
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace bcmf::cuda
