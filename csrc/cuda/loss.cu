#include "cuda/loss.h"

#include <type_traits>

#include "cuda/kernels/argmax.cuh"
#include "cuda/kernels/dense.cuh"
#include "cuda/kernels/ohem.cuh"
#include "cuda/kernels/sparse.cuh"
#include "cuda/limits.h"
#include "cuda/with_scalar.cuh"

namespace bcmf::cuda {
namespace {

using namespace device;

// Cuts the scratch memory into arrays. Without memory (null) it only finds out how many bytes they take.
class Cutter {
 public:
  explicit Cutter(void* memory) : begin_(static_cast<char*>(memory)), at_(begin_) {}
  template <typename T>
  T* take(int64_t count) {
    char* part = at_;
    at_ += (count * sizeof(T) + 15) / 16 * 16;
    return reinterpret_cast<T*>(part);
  }
  int64_t bytes() const { return at_ - begin_; }

 private:
  char *begin_, *at_;
};

template <typename Acc>
struct ForwardScratch {
  double* partials;  // (rows_of(args), tiles)
  Count* histogram;  // (kDigits,), with OHEM
  Selection<Acc>* selection;
  Acc* scores;  // (steps, N, H, W), with BCL
  int64_t bytes;

  ForwardScratch(const LossArgs& args, void* memory) {
    Cutter cutter(memory);
    partials = cutter.take<double>(rows_of(args) * tiles_of(args));
    histogram = cutter.take<Count>(args.ohem ? kDigits : 0);
    selection = cutter.take<Selection<Acc>>(args.ohem ? 1 : 0);
    scores = cutter.take<Acc>(args.bcl_steps * args.N * args.H * args.W);
    bytes = cutter.bytes();
  }
};

// Holds the gradients of resampled logits, which low_gather_* then brings back to the logits' own size.
template <typename Acc>
struct BackwardScratch {
  bool by_tiles;  // there are no more logits than labels along either axis
  Cells down, across;
  Acc* gradients;  // (tiles, C, down, across), or (N, C, H, W)
  int64_t bytes;

  BackwardScratch(const LossArgs& args, void* memory) : by_tiles(args.h <= args.H && args.w <= args.W) {
    down = most(args.h, args.H, kRows, args.align_corners);
    across = most(args.w, args.W, kColumns, args.align_corners);
    const int64_t pixels = args.N * args.H * args.W, cells = tiles_of(args) * down.count * across.count;
    Cutter cutter(memory);
    gradients = cutter.take<Acc>(!args.resampled() ? 0 : args.C * (by_tiles ? cells : pixels));
    bytes = cutter.bytes();
  }

