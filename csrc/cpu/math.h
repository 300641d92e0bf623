// Vectors, their exp and log, and conversions of the half formats. It is included once for each instruction set (see
// loss_kernel.inl), and so has only static functions and includes no other headers than these.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define BCMF_INLINE static inline __attribute__((always_inline))

// The compiler would rather take a short loop of known length apart, into single operations, than vectorise it.
#if defined(__clang__)
#define BCMF_LANES
#else
#define BCMF_LANES _Pragma("GCC unroll 1")
#endif
// Loops over the taps of a window, however, are to be taken apart, so that the taps are constants.
#define BCMF_UNROLL _Pragma("GCC unroll 8")

// Calls f(index) for 0..Count-1, each a constant of its own type.
template <int Count, typename F>
BCMF_INLINE void unrolled(F f) {
  [&]<int... Is>(std::integer_sequence<int, Is...>) {
    (f(std::integral_constant<int, Is>()), ...);
  }(std::make_integer_sequence<int, Count>());
}

template <typename To, typename From>
BCMF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// A register of BCMF_VECTOR_BYTES, with the compiler's own operators, lane by lane. Plain loops vectorise, too; these
// are for where values have to stay in registers from one loop to the next.
template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(BCMF_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int64_t kWidth = BCMF_VECTOR_BYTES / sizeof(T);

// Vectors with as many lanes as Vector<T>: of sums, and of the result of a comparison (all bits are set or none).
template <typename T>
struct LanesOf {
  typedef double sums __attribute__((vector_size(kWidth<T> * sizeof(double))));
  using mask = decltype(Vector<T>{} == Vector<T>{});
};
template <typename T>
using Sums = typename LanesOf<T>::sums;
template <typename T>
using Mask = typename LanesOf<T>::mask;
template <typename T>
using Lane = std::remove_reference_t<decltype(Mask<T>{}[0])>;  // an integer as large as T

template <typename T>
BCMF_INLINE Vector<T> load_vector(const T* from) {
  Vector<T> to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
template <typename T>
BCMF_INLINE void store_vector(Vector<T> from, T* to) {
  std::memcpy(to, &from, sizeof(from));
}
template <typename T, typename Lanes>
BCMF_INLINE T add_lanes(Lanes lanes) {
  T sum = 0;
  for (size_t i = 0; i < sizeof(lanes) / sizeof(lanes[0]); ++i) sum += lanes[i];
  return sum;
}
// Returns the lanes of `from` at these places.
template <typename T>
BCMF_INLINE Vector<T> permute(Vector<T> from, Vector<Lane<T>> places) {
#if defined(__clang__)
  Vector<T> to = {};
  for (int64_t i = 0; i < kWidth<T>; ++i) to[i] = from[places[i]];
  return to;
#else
  return __builtin_shuffle(from, places);
#endif
}
// Returns the kWidth lanes from `By` on of two vectors, which lie one behind the other.
template <int64_t By, typename T>
BCMF_INLINE Vector<T> shift_lanes(Vector<T> low, Vector<T> high) {
  return []<size_t... Is>(Vector<T> a, Vector<T> b, std::index_sequence<Is...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (By + Is)...);
#else
    return __builtin_shuffle(a, b, Vector<Lane<T>>{static_cast<Lane<T>>(By + Is)...});
#endif
  }(low, high, std::make_index_sequence<kWidth<T>>());
}
template <typename T>
BCMF_INLINE Vector<T> splat(T value) {
  return value - Vector<T>{};  // 0 - x would turn -0 to 0
}

// Returns e^x for x <= 0, within 1.07 ulp; 0 below -87.33 (where the result would be subnormal); NaN stays NaN.
// With x = n ln 2 + r, the polynomial is Taylor's to degree 7, |r| <= ln 2 / 2, and 2^n is put together in the exponent
// bits.
BCMF_INLINE Vector<float> exp_nonpositive(Vector<float> x) {
  const Vector<float> lowest = splat(-87.33f);
  const Vector<float> clamped = x < lowest ? lowest : x;
  const Vector<float> shifted = clamped * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  const Vector<float> n = shifted - 12582912.f;
  const Vector<float> r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  Vector<float> p = splat(1.f / 5040.f);
  p = p * r + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  const auto scale = bit_cast<Vector<float>>((bit_cast<Vector<uint32_t>>(shifted) + 127u) << 23);
  return x < lowest ? Vector<float>{} : p * scale;
}
BCMF_INLINE Vector<double> exp_nonpositive(Vector<double> x) {
  for (int64_t lane = 0; lane < kWidth<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// Returns ln x for 1 <= x < 2^30 (a sum of exponentials, the largest of which is 1), within 1 ulp; NaN stays NaN.
// With x = 2^e f and sqrt(1/2) <= f < sqrt(2), ln f comes from the Cephes polynomial in f - 1.
BCMF_INLINE Vector<float> log_positive(Vector<float> x) {
  const Vector<uint32_t> bits = bit_cast<Vector<uint32_t>>(x) - 0x3f3504f3u;
  const auto e = __builtin_convertvector(bit_cast<Vector<int32_t>>(bits) >> 23, Vector<float>);
  const Vector<float> f = bit_cast<Vector<float>>((bits & 0x007fffffu) + 0x3f3504f3u) - 1.f;
  Vector<float> p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vector<float> ff = f * f;
  const Vector<float> y = f * ff * p + e * -2.12194440e-4f - 0.5f * ff + f + e * 0.693359375f;
  return x == x ? y : x;
}
BCMF_INLINE Vector<double> log_positive(Vector<double> x) {
  for (int64_t lane = 0; lane < kWidth<double>; ++lane) x[lane] = std::log(x[lane]);
  return x;
}

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

BCMF_INLINE float widen(float x) { return x; }
BCMF_INLINE double widen(double x) { return x; }
BCMF_INLINE float widen(BF16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
// The fields are shifted into place and scaled by 2^112, which also normalises subnormals; inf and NaN keep a full
// exponent.
BCMF_INLINE float widen(F16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float finite = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

BCMF_INLINE void narrow(float x, float* to) { *to = x; }
BCMF_INLINE void narrow(double x, double* to) { *to = x; }
// Rounds to nearest even.
BCMF_INLINE void narrow(float x, BF16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}
// There are three cases: subnormal or zero (adding 0.5 aligns the mantissa and lets the adder round), normal (the bits
// are rounded), and inf or NaN.
BCMF_INLINE void narrow(float x, F16* to) {
  const uint32_t all = bit_cast<uint32_t>(x), sign = all & 0x80000000u, bits = all ^ sign;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t magnitude = bits >= 0x47800000u ? special : bits < 0x38800000u ? subnormal : normal;
  to->bits = static_cast<uint16_t>(magnitude | sign >> 16);
}

// Vectors of as many 16-bit entries as a vector of floats has lanes, and of their bits, widened.
typedef uint16_t HalfBits __attribute__((vector_size(kWidth<float> * sizeof(uint16_t))));
typedef uint32_t Bits __attribute__((vector_size(BCMF_VECTOR_BYTES)));

// The same conversions of a whole vector. Loops over single entries would go through memory in two halves, which
// stalls.
BCMF_INLINE Vector<float> load_full(const float* from) { return load_vector(from); }
BCMF_INLINE Vector<double> load_full(const double* from) { return load_vector(from); }
BCMF_INLINE Bits load_bits(const void* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, Bits);
}
BCMF_INLINE Vector<float> load_full(const BF16* from) { return bit_cast<Vector<float>>(load_bits(from) << 16); }
BCMF_INLINE Vector<float> load_full(const F16* from) {
  const Bits half = load_bits(from), magnitude = (half & 0x7fff) << 13;
  const Bits finite = bit_cast<Bits>(bit_cast<Vector<float>>(magnitude) * bit_cast<float>(0x77800000u));
  const Bits bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return bit_cast<Vector<float>>(bits | (half & 0x8000) << 16);
}
BCMF_INLINE void store_full(Vector<float> from, float* to) { store_vector(from, to); }
BCMF_INLINE void store_full(Vector<double> from, double* to) { store_vector(from, to); }
BCMF_INLINE void store_bits(Bits bits, void* to) {
  const HalfBits half = __builtin_convertvector(bits, HalfBits);
  std::memcpy(to, &half, sizeof(half));
}
BCMF_INLINE void store_full(Vector<float> from, BF16* to) {
  const Bits bits = bit_cast<Bits>(from), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  store_bits(from == from ? rounded : Bits{} + 0x7fc0u, to);
}
BCMF_INLINE void store_full(Vector<float> from, F16* to) {
  const Bits all = bit_cast<Bits>(from), sign = all & 0x80000000u, bits = all ^ sign;
  const Bits subnormal = bit_cast<Bits>(bit_cast<Vector<float>>(bits) + 0.5f) - 0x3f000000u;
  const Bits normal = (bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13;
  const Bits special = bits > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits magnitude = bits >= 0x47800000u ? special : bits < 0x38800000u ? subnormal : normal;
  store_bits(magnitude | sign >> 16, to);
}

// Reads `count` neighbours, at most a vector of them, and zeros into the other lanes.
template <typename Acc, typename Scalar>
BCMF_INLINE Vector<Acc> load_widened(const Scalar* from, int64_t count) {
  if (count == kWidth<Acc>) return load_full(from);
  Acc lanes[kWidth<Acc>] = {};
  for (int64_t k = 0; k < count; ++k) lanes[k] = widen(from[k]);
  return load_vector(lanes);
}
template <typename Acc, typename Scalar>
BCMF_INLINE void store_narrowed(Vector<Acc> from, Scalar* to, int64_t count) {
  if (count == kWidth<Acc>) return store_full(from, to);
  Acc lanes[kWidth<Acc>];
  store_vector(from, lanes);
  for (int64_t k = 0; k < count; ++k) narrow(lanes[k], to + k);
}
