// What the kernels know of the labels: the step read_labels reads them, whatever type and strides they have, and all
// later steps, those of the backward too, read its marks. (Labels that change after it are never seen.)
//
// The pixels of a warp are a patch, 4 rows of 32. Most patches lie within an object: their label is read once for all.
#pragma once

#include "cuda/kernels/tile.cuh"

namespace bcmf::device {

constexpr int kMixed = -3;  // the id of a patch whose labels differ, beside kIgnored and kBad

struct alignas(8) Patch {
  int id;             // of all its pixels: a class, kIgnored, kBad, or kMixed
  unsigned selected;  // whether BCL selects any of its pixels
};

// The marks: (N, patches_down, patches_across) patches, then with CPG kPatchRows words of edges for each of them, then
// (N, H, W) ids, in a byte each if that is enough. Whatever the memory holds, an id that is read from it is a class,
// kIgnored or kBad.
class Marks {
 public:
  explicit Marks(const LossArgs& args)
      : patches_(static_cast<Patch*>(args.marks)),
        edges_(reinterpret_cast<unsigned*>(static_cast<char*>(args.marks) + patch_bytes(args))),
        ids_(static_cast<char*>(args.marks) + patch_bytes(args) + edge_bytes(args)),
        C_(static_cast<int>(args.C)),
        down_(static_cast<int>(down(args))),
        across_(static_cast<int>(across(args))) {}

  static int64_t bytes(const LossArgs& args) {
    return patch_bytes(args) + edge_bytes(args) + args.N * args.H * args.W * (args.C <= kMost ? 1 : 4);
  }
  static BCMF_HOST_DEVICE int64_t patch_count(const LossArgs& args) { return args.N * down(args) * across(args); }
  __device__ __forceinline__ int64_t patch_index(int64_t n, int y, int x) const {
    return (n * down_ + static_cast<unsigned>(y) / kPatchRows) * across_ + static_cast<unsigned>(x) / kPatchColumns;
  }
  __device__ __forceinline__ Patch* patch(int64_t n, int y, int x) const { return patches_ + patch_index(n, y, x); }
  // A bit for each pixel of a row of a patch: whether it is an edge of CPG.
  __device__ __forceinline__ unsigned* edges(int64_t n, int y, int x) const {
    return edges_ + patch_index(n, y, x) * kPatchRows + y % kPatchRows;
  }
  // The label of all pixels of a patch, or kMixed.
  __device__ __forceinline__ int id_of(const Patch& patch) const {
    const int id = patch.id;
    return id == kMixed ? kMixed : from_int(id);
  }
  // The label of a pixel: a class, kIgnored or kBad.
  __device__ __forceinline__ int id(int64_t pixel) const {
    return C_ <= kMost ? from_byte(static_cast<const uint8_t*>(ids_)[pixel])
                       : from_int(static_cast<const int*>(ids_)[pixel]);
  }
  // The label as BCL and CPG see it: a class, or kIgnored, also for a bad label.
  __device__ __forceinline__ int class_of(int64_t pixel) const {
    const int label = id(pixel);
    return label < 0 ? kIgnored : label;
  }
  // Writes what lies between the parts. One thread calls it.
  __device__ __forceinline__ void fill_gap(const LossArgs& args) const {
    if (patch_count(args) % 2 != 0) patches_[patch_count(args)] = {0, 0};
  }
  // Writes the labels of a stack.
  template <typename Stack>
  __device__ __forceinline__ void store(const Stack& tile, const int (&ids)[kStack]) const {
    if (C_ > kMost) return tile.store(ids, static_cast<int*>(ids_));
    uint8_t bytes[kStack];
#pragma unroll
    for (int k = 0; k < kStack; ++k) bytes[k] = static_cast<uint8_t>(ids[k]);  // 255 and 254: kIgnored and kBad
    tile.store(bytes, static_cast<uint8_t*>(ids_));
  }
  // Reads the labels of a stack. patch_id: that of its patch.
  template <typename Stack>
  __device__ __forceinline__ void load(const Stack& tile, int patch_id, int (&ids)[kStack]) const {
    if (patch_id != kMixed) {
#pragma unroll
      for (int k = 0; k < kStack; ++k) ids[k] = patch_id;
    } else if (C_ <= kMost) {
      uint8_t bytes[kStack] = {};
      tile.load(static_cast<const uint8_t*>(ids_), bytes);
#pragma unroll
      for (int k = 0; k < kStack; ++k) ids[k] = from_byte(bytes[k]);
    } else {
      tile.load(static_cast<const int*>(ids_), ids);
      tile.for_each([&](int k) { ids[k] = from_int(ids[k]); });
    }
  }

