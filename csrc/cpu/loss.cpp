#include "cpu/loss.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "common/geometry.h"
#include "common/select.h"
#include "common/terms.h"
#include "cpu/axis.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace bcmf::cpu {
namespace {

template <typename Acc>
const LossKernels<Acc>& kernels() {
  if constexpr (std::is_same_v<Acc, double>) return isa().loss.f64;
  if constexpr (std::is_same_v<Acc, float>) return isa().loss.f32;
}

constexpr int64_t kHalves = 1 << 18;   // values of LossWork::halves, unless one image has more
constexpr int64_t kMaxBlockRows = 16;  // enough blocks for all threads, however few logits there are

struct Release {  // frees what Work::allocate got
  size_t bytes = 0;
  void operator()(void* memory) const { bytes >= kLarge ? free_large(memory) : ::operator delete(memory); }
};

template <typename Acc>
struct EdgeRunStore {  // owns the memory of a RowEdgeRuns
  std::vector<EdgeRun> runs;
  std::vector<Acc> residuals = std::vector<Acc>(kRunWindow);  // begins with zeros
};

// Owns the memory of a LossWork. Each part of it exists only as long as a step needs it.
template <typename Acc>
class Work {
 public:
  LossWork<Acc> view = {};

  explicit Work(const LossArgs& args) : args_(args) {
    view.stream = args.N * args.C * args.h * args.w * sizeof(Acc) >= kLarge && args.logits.type == FloatType::f32;
    view.nll = args.ohem ? static_cast<Acc*>(args.nll) : nullptr;
    view.pitch = tile_pixels(args.C);
    view.strip = std::min(view.pitch, args.W);
    view.rows_per_tile = args.resampled() ? 1 : std::max<int64_t>(1, view.pitch / args.W);
    if (args.resampled()) {
      vertical_ = std::make_unique<Axis<Acc>>(args.h, args.H, args.align_corners);
      horizontal_ = std::make_unique<Axis<Acc>>(args.w, args.W, args.align_corners);
      view.vertical = vertical_->table();
      view.horizontal = horizontal_->table();
    }
    cut_into_blocks();
  }

  void read_ids() {
    view.ids = allocate(ids_);
    for_rows([&](int64_t begin, int64_t end) { kernels<Acc>().read_ids(args_, view, begin, end); });
    for (int s = 0; s < args_.bcl_steps; ++s)
      for (int64_t x = 0; x < args_.W; ++x)
        column_flip_.push_back(static_cast<int32_t>(flip_index<int64_t>(x, args_.bcl_step[s], args_.W)));
    view.column_flip = column_flip_.data();
  }

  void allocate_scores() { view.scores = allocate(scores_, args_.bcl_steps); }
  void free_scores() { scores_.reset(); }

  // Calls f(n, to) for some images of the batch at a time, with memory for their halves, so that these stay in the
  // cache.
  template <typename F>
  void for_images_with_halves(F f) {
    const int64_t image = view.blocks * 2 * args_.C * args_.w;
    const int64_t together =
        std::clamp<int64_t>(kHalves / std::max<int64_t>(image, 1), 1, std::max<int64_t>(args_.N, 1));
    const std::unique_ptr<Acc[]> halves(new Acc[together * image]);  // each block begins with zeros
    view.halves = halves.get();
    for (int64_t n = 0; n < args_.N; n += together) {
      view.first_block = n * view.blocks;
      f(n, std::min(n + together, args_.N));
    }
  }

  // Calls f(begin, end, scratch) for the blocks of images n..to of the batch.
  template <typename F>
  void for_blocks(int64_t n, int64_t to, F f) const {
    parallel_for(n * view.blocks, to * view.blocks, 1, [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> scratch(new char[scratch_size(args_, view) * sizeof(Acc) + 63]);
      const auto aligned = (reinterpret_cast<uintptr_t>(scratch.get()) + 63) / 64 * 64;
      f(begin, end, reinterpret_cast<Acc*>(aligned));
    });
  }

  // Calls f(begin, end) for the label rows of the batch.
  template <typename F>
  void for_rows(F f) const {
    parallel_for(0, rows(), 4, f);
  }

  int64_t rows() const { return args_.N * args_.H; }

 private:
  void cut_into_blocks() {
    const int64_t most = args_.resampled() ? kMaxBlockRows : view.rows_per_tile;
    for (int64_t y = 0; y < args_.H; ++y) {
      const bool parts = args_.resampled() && y > 0 && view.vertical.first[y] != view.vertical.first[y - 1];
      if (row_.empty() || parts || y - row_.back() == most) row_.push_back(y);
    }
    view.blocks = static_cast<int64_t>(row_.size());
    view.edge_rows = args_.cpg_radius > 0 ? most + 2 * args_.cpg_radius : 0;
    row_.push_back(args_.H);
    view.row = row_.data();
    if (!args_.resampled()) return;
    for (int64_t y = 0, block = 0; y <= args_.h; ++y) {
      while (block < view.blocks && view.vertical.first[row_[block]] < y) ++block;
      block_.push_back(block);
    }
    view.block = block_.data();
  }

