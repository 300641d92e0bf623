// Opcodes that compute a result from registers, lane by lane.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace ptx {
namespace {

std::map<std::string, Opcode> table;

template <typename F, typename To, typename... From>
void run_lanes(Warp& warp, const Instruction& in, Lanes lanes) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    To* to = warp.values<To>(in.to[0]);
    const std::tuple<const From*...> from = {warp.values<From>(in.from[i])...};
    for_lanes(lanes, [&](int lane) { to[lane] = F()(std::get<i>(from)[lane]...); });
  }(std::index_sequence_for<From...>());
}

// Defines an opcode by a function of its operands.
template <typename To, typename... From, typename F>
void define(const std::string& name, F) {
  table[name] = {run_lanes<F, To, From...>, sizeof(To), {sizeof(From)...}};
}

template <typename T>
std::string type_name() {
  const std::string bits = std::to_string(8 * sizeof(T));
  return (std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "s" : "u") + bits;
}

// ---------------------------------------------------------------------------------------------------------------------
// Any numbers

template <typename T>
void define_comparisons() {
  const std::string t = "." + type_name<T>();
  define<Predicate, T, T>("setp.eq" + t, [](T a, T b) { return a == b; });
  define<Predicate, T, T>("setp.ne" + t, [](T a, T b) { return a < b || a > b; });
  define<Predicate, T, T>("setp.lt" + t, [](T a, T b) { return a < b; });
  define<Predicate, T, T>("setp.le" + t, [](T a, T b) { return a <= b; });
  define<Predicate, T, T>("setp.gt" + t, [](T a, T b) { return a > b; });
  define<Predicate, T, T>("setp.ge" + t, [](T a, T b) { return a >= b; });
  if constexpr (std::is_floating_point_v<T>) {  // true of NaN, too
    define<Predicate, T, T>("setp.equ" + t, [](T a, T b) { return !(a < b || a > b); });
    define<Predicate, T, T>("setp.neu" + t, [](T a, T b) { return a != b; });
    define<Predicate, T, T>("setp.ltu" + t, [](T a, T b) { return !(a >= b); });
    define<Predicate, T, T>("setp.leu" + t, [](T a, T b) { return !(a > b); });
    define<Predicate, T, T>("setp.gtu" + t, [](T a, T b) { return !(a <= b); });
    define<Predicate, T, T>("setp.geu" + t, [](T a, T b) { return !(a < b); });
    define<Predicate, T, T>("setp.num" + t, [](T a, T b) { return a == a && b == b; });
    define<Predicate, T, T>("setp.nan" + t, [](T a, T b) { return a != a || b != b; });
  }
}

