// bcmf::pool_norm_relu and bcmf::add_norm_relu: schemas, and what they compute, stand in bcmf_ext/ops.py.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/lmfm.h"
#include "ops.h"
#ifdef BCMF_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/lmfm.h"
#endif

namespace bcmf {
namespace {

using at::Tensor;
using at::TensorList;
using Maps = c10::List<std::optional<Tensor>>;
using Kernel = void (*)(const NormReluArgs& args, const Tensor& like);

MapView view_of(const Tensor& map) { return map_view(map, "maps"); }

// Makes a map of the sizes (N, C, H, W), in channels_last or in NCHW.
Tensor empty_map(const Tensor& like, bool channels_last, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options(),
                   channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
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

  Branch& add_branch(int64_t C, at::IntArrayRef in, at::IntArrayRef out) {
    TORCH_CHECK_VALUE(args.branches < kMaxBranches, "at most ", kMaxBranches, " maps are worked on at once.");
    check_side(C);
    for (const int64_t side : {in[0], in[1], out[0], out[1]}) {
      check_side(side);
      TORCH_CHECK_VALUE(side >= 1, "maps have at least one row and one column.");
    }
    for (const int64_t pixels : {in[0] * in[1], in[0] * out[1], out[0] * out[1]})  // the kernels count in 32 bits
      TORCH_CHECK_VALUE(pixels < (int64_t{1} << 31) / std::max<int64_t>(args.N, 1),
                        "maps of a batch have less than 2^31 pixels.");
    Branch& branch = args.branch[args.branches++];
    branch.C = C;
    branch.h = in[0], branch.w = in[1], branch.H = out[0], branch.W = out[1];
    branch.first = args.channels;
    args.channels += C;
    return branch;
  }

  MapView view(const Tensor& map, int64_t C, int64_t H, int64_t W) {
    TORCH_CHECK_VALUE(map.sizes() == at::IntArrayRef({args.N, C, H, W}), "maps of one branch go together, but one is ",
                      map.sizes(), " instead of ", at::IntArrayRef({args.N, C, H, W}), ".");
    TORCH_CHECK_TYPE(map.scalar_type() == like_.scalar_type(), "maps are of one dtype, not of ", map.scalar_type(),
                     " and ", like_.scalar_type(), ".");
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
    stats = at::empty({2, args.channels}, like_.options().dtype(acc_type(like_)));
    args.stats = stats.data_ptr();
  }
  void take_stats(const Tensor& given) {
    TORCH_CHECK_VALUE(given.sizes() == at::IntArrayRef({2, args.channels}) && given.scalar_type() == acc_type(like_),
                      "the backward takes stats as the forward returned them.");
    check_same_device(like_, given, "maps", "stats");
    stats = given.contiguous();
    args.stats = stats.data_ptr();
    grad_norms = at::empty({2, args.channels}, stats.options());
    if (args.N == 0) grad_norms.zero_();
    args.grad_norms = grad_norms.data_ptr();
  }

 private:
  template <typename F>
  void set(TensorList parameters, const char* name, F f) {
    int b = 0;
    for (const Tensor& parameter : parameters) {
      TORCH_CHECK_VALUE(parameter.dim() == 1 && parameter.scalar_type() == acc_type(like_), name, " are (C,) ",
                        acc_type(like_), ", not ", parameter.sizes(), " ", parameter.scalar_type(), ".");
      check_same_device(like_, parameter, "maps", name);
      TORCH_CHECK_VALUE(parameter.is_contiguous(), name, " are contiguous.");
      int64_t from = 0;
      for (; b < args.branches && from + args.branch[b].C <= parameter.size(0); from += args.branch[b++].C)
        f(args.branch[b], static_cast<char*>(parameter.data_ptr()) + from * parameter.element_size());
      TORCH_CHECK_VALUE(from == parameter.size(0), name, " do not fit the maps' channels.");
    }
    TORCH_CHECK_VALUE(b == args.branches, name, " do not fit the maps' channels.");
  }

  Tensor like_;
};

// ---------------------------------------------------------------------------------------------------------------------
// pool_norm_relu

Operands pool_operands(const Tensor& x, bool training) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x has the shape (N, C, h, w), not ", x.sizes(), ".");
  TORCH_CHECK_VALUE(x.size(2) >= 1 && x.size(3) >= 1, "maps have at least one row and one column.");
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
    outputs.push_back(empty_map(x, x.stride(1) == 1, {operands.args.N, branch.C, branch.H, branch.W}));
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
  TORCH_CHECK_VALUE(grads.size() == kPools, "there is a gradient of each of the ", kPools, " pools.");
  for (int p = 0; p < kPools; ++p) {
    Branch& branch = operands.args.branch[p];
    branch.out = operands.view(grads[p], branch.C, branch.H, branch.W);
  }
  const Tensor grad = at::empty_like(x, {}, at::MemoryFormat::Preserve);
  operands.args.branch[0].grad_resampled = view_of(grad);
  kernel(operands.args, x);
  return {std::vector<Tensor>{grad}, operands.grad_norms};
}

// ---------------------------------------------------------------------------------------------------------------------
// add_norm_relu

// Returns the first map that is given, whose dtype and device all others must have.
Tensor first_map(const Maps& resampled, const Maps& added) {
  Tensor found;
  for (const Maps* maps : {&resampled, &added})
    for (const std::optional<Tensor>& map : *maps) {
      if (!map.has_value()) continue;
      TORCH_CHECK_VALUE(map->dim() == 4, "maps have the shape (N, C, h, w), not ", map->sizes(), ".");
      if (!found.defined()) found = *map;
    }
  TORCH_CHECK_VALUE(found.defined(), "there is no map.");
  return found;
}

Operands add_operands(const Tensor& like, const Maps& resampled, const Maps& added, int64_t height, int64_t width,
                      bool joined, bool training) {
  TORCH_CHECK_VALUE(resampled.size() == added.size(), "each branch has a resampled and an added map, or none.");
  TORCH_CHECK_VALUE(joined || resampled.size() <= 2, "more than two maps come joined.");
  Operands operands(like, training);
  for (size_t b = 0; b < resampled.size(); ++b) {
    const std::optional<Tensor> low = resampled[b], map = added[b];
    TORCH_CHECK_VALUE(low.has_value() || map.has_value(), "branch ", b, " has no map.");
    const int64_t C = low.has_value() ? low->size(1) : map->size(1), sides[] = {height, width};
    Branch& branch = operands.add_branch(C, low.has_value() ? low->sizes().slice(2) : at::IntArrayRef(sides), sides);
    if (low.has_value()) branch.resampled = operands.view(*low, C, branch.h, branch.w);
    if (map.has_value()) branch.added = operands.view(*map, C, height, width);
  }
  return operands;
}

template <Kernel kernel>
std::tuple<Tensor, Tensor, Tensor> add_norm_relu(const Maps& resampled, const Maps& added, TensorList weights,
                                                 TensorList biases, TensorList means, TensorList variances,
                                                 int64_t height, int64_t width, bool channels_last, bool joined,
                                                 bool training, double momentum, double eps) {
  const Tensor like = first_map(resampled, added);
  Operands operands = add_operands(like, resampled, added, height, width, joined, training);
  operands.set_norms(weights, biases);
  operands.set_running(means, variances, momentum, eps);
  operands.make_stats();
  const auto make_output = [&](int64_t channels) {
    return empty_map(like, channels_last, {operands.args.N, channels, height, width});
  };
  Tensor outputs[] = {make_output(joined ? operands.args.channels : operands.args.branch[0].C),
                      at::empty({0}, like.options())};
  if (!joined && operands.args.branches == 2) outputs[1] = make_output(operands.args.branch[1].C);
  for (int b = 0; b < operands.args.branches; ++b) {
    Branch& branch = operands.args.branch[b];
    branch.out = view_of(joined ? outputs[0].narrow(1, branch.first, branch.C) : outputs[b]);
  }
  kernel(operands.args, like);
  return {outputs[0], outputs[1], operands.stats};
}

template <Kernel kernel>
std::tuple<std::vector<Tensor>, Tensor> add_norm_relu_backward(TensorList grads, const Maps& resampled,
                                                               const Maps& added, TensorList weights, TensorList biases,
                                                               const Tensor& stats, int64_t height, int64_t width,
                                                               bool /*channels_last*/, bool joined, bool training) {
  const Tensor like = first_map(resampled, added);
  Operands operands = add_operands(like, resampled, added, height, width, joined, training);
  operands.set_norms(weights, biases);
  operands.take_stats(stats);
  TORCH_CHECK_VALUE(grads.size() == 2, "there is a gradient of each output.");
  if (joined) operands.view(grads[0], operands.args.channels, height, width);
  for (int b = 0; b < operands.args.branches; ++b) {
    Branch& branch = operands.args.branch[b];
    branch.out = operands.view(joined ? grads[0].narrow(1, branch.first, branch.C) : grads[b], branch.C, height, width);
  }
  std::vector<Tensor> grad_maps;  // first of resampled maps, then of added ones
  const auto make_like = [&](const Maps& maps, MapView Branch::* view) {
    for (int b = 0; b < operands.args.branches; ++b) {
      const std::optional<Tensor> map = maps[b];
      if (!map.has_value()) continue;
      grad_maps.push_back(at::empty_like(*map, {}, at::MemoryFormat::Preserve));
      operands.args.branch[b].*view = view_of(grad_maps.back());
    }
  };
  make_like(resampled, &Branch::grad_resampled);
  make_like(added, &Branch::grad_added);
  kernel(operands.args, like);
  return {grad_maps, operands.grad_norms};
}

template <Kernel pool, Kernel pool_backward, Kernel add, Kernel add_backward>
void register_ops(torch::Library& m) {
  m.impl("pool_norm_relu", &pool_norm_relu<pool>);
  m.impl("pool_norm_relu_backward", &pool_norm_relu_backward<pool_backward>);
  m.impl("add_norm_relu", &add_norm_relu<add>);
  m.impl("add_norm_relu_backward", &add_norm_relu_backward<add_backward>);
}

#ifndef BCMF_EMULATED
template <void (*kernel)(const NormReluArgs&)>
void run_on_cpu(const NormReluArgs& args, const Tensor&) {
  if (args.N > 0) kernel(args);
}
#endif
#ifdef BCMF_WITH_CUDA
template <int (*kernel)(const NormReluArgs&, void*, cuda::Stream), int64_t (*scratch_bytes)(const NormReluArgs&, bool),
          bool backward>
void run_on_cuda(const NormReluArgs& args, const Tensor& like) {
  if (args.N == 0) return;
  const c10::cuda::CUDAGuard guard(like.device());
  const Tensor scratch = make_scratch(like, scratch_bytes(args, backward));
  check_launch(kernel(args, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

}  // namespace

#ifndef BCMF_EMULATED
void register_lmfm_cpu(torch::Library& m) {
  register_ops<run_on_cpu<cpu::pool_forward>, run_on_cpu<cpu::pool_backward>, run_on_cpu<cpu::add_forward>,
               run_on_cpu<cpu::add_backward>>(m);
}
#endif
#ifdef BCMF_WITH_CUDA
void register_lmfm_cuda(torch::Library& m) {
  register_ops<run_on_cuda<cuda::pool_forward, cuda::pool_scratch, false>,
               run_on_cuda<cuda::pool_backward, cuda::pool_scratch, true>,
               run_on_cuda<cuda::add_forward, cuda::add_scratch, false>,
               run_on_cuda<cuda::add_backward, cuda::add_scratch, true>>(m);
}
#endif

}  // namespace bcmf
