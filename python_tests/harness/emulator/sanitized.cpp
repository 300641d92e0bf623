// The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: an executable of its own, because a sanitizer has
// to be there from the start of a process. Every tensor is a heap block of its exact size, NaN where the kernels write.
// A new op adds a function here and a line in main. test_emulator.py runs it.

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cuda/lmfm/lmfm.cu"
#include "cuda/loss.cu"
#include "cuda/srm.cu"

namespace {

std::mt19937 random_bits(7);

struct Memory {
  std::unique_ptr<char[]> bytes;
  size_t size;
  explicit Memory(size_t size) : bytes(new char[size]), size(size) { memset(bytes.get(), 0xff, size); }
  void* data() { return bytes.get(); }
  bool operator==(const Memory& other) const { return memcmp(bytes.get(), other.bytes.get(), size) == 0; }
};

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

template <typename Scalar>
Memory random_logits(int64_t count) {
  std::normal_distribution<float> normal(0, 3);
  Memory memory(count * sizeof(Scalar));
  for (int64_t i = 0; i < count; ++i) static_cast<Scalar*>(memory.data())[i] = static_cast<Scalar>(normal(random_bits));
  return memory;
}

Memory random_labels(int64_t count, int64_t classes, bool bad) {  // some are ignored (255), some bad if asked for
  Memory memory(count);
  for (int64_t i = 0; i < count; ++i) {
    const unsigned draw = random_bits();
    static_cast<uint8_t*>(memory.data())[i] = draw % 10 == 0 ? 255 : bad && draw % 97 == 0 ? 254 : draw % classes;
  }
  return memory;
}

// What is asked of bcmf::loss. OHEM's threshold 0.5 leaves enough hard pixels, 20 leaves none: the selection runs.
struct Options {
  bool weighted = false, bad_labels = false;
  double threshold = 0;  // OHEM's; 0 where there is no OHEM
  int bcl_steps = 0, cpg_radius = 0;
  bool flipped = false, align_corners = false, channels_last = false;
};

struct Size {  // the sizes of logits and of labels
  int64_t n, c, h, w, H, W;
};

bcmf::LossArgs arguments(bcmf::FloatType type, Memory& logits, Memory& grad, Memory& labels, Size size,
                         Options options) {
  bcmf::LossArgs args = {};
  args.N = size.n, args.C = size.c, args.H = size.H, args.W = size.W, args.h = size.h, args.w = size.w;
  args.align_corners = options.align_corners;
  args.ce = true;
  args.logits = {logits.data(), type, size.c * size.h * size.w, size.h * size.w, size.w, 1};
  if (options.channels_last) args.logits = {logits.data(), type, size.c * size.h * size.w, 1, size.w * size.c, size.c};
  args.grad = args.logits;
  args.grad.data = grad.data();
  args.labels = {labels.data(), bcmf::LabelType::u8, size.H * size.W, size.W, 1};
  args.ignore_index = 255;
  args.ohem = options.threshold > 0;
  args.ohem_cutoff = options.threshold;
  args.ohem_min_kept = size.n * size.H * size.W / 2;
  args.bcl_steps = options.bcl_steps;
  for (int s = 0; s < options.bcl_steps; ++s) args.bcl_step[s] = s + 1;
  args.bcl_weight = 0.4, args.bcl_flipped = options.flipped, args.bcl_alpha = 0.5, args.bcl_beta = 0.25;
  args.bcl_cutoff = 0.4, args.bcl_nms_radius = 1;
  args.cpg_radius = options.cpg_radius, args.cpg_window = !options.flipped, args.cpg_weight = 0.7;
  return args;
}

// Tensors of bcmf::loss, and its forward and backward over them.
template <typename Scalar>
struct Loss {
  using Acc = typename bcmf::device::AccOf<Scalar>::type;
  int64_t pixels;
  Memory logits, weight, labels, stats, nll, sums, cutoff, total, grad, summary, terms, grad_total, selected;
  bcmf::LossArgs args;
  Memory marks;