 private:
  static Cells most(int64_t in, int64_t out, int64_t step, bool align_corners) {
    Cells found = {0, 0};
    for (int64_t i = 0; i < out; i += step) {
      const Cells here = cells_between(i, i + step < out ? i + step - 1 : out - 1, in, out, align_corners);
      if (here.count > found.count) found = here;
    }
    return found;
  }
};

// Tells whether a block of the current device can have that much dynamic shared memory, beside the static memory of the
// kernels.
bool fits_shared(int64_t bytes) {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes + kMostStatic <= most;
}

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
  launch(ohem_sum<Acc>, tiles, kThreads, 0, stream, args, scratch.selection, scratch.partials);
}

template <typename Source>
int64_t staged_bytes(const LossArgs& args) {
  SharedCutter shared;
  Source::take(args, shared);
  return shared.bytes();
}

template <typename Source>
void launch_sums(const LossArgs& args, void* memory, Stream stream) {
  using Acc = typename Source::Acc;
  using Entries = typename Source::Entries;
  const ForwardScratch<Acc> scratch(args, memory);
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  if (tiles > 0) {
    const auto partials_of = [&](Sum entry) { return scratch.partials + int64_t{kSumRows + entry} * tiles; };
    launch(dense_forward<Source>, tiles, kThreads, staged_bytes<Source>(args), stream, args, scratch.scores,
           scratch.partials);
    if (args.ohem) ohem_select<Acc>(args, scratch, tiles, stream);
    if (args.bcl_steps > 0)
      launch(bcl_select<Entries>, tiles, kThreads, 0, stream, args, scratch.scores, partials_of(kBclSums));
    if (args.cpg_radius > 0) {
      SharedCutter shared;
      Window<Acc>(args, 0, shared);
      launch(cpg_compare<Entries>, tiles, kThreads, shared.bytes(), stream, args, partials_of(kCpgSum));
    }
  }
  launch(add_tiles<Acc>, kSums, kThreads, 0, stream, args, scratch.partials, tiles);
}

// Writes the dense part of the gradient to `sink`, then the sparse part of a few pixels, one by one, to `sparse_sink`.
template <typename Source, typename Sink, typename SparseSink>
void launch_backward(const LossArgs& args, const Sink& sink, const SparseSink& sparse_sink, Stream stream) {
  using Acc = typename Source::Acc;
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  if (tiles == 0) return;
  SharedCutter shared;
  Source::take(args, shared);
  shared.take<Acc>(Sink::scratch());
  launch(dense_backward<Source, Sink>, tiles, kThreads, shared.bytes(), stream, args, sink);
  if (args.bcl_flipped || args.cpg_radius > 0)
    launch(sparse_backward<typename Source::Entries, SparseSink>, tiles, kThreads,
           SparseMemory<Acc, SparseSink>(args).shared.bytes(), stream, args, sparse_sink);
}

template <typename Scalar>
void launch_resampled_backward(const LossArgs& args, const BackwardScratch<typename AccOf<Scalar>::type>& scratch,
                               Stream stream) {
  using Acc = typename AccOf<Scalar>::type;
  const unsigned blocks = blocks_for(args.N * args.C * args.h * args.w);
  if (blocks == 0) return;
  if (scratch.by_tiles) {
    const TileCells<Acc> sink = {scratch.gradients, scratch.down.count, scratch.across.count};
    launch_backward<Resampled<Scalar>>(args, sink, sink, stream);
    launch(low_gather_tiles<Scalar>, blocks, kThreads, 0, stream, args, scratch.gradients, scratch.down.count,
           scratch.across.count);
  } else {
    const int64_t map = args.H * args.W;
    const MapView view = {
        scratch.gradients, FloatType::f32, args.C * map, map, args.W, 1};  // StoreAny does not read the type
    const StoreAny<Acc, Acc> sink = {view};
    launch_backward<Resampled<Scalar>>(args, sink, sink, stream);
    launch(low_gather_pixels<Scalar>, blocks, kThreads, 0, stream, args, scratch.gradients);
  }
}

template <typename Source>
void launch_argmax(const LossArgs& args, void* classes, Stream stream) {
  const unsigned tiles = static_cast<unsigned>(tiles_of(args));
  if (tiles > 0) launch(argmax<Source>, tiles, kThreads, staged_bytes<Source>(args), stream, args, classes);
}

// A type that is passed as a value.
template <typename T>
struct Type {
  using type = T;
};

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
    else if (both(DirectPixels<Scalar>::can_read) && fits_shared(staged_bytes<DirectPixels<Scalar>>(args)))
      f(Type<DirectPixels<Scalar>>(), Type<StorePixels<Scalar>>());
    else
      f(Type<DirectAny<Scalar>>(), Type<StoreAny<Scalar, Acc>>());
  }
}

}  // namespace

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
    if (args.resampled()) return launch_sums<Resampled<Scalar>>(args, scratch, stream);
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
    const BackwardScratch<typename AccOf<Scalar>::type> scratch(args, memory);
    if (args.resampled()) return launch_resampled_backward<Scalar>(args, scratch, stream);
    with_layout<Scalar>(args, args.grad, [&](auto source, auto sink) {
      using Sink = typename decltype(sink)::type;
      const StoreAny<Scalar, typename Sink::Acc> sparse_sink = {args.grad};
      launch_backward<typename decltype(source)::type>(args, Sink{args.grad}, sparse_sink, stream);
    });
  });
  return cudaGetLastError();
}

bool loss_backward_fits(const LossArgs& args) {
  if (args.logits.type != FloatType::f64) return true;  // half as much is enough
  const bool to_cells = args.resampled() && BackwardScratch<double>(args, nullptr).by_tiles;
  return fits_shared(to_cells ? SparseMemory<double, TileCells<double>>(args).shared.bytes()
                              : SparseMemory<double, StoreAny<double, double>>(args).shared.bytes());
}

int upsample_argmax(const LossArgs& args, void* classes, Stream stream) {
  with_scalar(args.logits.type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    if (args.resampled()) return launch_argmax<Resampled<Scalar>>(args, classes, stream);
    with_layout<Scalar>(args, args.logits, [&](auto source, auto /*sink*/) {
      launch_argmax<typename decltype(source)::type>(args, classes, stream);
    });
  });
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace bcmf::cuda
