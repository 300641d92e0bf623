#include "cpu/labels.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/read_once.h"

namespace bcmf::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // pixels

// Tells which labels are classes, and which are ignored. It decides as classify_label (common/args.h) does, but in the
// labels' own type, so that eight times as many uint8 are compared at once.
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

// Labels that change meanwhile may leave anything in the maps. That is safe: no id is used as an index here, and the
// kernels that take the maps check them.
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

// Tells where in the counts the row or the column of a label begins. Labels that are not counted share the last one.
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
void count_all(const CountPairsArgs& args) {
  const auto* const a = static_cast<const A*>(args.a);
  const auto* const b = static_cast<const B*>(args.b);
  const int64_t rows = args.rows, columns = args.columns;
  const Places<A> row_place{rows, columns + 1};
  const Places<B> column_place{columns, 1};
  // Neighbours are mostly the same pair, and adding to a count has to wait for the last addition to it: so four counts
  // take turns.
  const int64_t bins = (rows + 1) * (columns + 1), copies = bins > 4096 ? 1 : 4;
  std::vector<int64_t> found(copies * bins);
  int64_t* turns[4];
  for (int64_t turn = 0; turn < 4; ++turn) turns[turn] = found.data() + turn % copies * bins;
  for (int64_t i = 0; i < args.count; ++i) ++turns[i % 4][row_place(read_once(a + i)) + column_place(read_once(b + i))];
  for (int64_t copy = 0; copy < copies; ++copy)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column)
        args.pairs[row * columns + column] += found[copy * bins + row * (columns + 1) + column];
}

// Calls f with a null pointer to labels of this type: only the pointer's type matters.
template <typename F>
void for_type(LabelType type, F f) {
  switch (type) {
    case LabelType::u8:
      return f(static_cast<const uint8_t*>(nullptr));
    case LabelType::i16:
      return f(static_cast<const int16_t*>(nullptr));
    case LabelType::i32:
      return f(static_cast<const int32_t*>(nullptr));
    case LabelType::i64:
      return f(static_cast<const int64_t*>(nullptr));
  }
}

template <typename Guess, typename Truth, typename Out>
int64_t read_all(const ReadLabelsArgs& args) {
  const auto* const prediction = static_cast<const Guess*>(args.prediction);
  const auto* const target = static_cast<const Truth*>(args.target);
  const Ids<Guess> guesses(args.classes, args.ignore_index);
  const Ids<Truth> truths(args.classes, args.ignore_index);
  std::atomic<int64_t> outside = 0;
  parallel_for(0, args.count, kGrain, [&](int64_t begin, int64_t end) {
    outside +=
        read_range(prediction + begin, target + begin, end - begin, guesses, truths, static_cast<Out>(args.classes),
                   static_cast<Out*>(args.guess) + begin, static_cast<Out*>(args.truth) + begin);
  });
  return outside;
}

}  // namespace

int64_t read_labels(const ReadLabelsArgs& args) {
  int64_t outside = 0;
  for_type(args.prediction_type, [&]<typename Guess>(const Guess*) {
    for_type(args.target_type, [&]<typename Truth>(const Truth*) {
      outside = args.wide ? read_all<Guess, Truth, int32_t>(args) : read_all<Guess, Truth, uint8_t>(args);
    });
  });
  return outside;
}

void count_pairs(const CountPairsArgs& args) {
  if (args.a_wide)
    args.b_wide ? count_all<int32_t, int32_t>(args) : count_all<int32_t, uint8_t>(args);
  else
    args.b_wide ? count_all<uint8_t, int32_t>(args) : count_all<uint8_t, uint8_t>(args);
}

}  // namespace bcmf::cpu
