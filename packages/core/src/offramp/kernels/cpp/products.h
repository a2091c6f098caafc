// Products of a few states with every row of a weight, in float32. Each row is read once for up to eight states, and in
// one stream where reading takes longest: in two streams of rows of 2 kB an AMD EPYC reads half as fast.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// numbers that the processor takes at once: with half as many (AVX2) it also keeps half as many sums at hand, and those
// too many go through memory: 4 states of 16 lanes took four times as long there
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr bool WIDE = LANES == 16;
// rows of a weight in one stretch: a multiple of what is taken at once, and logits of 8 states in half of a first-level
// cache
constexpr long BLOCK = 480;
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));

Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

// How a stretch of STEP weights of one type meets as many numbers of a state, which is packed as `State`.
template <typename T>
struct Kind;

template <>
struct Kind<float> {
  using State = float;
  static constexpr int STEP = LANES;
  static Floats load(const float* from) { return ::load(from); }
  static Floats add(Floats sum, Floats w, Floats x) { return sum + w * x; }
  static float wide(float x) { return x; }
  static float rounded(float x) { return x; }
  static float narrow(float x) { return x; }
};

template <>
struct Kind<uint16_t> {  // bfloat16: the upper half of a float32
#ifdef __AVX512BF16__
  using State = uint16_t;
  static constexpr int STEP = 2 * LANES;
  static __m512bh load(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Floats add(Floats sum, __m512bh w, __m512bh x) { return (Floats)_mm512_dpbf16_ps((__m512)sum, w, x); }
#else
  using State = float;  // widened once, not for every row of the weight
  static constexpr int STEP = LANES;
  static Floats load(const float* from) { return ::load(from); }
  static Floats load(const uint16_t* from) {
    Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
    return (Floats)wide;
  }
  static Floats add(Floats sum, Floats w, Floats x) { return sum + w * x; }
#endif
  static float wide(float x) { return x; }
  static float wide(uint16_t x) {
    const uint32_t word = uint32_t(x) << 16;
    float found;
    std::memcpy(&found, &word, sizeof found);
    return found;
  }
  static uint16_t narrow(float rounded) {
    uint32_t word;
    std::memcpy(&word, &rounded, sizeof word);
    return word >> 16;
  }
  static float rounded(float x) {  // to the nearest, of two equally near ones to the even, as the model's own logits
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    if (x == x) word += 0x7fff + (word >> 16 & 1);
    word &= 0xffff0000;
    std::memcpy(&x, &word, sizeof word);
    return x;
  }
};

// Sums of neighbours: of `a` in the lower half, of `b` in the upper.
Floats fold(Floats a, Floats b) {
#ifdef __AVX512F__
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// The sum of each of COUNT vectors, a power of two, in the first lanes; all at once, for one by one they take as long
// as 1,024 products.
template <int COUNT>
Floats totals(Floats* sum) {
  for (int count = COUNT; count > 1; count /= 2)
    for (int r = 0; r < count / 2; r++) sum[r] = fold(sum[2 * r], sum[2 * r + 1]);
  for (int lanes = LANES / COUNT; lanes > 1; lanes /= 2) sum[0] = fold(sum[0], sum[0]);
  return sum[0];
}

// so many states meet a weight at once
constexpr int MOST = 8;
// bytes of states up to which they stay in the first-level cache beside a stream of weights
constexpr long NEAR = 1 << 14;

template <typename T>
using State = typename Kind<T>::State;

// Products of ROWS of PACKED states with CLASSES neighbouring rows of a weight, rounded to its type; those of one state
// lie BLOCK apart. UNROLL: steps at a time, for enough sums in flight to hide how long an addition takes. Loops that
// are not unrolled would keep the sums in memory: 8 states took 1.2 to 1.8 times as long.
template <typename T, int ROWS, int PACKED, int UNROLL, int CLASSES>
void group(const T* weight, const State<T>* states, const T* bias, float* out, long width, long stride) {
  constexpr int STEP = Kind<T>::STEP, SUMS = ROWS <= 2 ? ROWS : ROWS <= 4 ? 4 : 8;
  const long whole = width / STEP;
  Floats sum[UNROLL][CLASSES][ROWS] = {};
  const auto step = [&](long s, int u) {
    decltype(Kind<T>::load(weight)) w[CLASSES];
#pragma GCC unroll 8
    for (int c = 0; c < CLASSES; c++) {
      const T* at = weight + c * stride + s * STEP;
      if (CLASSES > 1) __builtin_prefetch(at + CLASSES * stride);
      w[c] = Kind<T>::load(at);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const auto x = Kind<T>::load(states + (s * PACKED + r) * STEP);
#pragma GCC unroll 8
      for (int c = 0; c < CLASSES; c++) sum[u][c][r] = Kind<T>::add(sum[u][c][r], w[c], x);
    }
  };
  long s = 0;
  for (; s + UNROLL <= whole; s += UNROLL)
#pragma GCC unroll 8
    for (int u = 0; u < UNROLL; u++) step(s + u, u);
  for (; UNROLL > 1 && s < whole; s++) step(s, 0);
#pragma GCC unroll 8
  for (int c = 0; c < CLASSES; c++) {
    Floats last[SUMS] = {};
#pragma GCC unroll 8
    for (int u = 0; u < UNROLL; u++)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) last[r] += sum[u][c][r];
    const Floats found = totals<SUMS>(last);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      float rest = bias ? Kind<T>::wide(bias[c]) : 0;
      for (long k = whole * STEP; k < width; k++)
        rest += Kind<T>::wide(weight[c * stride + k]) *
                Kind<T>::wide(states[(whole * PACKED + r) * STEP + k - whole * STEP]);
      out[r * BLOCK + c] = Kind<T>::rounded(found[r] + rest);
    }
  }
}

