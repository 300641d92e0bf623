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
  bool weighted, bad_labels, ohem;
  double threshold;
};

// Forward and backward of bcmf::loss: the same bits in every order of threads.
template <typename Scalar>
void check_loss(bcmf::LogitType type, int64_t n, int64_t c, int64_t h, int64_t w, Options options) {
  using Acc = typename bcmf::device::AccOf<Scalar>::type;
  const int64_t pixels = n * h * w;
  Memory logits = random_logits<Scalar>(c * pixels), weight(c * sizeof(Acc));
  Memory labels = random_labels(pixels, c, options.bad_labels);
  for (int64_t i = 0; i < c; ++i) static_cast<Acc*>(weight.data())[i] = static_cast<Acc>(1 + i);
  std::vector<Memory> expected;
  for (const auto order : {emulator::Order::forward, emulator::Order::reversed, emulator::Order::shuffled}) {
    emulator::order = order;
    Memory stats(2 * pixels * sizeof(Acc)), nll(pixels * sizeof(Acc)), total(sizeof(Acc)), grad(logits.size);
    Memory summary(bcmf::kSummarySize * sizeof(Acc)), terms(bcmf::kTerms * sizeof(Acc)), grad_total(sizeof(Acc));
    *static_cast<Acc*>(grad_total.data()) = 2;
    bcmf::LossArgs args = {};
    args.N = n, args.C = c, args.H = args.h = h, args.W = args.w = w;
    args.ce = true;
    args.logits = {logits.data(), type, c * h * w, h * w, w, 1};
    args.grad = {grad.data(), type, c * h * w, h * w, w, 1};
    args.labels = {labels.data(), bcmf::LabelType::u8, h * w, w, 1};
    args.ignore_index = 255;
    args.weight = options.weighted ? weight.data() : nullptr;
    args.ohem = options.ohem;
    args.ohem_cutoff = options.threshold;
    args.ohem_min_kept = pixels / 2;
    args.nll = options.ohem ? nll.data() : nullptr;
    args.stats = stats.data();
    args.total = total.data();
    args.terms = terms.data();
    args.summary = summary.data();
    args.grad_total = grad_total.data();
    Memory scratch(bcmf::cuda::loss_scratch_bytes(args));
    bcmf::cuda::loss_forward(args, scratch.data(), nullptr);
    bcmf::cuda::loss_backward(args, nullptr);
    const Acc cutoff = static_cast<Acc*>(summary.data())[bcmf::kCutoff];
    const bool selected = options.ohem && options.threshold == 20 && pixels > 1;
    require(!selected || cutoff < options.threshold, "OHEM's selection did not run");
    std::vector<Memory> found;
    for (Memory* result : {&total, &terms, &summary, &stats, &grad}) found.push_back(std::move(*result));
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
        const Options options = {weighted, bad_labels, threshold > 0, threshold};
        check_loss<Scalar>(type, 2, 5, 17, 37, options);
        check_loss<Scalar>(type, 1, 2, 1, 1, options);
        check_loss<Scalar>(type, 1, 19, 3, 1024, options);
        check_loss<Scalar>(type, 0, 3, 4, 4, options);
      }
}

}  // namespace

int main() {
  check_loss<float>(bcmf::LogitType::f32);
  check_loss<double>(bcmf::LogitType::f64);
  check_loss<__half>(bcmf::LogitType::f16);
  check_loss<__nv_bfloat16>(bcmf::LogitType::bf16);
  std::printf("clean\n");
}
