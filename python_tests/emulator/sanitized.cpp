// The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: an executable of its own, because a sanitizer has
// to be there from the start of a process. Every tensor is a heap block of its exact size, NaN where the kernels write.
// A new op adds a function here and a line in main. test_emulator.py runs it.

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "loss.cpp"

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
  double threshold = 0;  // of OHEM; 0: without it
  int bcl_steps = 0, cpg_radius = 0;
  bool flipped = false, align_corners = false, channels_last = false;
};

struct Size {  // of logits and labels
  int64_t n, c, h, w, H, W;
};

bcmf::LossArgs arguments(bcmf::LogitType type, Memory& logits, Memory& grad, Memory& labels, Size size,
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

// Forward and backward of bcmf::loss: the same bits in every order of threads.
template <typename Scalar>
void check_loss(bcmf::LogitType type, Size size, Options options) {
  using Acc = typename bcmf::device::AccOf<Scalar>::type;
  const int64_t pixels = size.n * size.H * size.W;
  Memory logits = random_logits<Scalar>(size.n * size.c * size.h * size.w), weight(size.c * sizeof(Acc));
  Memory labels = random_labels(pixels, size.c, options.bad_labels);
  for (int64_t i = 0; i < size.c; ++i) static_cast<Acc*>(weight.data())[i] = static_cast<Acc>(1 + i);
  std::vector<Memory> expected;
  for (const auto order : {emulator::Order::forward, emulator::Order::reversed, emulator::Order::shuffled}) {
    emulator::order = order;
    Memory stats(2 * pixels * sizeof(Acc)), nll(pixels * sizeof(Acc)), total(sizeof(Acc)), grad(logits.size);
    Memory summary(bcmf::kSummarySize * sizeof(Acc)), terms(bcmf::kTerms * sizeof(Acc)), grad_total(sizeof(Acc));
    Memory selected(options.bcl_steps > 0 ? pixels : 0);
    *static_cast<Acc*>(grad_total.data()) = 2;
    bcmf::LossArgs args = arguments(type, logits, grad, labels, size, options);
    args.weight = options.weighted ? weight.data() : nullptr;
    args.nll = args.ohem ? nll.data() : nullptr;
    args.stats = stats.data();
    args.selected = selected.data();
    args.total = total.data();
    args.terms = terms.data();
    args.summary = summary.data();
    args.grad_total = grad_total.data();
    Memory forward_scratch(bcmf::cuda::loss_forward_scratch(args));
    bcmf::cuda::loss_forward(args, forward_scratch.data(), nullptr);
    Memory backward_scratch(bcmf::cuda::loss_backward_scratch(args));
    bcmf::cuda::loss_backward(args, backward_scratch.data(), nullptr);
    const Acc cutoff = static_cast<Acc*>(summary.data())[bcmf::kCutoff];
    require(options.threshold != 20 || pixels <= 1 || cutoff < options.threshold, "OHEM's selection did not run");
    std::vector<Memory> found;
    for (Memory* result : {&total, &terms, &summary, &stats, &selected, &grad}) found.push_back(std::move(*result));
    if (expected.empty())
      expected = std::move(found);
    else
      require(found == expected, "bcmf::loss gives other bits in another order of threads");
  }
}

template <typename Scalar>
void check_loss(bcmf::LogitType type) {
  for (const bool weighted : {false, true})
    for (const bool bad_labels : {false, true})
      for (const double threshold : {0.0, 0.5, 20.0}) {
        if (sizeof(Scalar) == 2 && !(weighted && bad_labels))
          continue;  // differs from fp32 where it is read and written
        const Options options = {weighted, bad_labels, threshold};
        check_loss<Scalar>(type, {2, 5, 17, 37, 17, 37}, options);
        check_loss<Scalar>(type, {1, 2, 1, 1, 1, 1}, options);
        check_loss<Scalar>(type, {1, 19, 3, 257, 3, 257}, options);
        check_loss<Scalar>(type, {0, 3, 4, 4, 4, 4}, options);
      }
  for (const Size size : {Size{2, 3, 18, 72, 18, 72}, {1, 50, 2, 68, 2, 68}})  // several pixels at once
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
void check_argmax(bcmf::LogitType type) {
  for (const Size size : {Size{2, 5, 3, 4, 17, 70}, {1, 300, 5, 6, 5, 6}, {1, 5, 17, 72, 17, 72}}) {
    Memory logits = random_logits<Scalar>(size.n * size.c * size.h * size.w), none(0);
    const bcmf::LossArgs args = arguments(type, logits, none, none, size, {});
    Memory classes(size.n * size.H * size.W * (size.c <= 256 ? 1 : 4));
    bcmf::cuda::upsample_argmax(args, classes.data(), nullptr);
    require(size.c > 256 || *static_cast<uint8_t*>(classes.data()) < size.c, "upsample_argmax finds no class");
  }
}

template <typename Scalar>
void check(bcmf::LogitType type) {
  check_loss<Scalar>(type);
  check_argmax<Scalar>(type);
}

}  // namespace

int main() {
  check_geometry();
  check<float>(bcmf::LogitType::f32);
  check<double>(bcmf::LogitType::f64);
  check<__half>(bcmf::LogitType::f16);
  check<__nv_bfloat16>(bcmf::LogitType::bf16);
  std::printf("clean\n");
}