  template <typename T>
  T* allocate(std::unique_ptr<T[], Release>& memory, int64_t maps = 1) {
    const size_t bytes = maps * args_.N * args_.H * args_.W * sizeof(T);
    void* const data = bytes >= kLarge ? allocate_large(bytes) : ::operator new(bytes);
    memory = {static_cast<T*>(data), Release{bytes}};
    return memory.get();
  }

  const LossArgs& args_;
  std::unique_ptr<Axis<Acc>> vertical_, horizontal_;
  std::vector<int64_t> row_, block_;
  std::vector<int32_t> column_flip_;
  std::unique_ptr<uint16_t[], Release> ids_;
  std::unique_ptr<Acc[], Release> scores_;
};

// Finds the rank-th largest of the losses that are not -1, by radix select.
template <typename Acc>
Acc ohem_find_cutoff(const Acc* losses, int64_t count, int64_t rank) {
  Selection<Acc> selection = {0, rank};
  for (int level = 0; level < kLevels<Acc>; ++level) {
    std::vector<int64_t> histogram(kDigits);
    std::mutex merging;  // integers are merged, for which the order does not matter
    parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> counts(kDigits);
      for (int64_t i = begin; i < end; ++i) {
        const int digit = losses[i] == -1 ? -1 : digit_of<Acc>(key_of(losses[i]), selection.prefix, level);
        if (digit >= 0) ++counts[digit];
      }
      const std::lock_guard<std::mutex> lock(merging);
      for (int digit = 0; digit < kDigits; ++digit) histogram[digit] += counts[digit];
    });
    int digit = kDigits - 1;
    while (selection.rank > histogram[digit]) selection.rank -= histogram[digit--];
    selection.prefix |= static_cast<typename KeyOf<Acc>::type>(digit) << digit_shift<Acc>(level);
  }
  return loss_of<Acc>(selection.prefix);
}

template <typename Partial>
Partial add_up(const std::vector<Partial>& partials) {
  Partial sum = {};
  for (const Partial& partial : partials) sum += partial;
  return sum;
}

void set_sums(const TermPartial& partial, double* sums) {
  sums[0] = partial.sum;
  sums[1] = static_cast<double>(partial.count);
}

// OHEM keeps the losses above the threshold, or the min_kept largest ones if those are too few.
template <typename Acc>
TermPartial ohem_select(const LossArgs& args, const Work<Acc>& work, const LossPartial& sum) {
  Acc& cutoff = *static_cast<Acc*>(args.cutoff);
  const int64_t least = std::min(args.ohem_min_kept, sum.valid);
  if (sum.hard >= least) {
    cutoff = static_cast<Acc>(args.ohem_cutoff);
    return {sum.hard_nll, sum.hard};
  }
  cutoff = ohem_find_cutoff(work.view.nll, args.N * args.H * args.W, least);
  std::vector<TermPartial> partials(work.rows());
  work.for_rows([&](int64_t begin, int64_t end) {
    kernels<Acc>().ohem_sum(args, work.view, cutoff, begin, end, partials.data());
  });
  return add_up(partials);
}

template <typename Acc>
void sum_ce(const LossArgs& args, const Work<Acc>& work, const LossPartial& sum) {
  if (args.ohem) return set_sums(ohem_select(args, work, sum), args.sums + kCeSum);
  args.sums[kCeSum] = sum.weighted_nll;
  args.sums[kCeCount] = sum.weight;
}

template <typename Acc>
void sum_bcl(const LossArgs& args, const Work<Acc>& work) {
  std::vector<TermPartial> partials(work.rows());
  for (int s = 0; s < args.bcl_steps; ++s) {
    work.for_rows([&](int64_t begin, int64_t end) {
      kernels<Acc>().bcl_select(args, work.view, s, begin, end, partials.data());
    });
    set_sums(add_up(partials), args.sums + kBclSums + 2 * s);
  }
}

template <typename Acc>
void sum_cpg(const LossArgs& args, const Work<Acc>& work) {
  std::vector<TermPartial> partials(work.rows());
  work.for_rows(
      [&](int64_t begin, int64_t end) { kernels<Acc>().cpg_compare(args, work.view, begin, end, partials.data()); });
  set_sums(add_up(partials), args.sums + kCpgSum);
}

