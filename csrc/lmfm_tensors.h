// bcmf::pool_norm_relu and bcmf::add_norm_relu with kernels of any backend; bcmf_ext/ops.py has their schemas and says
// what they compute.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/lmfm.h"
#include "tensors.h"

namespace bcmf {

// Runs an op's kernel; `like` is one of its maps.
using Kernel = void (*)(const NormReluArgs& args, const Tensor& like);

inline MapView view_of(const Tensor& map) { return map_view(map, "maps"); }

// Makes a map (N, C, H, W), in channels_last or in NCHW.
inline Tensor empty_map(const Tensor& like, bool channels_last, int64_t N, int64_t C, int64_t H, int64_t W) {
  const Kind kind = kind_of(like);
  return channels_last ? empty_strided({N, C, H, W}, {H * W * C, 1, W * C, C}, kind) : empty({N, C, H, W}, kind);
}

// The view of a branch's channels in a map of the channels of all branches.
inline MapView channels_of(const Tensor& joined, const Branch& branch) {
  MapView view = view_of(joined);
  const size_t offset = branch.first * view.stride_c * joined.element_size();
  view.data = static_cast<char*>(view.data) + offset;
  return view;
}

// The arguments of one op, and the tensors that they point to.
class Operands {
 public:
  NormReluArgs args = {};
  Tensor stats, grad_norms;

  Operands(const Tensor& like, bool training) : like_(like) {
    args.N = like.size(0);
    args.training = training;
    args.type = float_type(like.scalar_type(), "maps");
  }

  Branch& add_branch(int64_t C, IntList in, IntList out) {
    BCMF_CHECK(args.branches < kMaxBranches, "at most ", kMaxBranches, " maps are worked on at once.");
    check_side(C);
    for (const int64_t side : {in[0], in[1], out[0], out[1]}) {
      check_side(side);
      BCMF_CHECK(side >= 1, "maps have at least one row and one column.");
    }
    for (const int64_t pixels : {in[0] * in[1], in[0] * out[1], out[0] * out[1]})  // the kernels count in 32 bits
      BCMF_CHECK(pixels < (int64_t{1} << 31) / std::max<int64_t>(args.N, 1),
                 "maps of a batch have less than 2^31 pixels.");
    Branch& branch = args.branch[args.branches++];
    branch.C = C;
    branch.h = in[0], branch.w = in[1], branch.H = out[0], branch.W = out[1];
    branch.first = args.channels;
    args.channels += C;
    return branch;
  }

  MapView view(const Tensor& map, int64_t C, int64_t H, int64_t W) {
    BCMF_CHECK(has_sizes(map, {args.N, C, H, W}), "maps of one branch go together, but one is ", words(map.sizes()),
               " instead of ", words({args.N, C, H, W}), ".");
    BCMF_CHECK(map.scalar_type() == like_.scalar_type(), "maps are of one dtype, not of ", words(map.scalar_type()),
               " and ", words(like_.scalar_type()), ".");
    check_same_device(like_, map, "maps", "another one");
    return view_of(map);
  }

  // Points each branch to the parameters of its channels: one norm may span several branches.
  void set_norms(TensorList weights, TensorList biases) {
    set(weights, "weights", [](Branch& branch, char* data) { branch.weight = data; });
    set(biases, "biases", [](Branch& branch, char* data) { branch.bias = data; });
  }
  void set_running(TensorList means, TensorList variances, double momentum, double eps) {
    set(means, "means", [](Branch& branch, char* data) { branch.mean = data; });
    set(variances, "variances", [](Branch& branch, char* data) { branch.variance = data; });
    args.momentum = momentum;
    args.eps = eps;
  }

  void make_stats() {
    stats = empty({2, args.channels}, kind_of(like_).with(acc_type(like_)));
    args.stats = stats.data_ptr();
  }
  void take_stats(const Tensor& given) {
    BCMF_CHECK(has_sizes(given, {2, args.channels}) && given.scalar_type() == acc_type(like_),
               "the backward takes stats as the forward returned them.");
    check_same_device(like_, given, "maps", "stats");
    stats = as_contiguous(given);
    args.stats = stats.data_ptr();
    grad_norms = empty({2, args.channels}, kind_of(stats));
    if (args.N == 0) stable::zero_(grad_norms);
    args.grad_norms = grad_norms.data_ptr();
  }