 private:
  static constexpr int kMost = 254;  // classes that have ids of a byte

  static BCMF_HOST_DEVICE int64_t down(const LossArgs& args) { return (args.H + kPatchRows - 1) / kPatchRows; }
  static BCMF_HOST_DEVICE int64_t across(const LossArgs& args) { return (args.W + kPatchColumns - 1) / kPatchColumns; }
  static int64_t edge_bytes(const LossArgs& args) {
    return args.cpg_radius > 0 ? patch_count(args) * kPatchRows * static_cast<int64_t>(sizeof(unsigned)) : 0;
  }
  static int64_t patch_bytes(const LossArgs& args) {  // ids begin at a multiple of 16 bytes
    return (patch_count(args) + 1) / 2 * 2 * static_cast<int64_t>(sizeof(Patch));
  }
  __device__ __forceinline__ int from_byte(int id) const { return id < C_ ? id : kBad + (id & 1); }
  __device__ __forceinline__ int from_int(int id) const { return id >= C_ ? kIgnored : id < kBad ? kBad : id; }

  Patch* patches_;
  unsigned* edges_;
  void* ids_;
  int C_, down_, across_;  // patches_: (N, down, across)
};

// Tells whether the patches that a tile and a margin around it reach hold several labels. All threads of a warp call it
// together: each lane looks at one of the patches that the largest margin, of 2 kMaxRadius, reaches.
__device__ __forceinline__ bool differ(const Marks& marks, const Tile& tile, int margin) {
  constexpr int kAcross = kColumns / kPatchColumns + 2, kRowsAbove = (2 * kMaxRadius + kPatchRows - 1) / kPatchRows;
  static_assert(kAcross * (kRows / kPatchRows + 2 * kRowsAbove) == kWarp && 2 * kMaxRadius <= kPatchColumns);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = (lane / kAcross - kRowsAbove) * kPatchRows, column = (lane % kAcross - 1) * kPatchColumns;
  const int y = tile.top + row, x = tile.left + column;
  const bool reached = row > -margin - kPatchRows && row < kRows + margin && column > -margin - kPatchColumns &&
                       column < kColumns + margin && y >= 0 && y < tile.H && x >= 0 && x < tile.W;
  const int first = marks.patch(tile.n, tile.top, tile.left)->id;
  const int own = reached ? marks.patch(tile.n, y, x)->id : first;
  return __any_sync(0xffffffffu, own != first || own == kMixed);
}

// Reads the labels, and counts them: partials has two rows (tiles), of the valid pixels and of the bad labels.
template <typename Label>
__global__ void __launch_bounds__(kThreads)
    read_labels(const __grid_constant__ LossArgs args, const __grid_constant__ Marks marks, double* partials) {
  const Stacks<false> tile(args);
  const Label* labels = static_cast<const Label*>(args.labels.data) + tile.n * args.labels.stride_n +
                        tile.y(0) * args.labels.stride_h + tile.x(0) * args.labels.stride_w;
  int id[kStack] = {}, counts = 0;  // of valid pixels, and in the upper half of bad labels
  tile.for_each([&](int k) {
    // A label is widened to 64 bits before it is compared, so that uint8 255 and ignore_index = -1 stay apart.
    id[k] = classify_label(labels[k * args.labels.stride_h], args.C, args.ignore_index);
    counts += id[k] == kIgnored ? 0 : id[k] == kBad ? 0x10001 : 1;
  });
  marks.store(tile, id);
  if (tile.has_patch()) {
    const int first = __shfl_sync(0xffffffffu, id[0], 0);
    bool other = false;
    tile.for_each([&](int k) { other = other || id[k] != first; });
    const bool mixed = __any_sync(0xffffffffu, other);
    if (threadIdx.x % kWarp == 0) *marks.patch(tile.n, tile.y(0), tile.x(0)) = {mixed ? kMixed : first, 0};
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) marks.fill_gap(args);
  const int sum = sum_of_block(counts);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum & 0xffff, partials[gridDim.x + blockIdx.x] = sum >> 16;
}

}  // namespace bcmf::device
