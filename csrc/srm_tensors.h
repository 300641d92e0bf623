// bcmf::srm with kernels of any backend; bcmf_ext/ops.py has its schema and says what it computes.
#pragma once

#include <tuple>

#include "common/srm.h"
#include "tensors.h"

namespace bcmf {

inline std::vector<int64_t> channels_last_strides(IntList sizes) {
  return {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
}
inline bool is_channels_last(const Tensor& map) {
  const std::vector<int64_t> strides = channels_last_strides(map.sizes());
  for (int64_t i = 0; i < 4; ++i)
    if (map.size(i) != 1 && map.stride(i) != strides[i]) return map.numel() == 0;
  return true;
}
inline Tensor as_channels_last(const Tensor& map) {
  return is_channels_last(map) ? map : stable::contiguous(map, MemoryFormat::ChannelsLast);
}

// A new map that is laid out as another one, which a kernel fills in through `filled`, in channels_last.
struct NewMap {
  Tensor map, filled;
  explicit NewMap(const Tensor& like)
      : map(make_like(like)),
        filled(is_channels_last(like) ? map
                                      : make_dense(like.sizes(), channels_last_strides(like.sizes()), kind_of(like))) {}
  Tensor finish() { return filled.data_ptr() == map.data_ptr() ? map : stable::copy_(map, filled); }
};

// The maps of a call, in channels_last, and the arguments that point to them.
class SrmMaps {
 public:
  SrmArgs args = {};
  Tensor low, raw;

  SrmMaps(const Tensor& given_low, const Tensor& given_raw) {
    for (const Tensor* map : {&given_low, &given_raw})
      BCMF_CHECK(map->dim() == 4, "maps have the shape (N, C, h, w), not ", words(map->sizes()), ".");
    args.N = given_low.size(0), args.C = given_low.size(1), args.h = given_low.size(2), args.w = given_low.size(3);
    args.H = given_raw.size(2), args.W = given_raw.size(3);
    args.type = float_type(given_low.scalar_type(), "low");
    args.raw_type = float_type(given_raw.scalar_type(), "raw");
    BCMF_CHECK(given_raw.size(0) == args.N && given_raw.size(1) == kRaw, "raw has ", kRaw,
               " channels, and as many images as low, ", args.N, ", not the shape ", words(given_raw.sizes()), ".");
    BCMF_CHECK(args.h >= 1 && args.w >= 1 && args.H >= args.h && args.W >= args.w, "low, ", words(given_low.sizes()),
               ", may not be larger than raw, ", words(given_raw.sizes()), ", nor without a pixel.");
    for (const int64_t side : {args.H, args.W}) check_side(side);
    // The kernels count the pixels of an image, and the channels of some, in 32 bits.
    BCMF_CHECK(args.H * args.W < int64_t{1} << 31 && args.C < 1 << 24, "raw has less than 2^31 pixels, not ",
               words(given_raw.sizes()), ", and low less than 2^24 channels, not ", args.C, ".");
    BCMF_CHECK(given_raw.scalar_type() == given_low.scalar_type() || given_raw.scalar_type() == acc_type(given_low),
               "raw has the dtype of low, ", words(given_low.scalar_type()), ", or ", words(acc_type(given_low)),
               ", not ", words(given_raw.scalar_type()), ".");
    check_same_device(given_low, given_raw, "low", "raw");
    low = as_channels_last(given_low), raw = as_channels_last(given_raw);
    args.low = low.data_ptr(), args.raw = raw.data_ptr();
  }

  // Returns a map of the size of the output, in channels_last, if it is one.
  Tensor full_map(const Tensor& given, const char* name) const {
    BCMF_CHECK(given.dim() == 4 && has_sizes(given, {args.N, args.C, args.H, args.W}), name, " has the shape ",
               words({args.N, args.C, args.H, args.W}), ", not ", words(given.sizes()), ".");
    BCMF_CHECK(given.scalar_type() == low.scalar_type(), name, " has the dtype of low, ", words(low.scalar_type()),
               ", not ", words(given.scalar_type()), ".");
    check_same_device(low, given, "low", name);
    return as_channels_last(given);
  }
};

template <void (*kernel)(const SrmArgs& args, const Tensor& like)>
Tensor srm(const Tensor& low, const Tensor& raw, const Tensor& residual) {
  SrmMaps maps(low, raw);
  const Tensor added = maps.full_map(residual, "residual");
  NewMap out(residual);
  maps.args.residual = added.data_ptr(), maps.args.out = out.filled.data_ptr();
  if (residual.numel() > 0) kernel(maps.args, low);
  return out.finish();
}

template <void (*kernel)(const SrmArgs& args, const Tensor& like)>
std::tuple<Tensor, Tensor> srm_backward(const Tensor& grad, const Tensor& low, const Tensor& raw) {
  SrmMaps maps(low, raw);
  const Tensor upstream = maps.full_map(grad, "grad");
  NewMap grad_low(low), grad_raw(raw);
  maps.args.out = upstream.data_ptr();
  maps.args.grad_low = grad_low.filled.data_ptr(), maps.args.grad_raw = grad_raw.filled.data_ptr();
  if (grad.numel() > 0)
    kernel(maps.args, low);
  else
    stable::zero_(grad_raw.filled);  // low is empty, too
  return {grad_low.finish(), grad_raw.finish()};
}

template <auto forward, auto backward>
void register_srm(stable::detail::StableLibrary& m) {
  m.impl("srm", TORCH_BOX(&srm<forward>));
  m.impl("srm_backward", TORCH_BOX(&srm_backward<backward>));
}

}  // namespace bcmf