template <typename Acc>
void sum_up(const LossArgs& args) {
  std::fill(args.sums, args.sums + kSums, 0);
  *static_cast<Acc*>(args.cutoff) = 0;
  Work<Acc> work(args);
  if (args.bcl_steps > 0 || args.cpg_radius > 0) work.read_ids();
  if (args.bcl_steps > 0) work.allocate_scores();
  std::vector<LossPartial> partials(args.N * work.view.blocks);
  work.for_blocks(0, args.N, [&](int64_t begin, int64_t end, Acc* scratch) {
    kernels<Acc>().dense_forward(args, work.view, begin, end, scratch, partials.data());
  });
  const LossPartial sum = add_up(partials);
  args.sums[kValidPixels] = static_cast<double>(sum.valid);
  args.sums[kBadLabels] = static_cast<double>(sum.bad_labels);
  if (sum.bad_labels > 0) return;
  if (args.ce) sum_ce(args, work, sum);
  if (args.bcl_steps > 0) sum_bcl(args, work);
  work.free_scores();
  if (args.cpg_radius > 0) sum_cpg(args, work);
}

template <typename Acc>
void backward(const LossArgs& args) {
  Work<Acc> work(args);
  if (args.cpg_radius > 0 || (args.bcl_steps > 0 && args.bcl_flipped)) work.read_ids();
  const auto add_dense = [&](int64_t n, int64_t to) {
    work.for_blocks(n, to, [&](int64_t begin, int64_t end, Acc* scratch) {
      std::vector<EdgeRunStore<Acc>> stores(work.view.edge_rows);
      std::vector<RowEdgeRuns<Acc>> edge_runs;
      for (auto& store : stores) edge_runs.push_back({nullptr, nullptr, 0, &store});
      kernels<Acc>().dense_backward(args, work.view, begin, end, scratch, edge_runs.data());
    });
  };
  if (!args.resampled()) return add_dense(0, args.N);
  work.for_images_with_halves([&](int64_t n, int64_t to) {
    add_dense(n, to);
    parallel_for(n * args.h, to * args.h, 1,
                 [&](int64_t begin, int64_t end) { kernels<Acc>().low_gather(args, work.view, begin, end); });
  });
}

template <typename Acc>
void argmax(const LossArgs& args, void* classes, int64_t* bins) {
  const Work<Acc> work(args);
  const int64_t size = bins ? args.C * args.C + 2 : 0;
  std::mutex merging;  // integers are merged, for which the order does not matter
  work.for_blocks(0, args.N, [&](int64_t begin, int64_t end, Acc* scratch) {
    std::vector<int64_t> counts(size);
    kernels<Acc>().argmax(args, work.view, begin, end, scratch, classes, bins ? counts.data() : nullptr);
    const std::lock_guard<std::mutex> lock(merging);
    for (int64_t bin = 0; bin < size; ++bin) bins[bin] += counts[bin];
  });
}

}  // namespace

template <typename Acc>
void clear_edge_runs(RowEdgeRuns<Acc>& row) {
  auto* store = static_cast<EdgeRunStore<Acc>*>(row.store);
  store->runs.clear();
  store->residuals.resize(kRunWindow);
  row.count = 0;
}
template void clear_edge_runs(RowEdgeRuns<float>& row);
template void clear_edge_runs(RowEdgeRuns<double>& row);

template <typename Acc>
Acc* add_edge_run(RowEdgeRuns<Acc>& row, int64_t x, int64_t c) {
  auto* store = static_cast<EdgeRunStore<Acc>*>(row.store);
  const size_t first = store->residuals.size();
  store->runs.push_back({static_cast<int32_t>(x), static_cast<int32_t>(c)});
  store->residuals.resize(first + 2 * kRunWindow);
  row = {store->runs.data(), store->residuals.data() + kRunWindow, row.count + 1, store};
  return store->residuals.data() + first;
}
template float* add_edge_run(RowEdgeRuns<float>& row, int64_t x, int64_t c);
template double* add_edge_run(RowEdgeRuns<double>& row, int64_t x, int64_t c);

void loss_sums(const LossArgs& args) {
  args.logits.type == FloatType::f64 ? sum_up<double>(args) : sum_up<float>(args);
}

void loss_finish(const LossArgs& args, FloatType acc) {
  acc == FloatType::f64 ? finish_loss<double>(args) : finish_loss<float>(args);
}

void loss_backward(const LossArgs& args) {
  args.logits.type == FloatType::f64 ? backward<double>(args) : backward<float>(args);
}

void upsample_argmax(const LossArgs& args, void* classes, int64_t* bins) {
  if (args.logits.type == FloatType::f64) return argmax<double>(args, classes, bins);
  argmax<float>(args, classes, bins);
}

}  // namespace bcmf::cpu
