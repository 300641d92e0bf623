// bcmf::match_within's CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with maps that are heap
// blocks of their exact size, against a search of all sites. test_emulator.py runs it.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#define BCMF_ISA sanitized
#define BCMF_VECTOR_BYTES 64
#include "cpu/match.cpp"
#include "cpu/match_kernel.inl"

const bcmf::cpu::Isa& bcmf::cpu::isa() {
  static const Isa sanitized = {"sanitized", {}, {}, sanitized::match::kernels};
  return sanitized;
}

namespace {

std::mt19937 random_bits(7);

// One of `every` pixels has a class; others none, or a negative label.
template <typename Label>
std::unique_ptr<Label[]> random_map(int64_t count, int64_t classes, unsigned every) {
  std::unique_ptr<Label[]> map(new Label[count]);
  for (int64_t i = 0; i < count; ++i) {
    const auto none = static_cast<Label>(random_bits() % 2 ? classes : -1);
    map[i] = random_bits() % every ? none : static_cast<Label>(random_bits() % classes);
  }
  return map;
}

template <typename Label>
void check(int64_t N, int64_t H, int64_t W, int64_t classes, const std::vector<int64_t>& radii, unsigned every = 60) {
  const int64_t count = N * H * W;
  const auto queries = random_map<Label>(count, classes, 2), sites = random_map<Label>(count, classes, every);
  const std::unique_ptr<uint8_t[]> found(new uint8_t[count]);
  bcmf::cpu::match_within({N, H, W, classes, queries.get(), sites.get(), sizeof(Label) == 4, radii.data(),
                           static_cast<int64_t>(radii.size()), found.get()});
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = i / (H * W), y = i / W % H, x = i % W;
    int64_t nearest = int64_t{1} << 40, index = 0;
    for (int64_t j = n * H * W; j < (n + 1) * H * W; ++j) {
      const int64_t dy = j / W % H - y, dx = j % W - x;
      const bool same = queries[i] == sites[j] && queries[i] >= 0 && queries[i] < classes;
      if (same && dy * dy + dx * dx < nearest) nearest = dy * dy + dx * dx;
    }
    for (const int64_t radius : radii) index += radius * radius < nearest;
    if (index == found[i]) continue;
    std::printf("%ld classes, pixel %ld, %ld, %ld of %ld x %ld: %d, not %ld\n", long(classes), long(n), long(y),
                long(x), long(H), long(W), found[i], long(index));
    std::exit(1);
  }
}

}  // namespace

int main() {
  const std::vector<int64_t> few = {1, 3, 12}, none = {0}, most = {17, bcmf::cpu::kMatchMost};
  for (const auto& radii : {few, none, most})
    for (const int64_t classes : {1, 2, 40})
      for (const auto& [H, W] :
           std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {1, 70}, {140, 1}, {7, 33}, {131, 32}}) {
        check<uint8_t>(2, H, W, classes, radii);
        check<int32_t>(2, H, W, classes, radii);
      }
  check<int32_t>(1, 3, 300, 300, most);
  for (const int64_t classes : {1, 2})  // several blocks of rows; sites everywhere, and as good as nowhere
    for (const unsigned every : {1u, 5000u}) check<uint8_t>(1, 400, 6, classes, most, every);
  std::printf("clean\n");
}
