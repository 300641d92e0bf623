#include "labels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

namespace bcmf::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // pixels

// Which values of a type are classes, and which is ignored.
template <typename Id>
struct Ids {
  Id last, ignored;
  bool ignores;

  Ids(int64_t classes, int64_t ignore_index)
      : last(static_cast<Id>(std::min<int64_t>(classes - 1, std::numeric_limits<Id>::max()))),
        ignored(static_cast<Id>(ignore_index)),
        ignores(static_cast<int64_t>(ignored) == ignore_index) {}
  bool is_class(Id id) const { return id >= 0 && id <= last; }
  bool is_valid(Id id) const { return !ignores || id != ignored; }
};

template <typename Guess, typename Truth, typename Out>
int64_t read_range(const Guess* prediction, const Truth* target, int64_t count, Ids<Guess> guesses, Ids<Truth> truths,
                   Out none, Out* __restrict guess, Out* __restrict truth) {
  int64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool valid = truths.is_valid(target[i]);
    const bool right = guesses.is_class(prediction[i]) & truths.is_class(target[i]);
    guess[i] = valid & right ? static_cast<Out>(prediction[i]) : none;
    truth[i] = valid & right ? static_cast<Out>(target[i]) : none;
    outside += valid & !right;
  }
  return outside;
}

// Where in the counts a label's row or column begins; the last is of labels that are not counted.
template <typename Label>
struct Places {
  int64_t count, step;
  int64_t operator()(Label label) const { return std::min<int64_t>(static_cast<uint32_t>(label), count) * step; }
};
template <>
struct Places<uint8_t> {
  int32_t place[256];
  Places(int64_t count, int64_t step) {
    for (int64_t label = 0; label < 256; ++label) place[label] = static_cast<int32_t>(std::min(label, count) * step);
  }
  int64_t operator()(uint8_t label) const { return place[label]; }
};

template <typename A, typename B>
void count_all(const A* a, const B* b, int64_t count, int64_t rows, int64_t columns, int64_t* pairs) {
  const Places<A> row_place{rows, columns + 1};
  const Places<B> column_place{columns, 1};
  // Neighbours are mostly the same pair, and adding to a count waits for the last sum: four counts take turns.
  const int64_t bins = (rows + 1) * (columns + 1), copies = bins > 4096 ? 1 : 4;
  std::vector<int64_t> found(copies * bins);
  int64_t* turns[4];
  for (int64_t turn = 0; turn < 4; ++turn) turns[turn] = found.data() + turn % copies * bins;
  for (int64_t i = 0; i < count; ++i) ++turns[i % 4][row_place(a[i]) + column_place(b[i])];
  for (int64_t copy = 0; copy < copies; ++copy)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column)
        pairs[row * columns + column] += found[copy * bins + row * (columns + 1) + column];
}

template <typename F>
void for_type(const at::Tensor& labels, F f) {
  labels.scalar_type() == at::kByte ? f(uint8_t{}) : f(int32_t{});
}

}  // namespace

int64_t read_labels(const at::Tensor& prediction, const at::Tensor& target, int64_t classes, int64_t ignore_index,
                    const at::Tensor& guess, const at::Tensor& truth) {
  std::atomic<int64_t> outside = 0;
  AT_DISPATCH_INTEGRAL_TYPES(prediction.scalar_type(), "read_labels", [&] {
    using Guess = scalar_t;
    AT_DISPATCH_INTEGRAL_TYPES(target.scalar_type(), "read_labels", [&] {
      using Truth = scalar_t;
      for_type(guess, [&](auto out) {
        using Out = decltype(out);
        const Guess* const from = prediction.const_data_ptr<Guess>();
        const Truth* const labels = target.const_data_ptr<Truth>();
        Out *const to = guess.mutable_data_ptr<Out>(), *const to_truth = truth.mutable_data_ptr<Out>();
        const Ids<Guess> guesses(classes, ignore_index);
        const Ids<Truth> truths(classes, ignore_index);
        at::parallel_for(0, target.numel(), kGrain, [&](int64_t begin, int64_t end) {
          outside += read_range(from + begin, labels + begin, end - begin, guesses, truths, static_cast<Out>(classes),
                                to + begin, to_truth + begin);
        });
      });
    });
  });
  return outside;
}

void count_pairs(const at::Tensor& a, const at::Tensor& b, const at::Tensor& pairs) {
  for_type(a, [&](auto first) {
    for_type(b, [&](auto second) {
      using A = decltype(first);
      using B = decltype(second);
      count_all(a.const_data_ptr<A>(), b.const_data_ptr<B>(), a.numel(), pairs.size(0), pairs.size(1),
                pairs.mutable_data_ptr<int64_t>());
    });
  });
}

}  // namespace bcmf::cpu