 private:
  template <typename F>
  void set(TensorList parameters, const char* name, F f) {
    int b = 0;
    for (const Tensor& parameter : parameters) {
      BCMF_CHECK(parameter.dim() == 1 && parameter.scalar_type() == acc_type(like_), name, " are (C,) ",
                 words(acc_type(like_)), ", not ", words(parameter.sizes()), " ", words(parameter.scalar_type()), ".");
      check_same_device(like_, parameter, "maps", name);
      BCMF_CHECK(parameter.is_contiguous(), name, " are contiguous.");
      int64_t from = 0;
      for (; b < args.branches && from + args.branch[b].C <= parameter.size(0); from += args.branch[b++].C)
        f(args.branch[b], static_cast<char*>(parameter.data_ptr()) + from * parameter.element_size());
      BCMF_CHECK(from == parameter.size(0), name, " do not fit the maps' channels.");
    }
    BCMF_CHECK(b == args.branches, name, " do not fit the maps' channels.");
  }

  Tensor like_;
};

// ---------------------------------------------------------------------------------------------------------------------
// pool_norm_relu

inline Operands pool_operands(const Tensor& x, bool training) {
  BCMF_CHECK(x.dim() == 4, "x has the shape (N, C, h, w), not ", words(x.sizes()), ".");
  BCMF_CHECK(x.size(2) >= 1 && x.size(3) >= 1, "maps have at least one row and one column.");
  Operands operands(x, training);
  for (int p = 0; p < kPools; ++p) {
    const int64_t sides[] = {pool_axis(p, x.size(2)).out(), pool_axis(p, x.size(3)).out()};
    operands.add_branch(x.size(1), x.sizes().slice(2), sides).resampled = view_of(x);
  }
  return operands;
}

template <Kernel kernel>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pool_norm_relu(const Tensor& x, TensorList weights,
                                                                  TensorList biases, TensorList means,
                                                                  TensorList variances, bool training, double momentum,
                                                                  double eps) {
  Operands operands = pool_operands(x, training);
  operands.set_norms(weights, biases);
  operands.set_running(means, variances, momentum, eps);
  operands.make_stats();
  std::vector<Tensor> outputs;
  for (int p = 0; p < kPools; ++p) {
    Branch& branch = operands.args.branch[p];
    outputs.push_back(empty_map(x, x.stride(1) == 1, operands.args.N, branch.C, branch.H, branch.W));
    branch.out = view_of(outputs.back());
  }
  kernel(operands.args, x);
  return {outputs[0], outputs[1], outputs[2], outputs[3], operands.stats};
}

template <Kernel kernel>
std::tuple<std::vector<Tensor>, Tensor> pool_norm_relu_backward(TensorList grads, const Tensor& x, TensorList weights,
                                                                TensorList biases, const Tensor& stats, bool training) {
  Operands operands = pool_operands(x, training);
  operands.set_norms(weights, biases);
  operands.take_stats(stats);
  BCMF_CHECK(grads.size() == kPools, "there is a gradient of each of the ", kPools, " pools.");
  for (int p = 0; p < kPools; ++p) {
    Branch& branch = operands.args.branch[p];
    branch.out = operands.view(grads[p], branch.C, branch.H, branch.W);
  }
  const Tensor grad = new_like(x);
  operands.args.branch[0].grad_resampled = view_of(grad);
  kernel(operands.args, x);
  return {std::vector<Tensor>{grad}, operands.grad_norms};
}

// ---------------------------------------------------------------------------------------------------------------------
// add_norm_relu

// Returns the first map that is given, whose dtype and device all others must have.
inline Tensor first_map(const OptionalTensorList& resampled, const OptionalTensorList& added) {
  std::optional<Tensor> found;
  for (const OptionalTensorList* maps : {&resampled, &added})
    for (const std::optional<Tensor>& map : *maps) {
      if (!map.has_value()) continue;
      BCMF_CHECK(map->dim() == 4, "maps have the shape (N, C, h, w), not ", words(map->sizes()), ".");
      if (!found.has_value()) found = map;
    }
  BCMF_CHECK(found.has_value(), "there is no map.");
  return *found;
}

inline Operands add_operands(const Tensor& like, const OptionalTensorList& resampled, const OptionalTensorList& added,
                             int64_t height, int64_t width, bool joined, bool training) {
  BCMF_CHECK(resampled.size() == added.size(), "each branch has a resampled and an added map, or none.");
  BCMF_CHECK(joined || resampled.size() <= 2, "more than two maps come joined.");
  Operands operands(like, training);
  for (size_t b = 0; b < resampled.size(); ++b) {
    const std::optional<Tensor> low = resampled[b], map = added[b];
    BCMF_CHECK(low.has_value() || map.has_value(), "branch ", b, " has no map.");
    const int64_t C = low.has_value() ? low->size(1) : map->size(1), sides[] = {height, width};
    Branch& branch = operands.add_branch(C, low.has_value() ? low->sizes().slice(2) : IntList(sides), sides);
    if (low.has_value()) branch.resampled = operands.view(*low, C, branch.h, branch.w);
    if (map.has_value()) branch.added = operands.view(*map, C, height, width);
  }
  return operands;
}

template <Kernel kernel>
std::tuple<Tensor, Tensor, Tensor> add_norm_relu(const OptionalTensorList& resampled, const OptionalTensorList& added,
                                                 TensorList weights, TensorList biases, TensorList means,
                                                 TensorList variances, int64_t height, int64_t width,
                                                 bool channels_last, bool joined, bool training, double momentum,
                                                 double eps) {
  const Tensor like = first_map(resampled, added);
  Operands operands = add_operands(like, resampled, added, height, width, joined, training);
  operands.set_norms(weights, biases);
  operands.set_running(means, variances, momentum, eps);
  operands.make_stats();
  const auto make_output = [&](int64_t channels) {
    return empty_map(like, channels_last, operands.args.N, channels, height, width);
  };
  Tensor outputs[] = {make_output(joined ? operands.args.channels : operands.args.branch[0].C),
                      empty({0}, kind_of(like))};
  if (!joined && operands.args.branches == 2) outputs[1] = make_output(operands.args.branch[1].C);
  for (int b = 0; b < operands.args.branches; ++b) {
    Branch& branch = operands.args.branch[b];
    branch.out = joined ? channels_of(outputs[0], branch) : view_of(outputs[b]);
  }
  kernel(operands.args, like);
  return {outputs[0], outputs[1], operands.stats};
}

template <Kernel kernel>
std::tuple<std::vector<Tensor>, Tensor> add_norm_relu_backward(TensorList grads, const OptionalTensorList& resampled,
                                                               const OptionalTensorList& added, TensorList weights,
                                                               TensorList biases, const Tensor& stats, int64_t height,
                                                               int64_t width, bool /*channels_last*/, bool joined,
                                                               bool training) {
  const Tensor like = first_map(resampled, added);
  Operands operands = add_operands(like, resampled, added, height, width, joined, training);
  operands.set_norms(weights, biases);
  operands.take_stats(stats);
  BCMF_CHECK(grads.size() == 2, "there is a gradient of each output.");
  if (joined) operands.view(grads[0], operands.args.channels, height, width);
  for (int b = 0; b < operands.args.branches; ++b) {
    Branch& branch = operands.args.branch[b];
    branch.out = joined ? channels_of(grads[0], branch) : operands.view(grads[b], branch.C, height, width);
  }
  std::vector<Tensor> grad_maps;  // first of resampled maps, then of added ones
  const auto make_like = [&](const OptionalTensorList& maps, MapView Branch::* view) {
    for (int b = 0; b < operands.args.branches; ++b) {
      const std::optional<Tensor> map = maps[b];
      if (!map.has_value()) continue;
      grad_maps.push_back(new_like(*map));
      operands.args.branch[b].*view = view_of(grad_maps.back());
    }
  };
  make_like(resampled, &Branch::grad_resampled);
  make_like(added, &Branch::grad_added);
  kernel(operands.args, like);
  return {grad_maps, operands.grad_norms};
}

template <Kernel pool, Kernel pool_backward, Kernel add, Kernel add_backward>
void register_lmfm(stable::detail::StableLibrary& m) {
  m.impl("pool_norm_relu", TORCH_BOX(&pool_norm_relu<pool>));
  m.impl("pool_norm_relu_backward", TORCH_BOX(&pool_norm_relu_backward<pool_backward>));
  m.impl("add_norm_relu", TORCH_BOX(&add_norm_relu<add>));
  m.impl("add_norm_relu_backward", TORCH_BOX(&add_norm_relu_backward<add_backward>));
}

}  // namespace bcmf
