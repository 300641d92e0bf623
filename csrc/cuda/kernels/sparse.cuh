// The steps cpg_shares and sparse_backward, which are part of the kernel dense_backward: what CPG, and BCL with flipped
// labels, add to the gradient of a few pixels. That gradient is, for class c,
//
//   p (pull + factor) - pull [c is the label] + extra(c),
//
// where the pull is that of the cross-entropy and of BCL without flips. CPG has extra(c) = p b(c), with b(c) the
// derivative of the total by p, and the factor -sum_c p b(c); flipped labels add their pulls to the factor, and take
// them from the extras of the classes that they pull to.
#pragma once

#include "cuda/kernels/bcl.cuh"
#include "cuda/kernels/cpg.cuh"

namespace bcmf::device {

// The shared memory of a SparseGradient.
template <typename Acc>
struct SparseMemory {
  WindowMemory<Acc> window;
  SharedArray<uint16_t> listed;   // row * kColumns + column of each listed pixel
  SharedArray<uint16_t> places;   // of each pixel of the tile: its place in this list, or kNone
  SharedArray<Acc> factors;       // of each listed pixel
  SharedArray<Acc> extras;        // by class and listed pixel
  SharedArray<unsigned> present;  // the classes that may have extras

  SparseMemory(const LossArgs& args, SharedCutter& shared) : window(args, args.cpg_radius, shared) {
    const int64_t pixels = args.cpg_radius > 0 || args.bcl_flipped ? kRows * kColumns : 0;
    listed = shared.take<uint16_t>(pixels);
    places = shared.take<uint16_t>(pixels);
    factors = shared.take<Acc>(pixels);
    extras = shared.take<Acc>(pixels);
    present = shared.take<unsigned>(pixels > 0 ? ClassSet::kWords : 0);
  }
};

// The pixels of a tile that have a factor and extras. All threads of the block call its functions together, but for
// the const ones.
template <typename Entries>
class SparseGradient {
 public:
  using Acc = typename Entries::Acc;

  __device__ __forceinline__ SparseGradient(const LossArgs& args, const SparseMemory<Acc>& memory)
      : args_(args),
        window_(args, memory.window),
        edges_(false),
        count_(0),
        room_(0),
        begin_(0),
        held_(0),
        next_(static_cast<int>(args.C)),
        listed_(memory.listed.data()),
        places_(memory.places.data()),
        factors_(memory.factors.data()),
        kept_(memory.extras.data()),
        present_{memory.present.data()} {}

  // Finds the extras of the classes from `begin` on, as far as there is room, and returns the first class without. The
  // first call, with 0, lists the pixels and finds their factors.
  __device__ __forceinline__ int find_extras(const Marks& marks, const Tile& tile, const Entries& entries, int begin) {
    const int C = static_cast<int>(args_.C);
    if (begin == 0 && !list(marks, tile, entries)) return C;
    begin_ = begin, held_ = 0, next_ = next(begin);
    int end = C, held = 0;
    __syncthreads();  // other extras may still be read
    for (int c = next_; c < C; c = next(c + 1), ++held) {
      if (held == room_) end = c;
      if (held == room_ && begin > 0) break;
      find(marks, tile, entries, c, [&](int i, Acc share, Acc pulls) {
        if (begin == 0) factors_[i] -= share;
        if (held < room_) kept_[held * count_ + i] = share - pulls;
      });
    }
    __syncthreads();  // factors and extras may be read at once
    return end;
  }

  __device__ __forceinline__ bool any() const { return count_ > 0; }
  // Returns the first class from c on that any pixel may have an extra of, or C.
  __device__ __forceinline__ int next(int c) const {
    const int C = static_cast<int>(args_.C);
    return any() ? present_.next(c, C) : C;
  }
  // Returns which one class c is of those from find_extras's `begin` on that have extras, or -1.
  __device__ __forceinline__ int rank(int c) const {
    if (!any() || !present_.has(c)) return -1;
    int rank = 0;
    for (int before = next(begin_); before < c; before = next(before + 1)) ++rank;
    return rank;
  }
  // Reads the places of a stack's pixels in the list, or kNone.
  static constexpr int kNone = 0xffff;
  template <typename Stack>
  __device__ __forceinline__ void load_places(const Stack& tile, int (&places)[kStack]) const {
    uint16_t own[kStack] = {kNone, kNone, kNone, kNone};
    if (any()) {
      const uint16_t* first = places_ + tile.first_row * kColumns + tile.first_column;
      if constexpr (Stack::kAcross) {
        load_pack(first, own);
      } else {
#pragma unroll
        for (int k = 0; k < kStack; ++k) own[k] = first[k * kColumns];
      }
    }
#pragma unroll
    for (int k = 0; k < kStack; ++k) places[k] = own[k];
  }
  __device__ __forceinline__ Acc factor(int place) const { return factors_[place]; }
  // Returns the extra of the class with that rank.
  __device__ __forceinline__ Acc extra(int rank, int place) const { return kept_[rank * count_ + place]; }
  // The next class that has extras, and its rank, for those who go through all of them.
  __device__ __forceinline__ int next_class() const { return next_; }
  __device__ __forceinline__ int next_rank() const { return held_; }
  __device__ __forceinline__ void advance() { ++held_, next_ = next(next_ + 1); }