  Loss(bcmf::FloatType type, Size size, Options options)
      : pixels(size.n * size.H * size.W),
        logits(random_logits<Scalar>(size.n * size.c * size.h * size.w)),
        weight(size.c * sizeof(Acc)),
        labels(random_labels(pixels, size.c, options.bad_labels)),
        stats(2 * pixels * sizeof(Acc)),
        nll(pixels * sizeof(Acc)),
        sums(bcmf::kSums * sizeof(double)),
        cutoff(sizeof(Acc)),
        total(sizeof(Acc)),
        grad(logits.size),
        summary(bcmf::kSummarySize * sizeof(Acc)),
        terms(bcmf::kTerms * sizeof(Acc)),
        grad_total(sizeof(Acc)),
        selected(options.bcl_steps > 0 ? pixels : 0),
        args(arguments(type, logits, grad, labels, size, options)),
        marks(bcmf::cuda::loss_mark_bytes(args)) {
    for (int64_t i = 0; i < size.c; ++i) static_cast<Acc*>(weight.data())[i] = static_cast<Acc>(1 + i);
    *static_cast<Acc*>(grad_total.data()) = 2;
    args.weight = options.weighted ? weight.data() : nullptr;
    args.nll = args.ohem ? nll.data() : nullptr;
    args.stats = stats.data();
    args.selected = selected.data();
    args.marks = marks.data();
    args.sums = static_cast<double*>(sums.data());
    args.cutoff = cutoff.data();
    args.total = total.data();
    args.terms = terms.data();
    args.summary = summary.data();
    args.grad_total = grad_total.data();
  }

  void run() {
    Memory forward_scratch(bcmf::cuda::loss_sums_scratch(args));
    bcmf::cuda::loss_sums(args, forward_scratch.data(), nullptr);
    bcmf::cuda::loss_finish(args, sizeof(Acc) == 8 ? bcmf::FloatType::f64 : bcmf::FloatType::f32, nullptr);
    Memory backward_scratch(bcmf::cuda::loss_backward_scratch(args));
    bcmf::cuda::loss_backward(args, backward_scratch.data(), nullptr);
  }
};

// Fails unless every order of threads gives the same bits.
template <typename Scalar>
void check_loss(bcmf::FloatType type, Size size, Options options) {
  const auto before = random_bits;
  std::vector<Memory> expected;
  for (const auto order : {emulator::Order::forward, emulator::Order::reversed, emulator::Order::shuffled}) {
    emulator::order = order;
    random_bits = before;
    Loss<Scalar> loss(type, size, options);
    loss.run();
    const auto cutoff = static_cast<typename Loss<Scalar>::Acc*>(loss.summary.data())[bcmf::kCutoff];
    require(options.threshold != 20 || loss.pixels <= 1 || cutoff < options.threshold, "OHEM's selection did not run");
    std::vector<Memory> found;
    for (Memory* result :
         {&loss.sums, &loss.total, &loss.terms, &loss.summary, &loss.stats, &loss.selected, &loss.grad})
      found.push_back(std::move(*result));
    if (expected.empty())
      expected = std::move(found);
    else
      require(found == expected, "bcmf::loss gives other bits in another order of threads");
  }
}

// Somebody else refills labels, statistics, selections and summaries before each kernel: each finds other ids than the
// one before it, and some are none. Whatever comes out, no kernel reads or writes outside its tensors.
template <typename Scalar>
void check_hostile(bcmf::FloatType type, Size size, Options options) {
  Loss<Scalar> loss(type, size, options);
  emulator::before_launch = [&] {
    memcpy(loss.labels.data(), random_labels(loss.pixels, size.c, true).data(), loss.labels.size);
    for (Memory* memory : {&loss.stats, &loss.selected, &loss.marks, &loss.summary})
      for (size_t i = 0; i < memory->size; ++i)
        if (random_bits() % 4 == 0) memory->bytes[i] = static_cast<char>(random_bits());
  };
  loss.run();
  emulator::before_launch = nullptr;
}

template <typename Scalar>
void check_loss(bcmf::FloatType type) {
  for (const bool weighted : {false, true})
    for (const bool bad_labels : {false, true})
      for (const double threshold : {0.0, 0.5, 20.0}) {
        if (type != bcmf::FloatType::f32 && !(weighted && bad_labels))
          continue;  // other types differ from fp32 only where they are read and written
        const Options options = {weighted, bad_labels, threshold};
        check_loss<Scalar>(type, {2, 5, 17, 37, 17, 37}, options);
        check_loss<Scalar>(type, {1, 2, 1, 1, 1, 1}, options);
        check_loss<Scalar>(type, {1, 19, 3, 257, 3, 257}, options);
        check_loss<Scalar>(type, {0, 3, 4, 4, 4, 4}, options);
      }
  for (const Size size : {Size{2, 3, 18, 72, 18, 72}, {1, 50, 2, 68, 2, 68}})  // a thread takes several pixels at once
    for (const bool channels_last : {false, true})
      check_loss<Scalar>(type, size, {true, true, 0.5, 1, 1, false, false, channels_last});
  int radius = 0;
  for (const Size size : {Size{1, 3, 19, 70, 19, 70},
                          {2, 3, 3, 4, 18, 67},
                          {1, 3, 3, 9, 24, 72},
                          {1, 2, 1, 1, 5, 4},
                          {1, 3, 9, 20, 4, 30}}) {
    const Options every = {true, true, 0.5, 2, 1 + radius++ % 3, radius % 2 == 0, radius % 2 == 1};
    check_loss<Scalar>(type, size, every);
    check_loss<Scalar>(type, size, {});
    for (int repeat = 0; repeat < 4; ++repeat) check_hostile<Scalar>(type, size, every);
  }
}

// axis_start is the inverse of axis_tap, for all small sizes.
void check_geometry() {
  for (const bool align_corners : {false, true})
    for (int64_t in = 1; in <= 24; ++in)
      for (int64_t out = 1; out <= 24; ++out)
        for (int64_t cell = -1; cell <= in + 1; ++cell) {
          int64_t start = 0;
          while (start < out && bcmf::axis_tap<double>(start, in, out, align_corners).first < cell) ++start;
          require(bcmf::axis_start(cell, in, out, align_corners) == start, "axis_start is not where the cell begins");
        }
}

template <typename Scalar>
void check_argmax(bcmf::FloatType type) {
  for (const Size size : {Size{2, 5, 3, 4, 17, 70}, {1, 300, 5, 6, 5, 6}, {1, 5, 17, 72, 17, 72}}) {
    Memory logits = random_logits<Scalar>(size.n * size.c * size.h * size.w), none(0);
    const bcmf::LossArgs args = arguments(type, logits, none, none, size, {});
    Memory classes(size.n * size.H * size.W * (size.c <= 256 ? 1 : 4));
    bcmf::cuda::upsample_argmax(args, classes.data(), nullptr);
    require(size.c > 256 || *static_cast<uint8_t*>(classes.data()) < size.c, "upsample_argmax finds no class");
  }
}

// Maps, each a heap block of its exact size, and a view of each.
template <typename Scalar>
struct Maps {
  bcmf::FloatType type;
  bool channels_last;
  std::vector<Memory> kept;