// Products of ROWS packed states with `count` <= BLOCK rows of a weight, those of one state BLOCK apart. States that
// stay near meet one row of the weight after the other, at most four at once; of others each is read for several rows.
template <typename T, int ROWS>
void project(const T* weight, const State<T>* states, const T* bias, float* out, long width, long stride, long count) {
  constexpr int FIRST = ROWS < 4 ? ROWS : 4, REST = ROWS - FIRST, STEPS = WIDE || ROWS <= 2 ? 4 : 2;
  // as many sums as the processor keeps at hand, 24 or 12; more than 6 states in two parts where that is 12
  constexpr int TOGETHER = WIDE || ROWS <= 6 ? ROWS : FIRST;
  constexpr int CLASSES = ROWS <= 2 ? 1 : WIDE ? (ROWS <= 4 ? 6 : 3) : TOGETHER <= 4 ? 3 : 2;
  const State<T>* rest = states + FIRST * Kind<T>::STEP;
  const auto biases = [&](long c) { return bias ? bias + c : bias; };
  long c = 0;
  if (ROWS > 2 && width * ROWS * long(sizeof(*states)) > NEAR)
    for (; c + CLASSES <= count; c += CLASSES) {
      const T* row = weight + c * stride;
      group<T, TOGETHER, ROWS, 1, CLASSES>(row, states, biases(c), out + c, width, stride);
      if constexpr (TOGETHER < ROWS)
        group<T, REST, ROWS, 1, CLASSES>(row, rest, biases(c), out + FIRST * BLOCK + c, width, stride);
    }
  for (; c < count; c++) {
    const T* row = weight + c * stride;
    group<T, FIRST, ROWS, STEPS, 1>(row, states, biases(c), out + c, width, stride);
    if constexpr (REST > 0)
      group<T, REST, ROWS, STEPS, 1>(row, rest, biases(c), out + FIRST * BLOCK + c, width, stride);
  }
}

// States [ROWS, width] step by step, so that they lie in a row: 4,096 bytes apart they would push one another out of
// the cache.
template <typename T, int ROWS>
std::vector<State<T>> pack(const T* states, long width) {
  constexpr int STEP = Kind<T>::STEP;
  std::vector<State<T>> packed((width + STEP - 1) / STEP * STEP * ROWS);
  const auto one = [](T x) {
    if constexpr (std::is_same_v<State<T>, T>) return x;
    else return Kind<T>::wide(x);
  };
  for (int r = 0; r < ROWS; r++)
    for (long k = 0; k < width; k += STEP) {
      const T* from = states + r * width + k;
      std::transform(from, from + std::min<long>(STEP, width - k), packed.data() + k * ROWS + r * STEP, one);
    }
  return packed;
}

// Call `run` with the first of as many rows as are taken at once, and how many, as a type, until all were.
template <typename Run>
void in_parts(long rows, const Run& run) {
  for (long r = 0; r < rows; r += MOST) switch (std::min<long>(MOST, rows - r)) {
      case 1: run(r, std::integral_constant<int, 1>()); break;
      case 2: run(r, std::integral_constant<int, 2>()); break;
      case 3: run(r, std::integral_constant<int, 3>()); break;
      case 4: run(r, std::integral_constant<int, 4>()); break;
      case 5: run(r, std::integral_constant<int, 5>()); break;
      case 6: run(r, std::integral_constant<int, 6>()); break;
      case 7: run(r, std::integral_constant<int, 7>()); break;
      default: run(r, std::integral_constant<int, 8>());
    }
}

}  // namespace