 private:
  static constexpr int kPixels = kRows * kColumns;

  static __device__ __forceinline__ bool is_any_selected(const Marks& marks, const Tile& tile) {
    const Stacks<false> stack(tile);
    return stack.has_patch() && marks.patch(tile.n, stack.y(0), stack.x(0))->selected != 0;
  }
  __device__ __forceinline__ unsigned selected_at(const Tile& tile, int row, int column) const {
    return steps_of(args_, tile.pixel_at(row, column));
  }

  // Lists the pixels near edges and the selected ones, in order, and tells whether there are any.
  __device__ __forceinline__ bool list(const Marks& marks, const Tile& tile, const Entries& entries) {
    const bool flips = args_.bcl_flipped && any_of_block(is_any_selected(marks, tile));
    edges_ = args_.cpg_radius > 0 && window_.recall(args_, marks, tile, entries);
    if (!edges_ && !flips) return false;
    constexpr int kOwn = kPixels / kThreads;
    static_assert(kOwn == 4 && kColumns % kOwn == 0);
    const int first = static_cast<int>(threadIdx.x) * kOwn, row = first / kColumns, column = first % kColumns;
    unsigned bits = edges_ ? window_.near_bits(row, column) : 0;
    const int inside = row < tile.rows ? tile.columns - column : 0;
    bits &= inside >= kOwn ? ~0u : inside > 0 ? (1u << inside) - 1 : 0;
    for (int i = 0; flips && i < kOwn && i < inside; ++i)
      if (selected_at(tile, row, column + i) != 0) bits |= 1u << i;
    int before = scan_block(__popc(bits), &count_);
    for (int i = 0; i < kOwn; ++i) {
      const bool wanted = bits >> i & 1;
      places_[first + i] = static_cast<uint16_t>(wanted ? before : kNone);
      if (wanted) listed_[before++] = static_cast<uint16_t>(first + i);
    }
    room_ = count_ > 0 ? kPixels / count_ : 0;
    for (int i = threadIdx.x; i < ClassSet::kWords; i += kThreads)
      present_.words[i] = edges_ ? window_.present.words[i] : 0;
    __syncthreads();  // the list is there, and bits are added to `present_`
    for_each([&](int i, int row, int column) {
      const unsigned selected = flips ? selected_at(tile, row, column) : 0;
      factors_[i] = flipped_pull<Acc>(args_, selected);
      for_flipped<Acc>(args_, marks, selected, tile, row, column, [&](int c, Acc) { present_.add(c); });
    });
    __syncthreads();  // all classes are there
    return count_ > 0;
  }
  // Calls f(i, row, column) for the listed pixels. A pixel is always visited by the same thread.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int i = threadIdx.x; i < count_; i += kThreads) f(i, listed_[i] / kColumns, listed_[i] % kColumns);
  }
  // Calls f(i, p b, flipped pulls) of class c for the listed pixels.
  template <typename F>
  __device__ __forceinline__ void find(const Marks& marks, const Tile& tile, const Entries& entries, int c, F f) {
    const bool compared = edges_ && window_.present.has(c);
    if (compared) window_.cpg_residuals(args_, tile, entries, c);
    for_each([&](int i, int row, int column) {
      // Where b is 0 nothing is compared, and p may be NaN, or not be there.
      const Acc b = compared ? window_.b_at(tile, row, column) : Acc(0);
      const unsigned selected = args_.bcl_flipped ? selected_at(tile, row, column) : 0;
      Acc pulls = 0;
      for_flipped<Acc>(args_, marks, selected, tile, row, column,
                       [&](int to, Acc pull) { pulls += to == c ? pull : Acc(0); });
      f(i, b != 0 ? window_.p[window_.labels.at(row, column)] * b : Acc(0), pulls);
    });
  }

  const LossArgs& args_;
  Window<Acc> window_;
  bool edges_;               // CPG has edges near the tile
  int count_;                // how many pixels are listed
  int room_;                 // for how many classes extras are kept
  int begin_, held_, next_;  // see find_extras, next_rank and next_class
  uint16_t *listed_, *places_;
  Acc *factors_, *kept_;
  ClassSet present_;
};

}  // namespace bcmf::device