  bcmf::MapView add(int64_t n, int64_t c, int64_t h, int64_t w, bool written) {
    kept.push_back(written ? Memory(n * c * h * w * sizeof(Scalar)) : random_logits<Scalar>(n * c * h * w));
    if (channels_last) return {kept.back().data(), type, c * h * w, 1, w * c, c};
    return {kept.back().data(), type, c * h * w, h * w, w, 1};
  }
};

// Parameters and results of a call's norms, per channel.
template <typename Acc>
struct Norms {
  Memory weight, bias, mean, variance, stats, grad_norms;

  explicit Norms(int64_t channels)
      : weight(random_logits<Acc>(channels)),
        bias(random_logits<Acc>(channels)),
        mean(random_logits<Acc>(channels)),
        variance(random_logits<Acc>(channels)),
        stats(2 * channels * sizeof(Acc)),
        grad_norms(2 * channels * sizeof(Acc)) {
    for (int64_t i = 0; i < channels; ++i)
      static_cast<Acc*>(variance.data())[i] = std::abs(static_cast<Acc*>(variance.data())[i]) + 1;
  }
  void give(bcmf::NormReluArgs& args) {
    args.stats = stats.data(), args.grad_norms = grad_norms.data();
    args.momentum = 0.1, args.eps = 1e-5;
    for (int b = 0; b < args.branches; ++b) {
      const auto part = [&](Memory& memory) { return static_cast<Acc*>(memory.data()) + args.branch[b].first; };
      args.branch[b].weight = part(weight), args.branch[b].bias = part(bias);
      args.branch[b].mean = part(mean), args.branch[b].variance = part(variance);
    }
  }
};

// An op of LMFM, forward and backward: the same bits in every order of threads. add_branches(args, maps): inputs,
// outputs and gradients. run(args): forward, then backward, where branches' outputs are gradients.
template <typename Scalar, typename Add, typename Run>
void check_norm_relu(bcmf::FloatType type, bool channels_last, bool training, Add add_branches, Run run) {
  using Acc = typename bcmf::device::AccOf<Scalar>::type;
  std::vector<Memory> expected;
  for (const auto order : {emulator::Order::forward, emulator::Order::reversed, emulator::Order::shuffled}) {
    emulator::order = order;
    random_bits.seed(7);
    Maps<Scalar> maps{type, channels_last, {}};
    bcmf::NormReluArgs args = {};
    args.type = type, args.training = training;
    add_branches(args, maps);
    Norms<Acc> norms(args.channels);
    norms.give(args);
    run(args);
    std::vector<Memory> found = std::move(maps.kept);
    for (Memory* result : {&norms.stats, &norms.grad_norms, &norms.mean, &norms.variance})
      found.push_back(std::move(*result));
    if (expected.empty())
      expected = std::move(found);
    else
      require(found == expected, "LMFM's kernels give other bits in another order of threads");
  }
}

template <typename Scalar>
void check_pools(bcmf::FloatType type, bool channels_last, bool training, int64_t n, int64_t c, int64_t h, int64_t w) {
  const auto add_branches = [=](bcmf::NormReluArgs& args, Maps<Scalar>& maps) {
    args.N = n, args.branches = bcmf::kPools, args.channels = bcmf::kPools * c;
    const bcmf::MapView x = maps.add(n, c, h, w, false), grad = maps.add(n, c, h, w, true);
    for (int p = 0; p < bcmf::kPools; ++p) {
      bcmf::Branch& branch = args.branch[p];
      branch.C = c, branch.h = h, branch.w = w, branch.first = p * c;
      branch.H = bcmf::pool_axis(p, h).out(), branch.W = bcmf::pool_axis(p, w).out();
      branch.resampled = x, branch.grad_resampled = grad;
      branch.out = maps.add(n, c, branch.H, branch.W, true);
    }
  };
  check_norm_relu<Scalar>(type, channels_last, training, add_branches, [](const bcmf::NormReluArgs& args) {
    Memory forward(bcmf::cuda::pool_scratch(args, false)), backward(bcmf::cuda::pool_scratch(args, true));
    bcmf::cuda::pool_forward(args, forward.data(), nullptr);
    bcmf::cuda::pool_backward(args, backward.data(), nullptr);
  });
}

template <typename Scalar>
void check_sums(bcmf::FloatType type, bool channels_last, bool training, int64_t n, int64_t h, int64_t w, int64_t H,
                int64_t W) {
  const auto add_branches = [=](bcmf::NormReluArgs& args, Maps<Scalar>& maps) {
    args.N = n, args.branches = 3;
    for (int b = 0; b < args.branches; ++b) {  // branches have both maps, the resampled one or the added one
      bcmf::Branch& branch = args.branch[b];
      branch.C = 2 * b + 3, branch.h = h, branch.w = w, branch.H = H, branch.W = W, branch.first = args.channels;
      args.channels += branch.C;
      if (b != 2) branch.resampled = maps.add(n, branch.C, h, w, false);
      if (b != 2) branch.grad_resampled = maps.add(n, branch.C, h, w, true);
      if (b != 1) branch.added = maps.add(n, branch.C, H, W, false);
      if (b != 1) branch.grad_added = maps.add(n, branch.C, H, W, true);
      branch.out = maps.add(n, branch.C, H, W, true);
    }
  };
  check_norm_relu<Scalar>(type, channels_last, training, add_branches, [](const bcmf::NormReluArgs& args) {
    Memory forward(bcmf::cuda::add_scratch(args, false)), backward(bcmf::cuda::add_scratch(args, true));
    bcmf::cuda::add_forward(args, forward.data(), nullptr);
    bcmf::cuda::add_backward(args, backward.data(), nullptr);
  });
}

template <typename Scalar>
void check_lmfm(bcmf::FloatType type) {
  check_pools<Scalar>(type, true, true, 2, 5, 17, 6);
  check_sums<Scalar>(type, false, true, 2, 5, 3, 17, 6);
  if (type != bcmf::FloatType::f32) return;  // other types differ only where a map is read and written
  check_pools<Scalar>(type, false, false, 3, 1, 1, 1);
  check_pools<Scalar>(type, false, true, 1, 2, 3, 35);
  check_sums<Scalar>(type, true, false, 2, 1, 1, 3, 35);
  check_sums<Scalar>(type, true, true, 2, 6, 9, 4, 4);
}

template <typename Scalar>
void check(bcmf::FloatType type) {
  check_loss<Scalar>(type);
  check_argmax<Scalar>(type);
  check_lmfm<Scalar>(type);
}

}  // namespace

int main() {
  check_geometry();
  check<float>(bcmf::FloatType::f32);
  check<double>(bcmf::FloatType::f64);
  check<__half>(bcmf::FloatType::f16);
  check<__nv_bfloat16>(bcmf::FloatType::bf16);
  std::printf("clean\n");
}