template <typename T>
void define_moves(const std::string& type = type_name<T>()) {
  define<T, T>("mov." + type, [](T a) { return a; });
  define<T, T, T, Predicate>("selp." + type, [](T a, T b, Predicate choice) { return choice ? a : b; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Floats

// Of two zeros -0 is the smaller one; a NaN loses against a number.
template <typename T>
T smaller(T a, T b) {
  return b != b || a < b || (a == b && std::signbit(a)) ? a : b;
}
template <typename T>
T larger(T a, T b) {
  return b != b || a > b || (a == b && !std::signbit(a)) ? a : b;
}

template <typename T>
void define_float() {
  const std::string t = "." + type_name<T>();
  for (const std::string rounding : {"", ".rn"}) {  // without .rn ptxas may contract them; they round the same way
    define<T, T, T>("add" + rounding + t, [](T a, T b) { return a + b; });
    define<T, T, T>("sub" + rounding + t, [](T a, T b) { return a - b; });
    define<T, T, T>("mul" + rounding + t, [](T a, T b) { return a * b; });
  }
  define<T, T, T>("div.rn" + t, [](T a, T b) { return a / b; });
  define<T, T, T, T>("fma.rn" + t, [](T a, T b, T c) { return std::fma(a, b, c); });
  define<T, T>("rcp.rn" + t, [](T a) { return 1 / a; });
  define<T, T>("sqrt.rn" + t, [](T a) { return std::sqrt(a); });
  define<T, T, T>("min" + t, [](T a, T b) { return smaller(a, b); });
  define<T, T, T>("max" + t, [](T a, T b) { return larger(a, b); });
  define<T, T>("neg" + t, [](T a) { return -a; });
  define<T, T>("abs" + t, [](T a) { return std::fabs(a); });
  define_moves<T>();
  define_comparisons<T>();
}

// Moves a result by as many units as options.ulps allows, up or down, always the same for the same operand.
template <typename Bits>
Bits perturbed(Bits result, Bits operand, Bits unit) {
  if (options.ulps == 0) return result;
  const uint64_t hash = static_cast<uint64_t>(operand) * 0x9e3779b97f4a7c15u;
  const int units = static_cast<int>((hash >> 40) % (2 * options.ulps + 1)) - options.ulps;
  return result + static_cast<Bits>(units) * unit;
}

template <typename T>
T flushed(T x) {  // .ftz: a subnormal number becomes a zero of its sign
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T(0), x) : x;
}

float coarse_power_of_two(float x) {
  x = flushed(x);
  const float exact = flushed(static_cast<float>(std::exp2(static_cast<double>(x))));
  if (exact == 0 || !std::isfinite(exact)) return exact;
  return flushed(
      std::bit_cast<float>(perturbed<uint32_t>(std::bit_cast<uint32_t>(exact), std::bit_cast<uint32_t>(x), 1)));
}

// Of operand and result only the upper 32 bits are used.
double coarse_reciprocal(double x) {
  constexpr uint64_t kUpper = 0xffffffff00000000u;
  const uint64_t upper = std::bit_cast<uint64_t>(flushed(x)) & kUpper;
  const double exact = flushed(1 / std::bit_cast<double>(upper));
  if (exact == 0 || !std::isfinite(exact)) return exact;
  return flushed(
      std::bit_cast<double>(perturbed<uint64_t>(std::bit_cast<uint64_t>(exact) & kUpper, upper, 1ull << 32)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Integers

template <typename T>
using Twice =
    std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                          std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>>;

template <typename T>
void check_divisor(T b) {
  if (b == 0) stop("an integer is divided by 0");
}

template <typename T>
void define_integer() {
  using U = std::make_unsigned_t<T>;  // wraps around
  using Wide = Twice<T>;
  const std::string t = "." + type_name<T>();
  define<T, T, T>("add" + t, [](T a, T b) { return static_cast<T>(U(a) + U(b)); });
  define<T, T, T>("sub" + t, [](T a, T b) { return static_cast<T>(U(a) - U(b)); });
  define<T, T, T>("mul.lo" + t, [](T a, T b) { return static_cast<T>(uint64_t(a) * uint64_t(b)); });
  define<T, T, T>("mul.hi" + t, [](T a, T b) { return static_cast<T>(Wide(a) * Wide(b) >> 8 * sizeof(T)); });
  define<T, T, T, T>("mad.lo" + t, [](T a, T b, T c) { return static_cast<T>(uint64_t(a) * uint64_t(b) + U(c)); });
  if constexpr (sizeof(T) < 8) {
    define<Wide, T, T>("mul.wide" + t, [](T a, T b) { return Wide(a) * Wide(b); });
    define<Wide, T, T, Wide>("mad.wide" + t, [](T a, T b, Wide c) {
      return static_cast<Wide>(std::make_unsigned_t<Wide>(Wide(a) * Wide(b)) + std::make_unsigned_t<Wide>(c));
    });
  }
  define<T, T, T>("div" + t, [](T a, T b) {
    check_divisor(b);
    return std::is_signed_v<T> && b == T(-1) ? static_cast<T>(U(0) - U(a)) : static_cast<T>(a / b);
  });
  define<T, T, T>("rem" + t, [](T a, T b) {
    check_divisor(b);
    return std::is_signed_v<T> && b == T(-1) ? T(0) : static_cast<T>(a % b);
  });
  define<T, T, T>("min" + t, [](T a, T b) { return a < b ? a : b; });
  define<T, T, T>("max" + t, [](T a, T b) { return a > b ? a : b; });
  define<T, T, uint32_t>("shr" + t, [](T a, uint32_t n) {
    return n < 8 * sizeof(T) ? static_cast<T>(a >> n) : static_cast<T>(a < 0 ? -1 : 0);
  });
  if constexpr (std::is_signed_v<T>) {
    define<T, T>("neg" + t, [](T a) { return static_cast<T>(U(0) - U(a)); });
    define<T, T>("abs" + t, [](T a) { return static_cast<T>(a < 0 ? U(0) - U(a) : a); });
  }
  define_moves<T>();
  define_comparisons<T>();
}

template <typename U>
void define_logic(const std::string& type) {
  define<U, U, U>("and." + type, [](U a, U b) { return static_cast<U>(a & b); });
  define<U, U, U>("or." + type, [](U a, U b) { return static_cast<U>(a | b); });
  define<U, U, U>("xor." + type, [](U a, U b) { return static_cast<U>(a ^ b); });
}

template <typename U>
void define_bits() {
  const std::string type = "b" + std::to_string(8 * sizeof(U)), t = "." + type;
  define_logic<U>(type);
  define_moves<U>(type);
  define<U, U>("not" + t, [](U a) { return static_cast<U>(~a); });
  define<U, U, uint32_t>("shl" + t, [](U a, uint32_t n) { return static_cast<U>(n < 8 * sizeof(U) ? a << n : 0); });
  define<Predicate, U, U>("setp.eq" + t, [](U a, U b) { return a == b; });
  define<Predicate, U, U>("setp.ne" + t, [](U a, U b) { return a != b; });
  if constexpr (sizeof(U) >= 4) {
    define<uint32_t, U>("popc" + t, [](U a) { return static_cast<uint32_t>(std::popcount(a)); });
    define<uint32_t, U>("clz" + t, [](U a) { return static_cast<uint32_t>(std::countl_zero(a)); });
    define<U, U>("brev" + t, [](U a) {
      U reversed = 0;
      for (unsigned i = 0; i < 8 * sizeof(U); ++i) reversed = reversed << 1 | (a >> i & 1);
      return reversed;
    });
  }
}

// Each byte of the result is one of the eight bytes of b and a, or, where the number's upper bit is set, copies of its
// sign.
uint32_t permuted(uint32_t a, uint32_t b, uint32_t numbers) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t number = numbers >> 4 * i & 15;
    const uint32_t byte = both >> 8 * (number & 7) & 0xff;
    result |= (number & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return result;
}

template <typename T>
void define_insertion(const char* opcode) {
  define<T, T, T, uint32_t, uint32_t>(opcode, [](T a, T b, uint32_t position, uint32_t length) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    position &= 255, length &= 255;
    if (position >= kBits) return b;
    const T field = static_cast<T>((length < kBits ? (T{1} << length) - 1 : ~T{0}) << position);
    return static_cast<T>((b & ~field) | (a << position & field));
  });
}

void define_words() {
  define<uint32_t, uint32_t>("bfind.u32", [](uint32_t a) { return a ? 31u - std::countl_zero(a) : 0xffffffffu; });
  define<uint32_t, uint32_t>("bfind.shiftamt.u32",
                             [](uint32_t a) { return a ? uint32_t(std::countl_zero(a)) : 0xffffffffu; });
  define<uint32_t, uint32_t, uint32_t, uint32_t>(
      "prmt.b32", [](uint32_t a, uint32_t b, uint32_t numbers) { return permuted(a, b, numbers); });
  define<uint32_t, uint32_t, uint32_t, uint32_t>("shf.l.wrap.b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return static_cast<uint32_t>((uint64_t{b} << 32 | a) << (n & 31) >> 32);
  });
  define<uint32_t, uint32_t, uint32_t, uint32_t>("shf.r.wrap.b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return static_cast<uint32_t>((uint64_t{b} << 32 | a) >> (n & 31));
  });
  define_insertion<uint32_t>("bfi.b32");
  define_insertion<uint64_t>("bfi.b64");
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversions

template <typename To, typename... From>
void define_extensions() {  // and truncations
  (define<To, From>("cvt." + type_name<To>() + "." + type_name<From>(), [](From a) { return static_cast<To>(a); }),
   ...);
}

template <typename F, typename... I>
void define_roundings() {
  (define<F, I>("cvt.rn." + type_name<F>() + "." + type_name<I>(), [](I a) { return static_cast<F>(a); }), ...);
}

// Towards 0. Too large numbers become the largest. NaN becomes the upper bit alone, or, from 32 bits to 32 bits, 0.
template <typename I, typename F>
I truncated(F a) {
  constexpr I low = std::numeric_limits<I>::min(), high = std::numeric_limits<I>::max();
  if (a != a) return std::max(sizeof(I), sizeof(F)) == 8 ? static_cast<I>(uint64_t{1} << (8 * sizeof(I) - 1)) : I(0);
  return a <= static_cast<F>(low) ? low : a >= static_cast<F>(high) ? high : static_cast<I>(a);
}
template <typename F, typename... I>
void define_truncations() {
  (define<I, F>("cvt.rzi." + type_name<I>() + "." + type_name<F>(), [](F a) { return truncated<I>(a); }), ...);
}

uint16_t to_bf16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
uint16_t to_f16(float x) { return x != x ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

void define_conversions() {
  define_extensions<uint16_t, uint32_t, int32_t, uint64_t, int64_t>();
  define_extensions<int16_t, uint32_t, int32_t, uint64_t, int64_t>();
  define_extensions<uint32_t, uint16_t, int16_t, uint64_t, int64_t>();
  define_extensions<int32_t, uint16_t, int16_t, uint64_t, int64_t>();
  define_extensions<uint64_t, uint16_t, int16_t, uint32_t, int32_t>();
  define_extensions<int64_t, uint16_t, int16_t, uint32_t, int32_t>();
  define<int64_t, uint64_t>("cvt.s64.s32 of b64", [](uint64_t a) { return int64_t{static_cast<int32_t>(a)}; });
  define_roundings<float, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>();
  define_roundings<double, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>();
  define_truncations<float, uint32_t, int32_t, uint64_t, int64_t>();
  define_truncations<double, uint32_t, int32_t, uint64_t, int64_t>();
  define<double, float>("cvt.f64.f32", [](float a) { return static_cast<double>(a); });
  define<float, double>("cvt.rn.f32.f64", [](double a) { return static_cast<float>(a); });
  define<float, uint16_t>("cvt.f32.f16", [](uint16_t a) { return static_cast<float>(std::bit_cast<_Float16>(a)); });
  define<float, uint16_t>("cvt.f32.bf16", [](uint16_t a) { return std::bit_cast<float>(uint32_t{a} << 16); });
  define<uint16_t, float>("cvt.rn.f16.f32", [](float a) { return to_f16(a); });
  define<uint16_t, float>("cvt.rn.bf16.f32", [](float a) { return to_bf16(a); });
  define<uint32_t, float, float>(  // the first operand goes to the upper half
      "cvt.rn.f16x2.f32", [](float a, float b) { return uint32_t{to_f16(a)} << 16 | to_f16(b); });
  define<uint32_t, float, float>("cvt.rn.bf16x2.f32",
                                 [](float a, float b) { return uint32_t{to_bf16(a)} << 16 | to_bf16(b); });
  define<uint64_t, uint64_t>("cvta.to.global.u64", [](uint64_t a) { return a; });
}

void define_all() {
  define_integer<uint16_t>(), define_integer<int16_t>(), define_integer<uint32_t>(), define_integer<int32_t>();
  define_integer<uint64_t>(), define_integer<int64_t>();
  define_bits<uint16_t>(), define_bits<uint32_t>(), define_bits<uint64_t>();
  define_words();
  define_float<float>(), define_float<double>();
  define<float, float>("ex2.approx.ftz.f32", [](float a) { return coarse_power_of_two(a); });
  define<double, double>("rcp.approx.ftz.f64", [](double a) { return coarse_reciprocal(a); });
  define_logic<Predicate>("pred");
  define<Predicate, Predicate>("mov.pred", [](Predicate a) { return a; });
  define<Predicate, Predicate>("not.pred", [](Predicate a) { return !a; });
  define_conversions();
}

}  // namespace

const Opcode* find_arithmetic(const std::string& opcode) {
  if (table.empty()) define_all();
  const auto found = table.find(opcode);
  return found == table.end() ? nullptr : &found->second;
}

std::vector<std::string> arithmetic_opcodes() {
  if (table.empty()) define_all();
  std::vector<std::string> names;
  for (const auto& [name, opcode] : table) names.push_back(name);
  return names;
}

}  // namespace ptx
