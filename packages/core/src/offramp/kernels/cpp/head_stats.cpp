// Statistics of the products of a few states with every row of a weight matrix, in float32. Each row is read once for
// up to eight states, and in one stream where there are so few that reading takes longest: with two streams of rows of
// 2 kB an AMD EPYC reads half as fast.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
// classes in one stretch: a multiple of what is taken at once, and logits of 8 states in half of a first-level cache
constexpr long BLOCK = 480;
// no exponent is less: see `LEAST` in ../head_stats.py
constexpr float LEAST = -87.0f;
typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

// How a stretch of STEP weights of one type meets as many numbers of a state.
template <typename T>
struct Kind;

template <>
struct Kind<float> {
  static constexpr int STEP = LANES;
  static Floats load(const float* from) { return ::load(from); }
  static Floats add(Floats sum, Floats w, Floats x) { return sum + w * x; }
  static float rounded(float x) { return x; }
};

template <>
struct Kind<uint16_t> {  // bfloat16: the upper half of a float32
#ifdef __AVX512BF16__
  static constexpr int STEP = 2 * LANES;
  static __m512bh load(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Floats add(Floats sum, __m512bh w, __m512bh x) { return (Floats)_mm512_dpbf16_ps((__m512)sum, w, x); }
#else
  static constexpr int STEP = LANES;
  static Floats load(const uint16_t* from) {
    Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
    return (Floats)wide;
  }
  static Floats add(Floats sum, Floats w, Floats x) { return sum + w * x; }
#endif
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
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// The sum of each vector, in the first lanes; all at once, for one by one they take as long as 1,024 products.
template <int ROWS>
Floats totals(Floats* sum) {
  for (int count = ROWS; count > 1; count /= 2)
    for (int r = 0; r < count / 2; r++) sum[r] = fold(sum[2 * r], sum[2 * r + 1]);
  for (int lanes = LANES / ROWS; lanes > 1; lanes /= 2) sum[0] = fold(sum[0], sum[0]);
  return sum[0];
}

// Products of ROWS states with CLASSES neighbouring rows of weights, UNROLL steps at a time: enough sums in flight to
// hide how long an addition takes, and for many states few loads of them.
template <typename T, int ROWS, int UNROLL, int CLASSES>
void group(const T* weight, const T* states, float* out, long width, long stride, long classes) {
  constexpr int STEP = Kind<T>::STEP;
  const long whole = width / STEP, steps = (width + STEP - 1) / STEP;
  Floats sum[CLASSES][UNROLL][ROWS] = {};
  long s = 0;
  for (; s + UNROLL <= whole; s += UNROLL)
    for (int u = 0; u < UNROLL; u++) {
      decltype(Kind<T>::load(weight)) w[CLASSES];
      for (int c = 0; c < CLASSES; c++) {
        const T* at = weight + c * stride + (s + u) * STEP;
        if (CLASSES > 1) __builtin_prefetch(at + CLASSES * stride);
        w[c] = Kind<T>::load(at);
      }
      for (int r = 0; r < ROWS; r++) {
        auto x = Kind<T>::load(states + ((s + u) * ROWS + r) * STEP);
        for (int c = 0; c < CLASSES; c++) sum[c][u][r] = Kind<T>::add(sum[c][u][r], w[c], x);
      }
    }
  for (; s < steps; s++)
    for (int c = 0; c < CLASSES; c++) {
      T rest[STEP] = {};
      std::copy_n(weight + c * stride + s * STEP, std::min<long>(STEP, width - s * STEP), rest);
      for (int r = 0; r < ROWS; r++)
        sum[c][0][r] = Kind<T>::add(sum[c][0][r], Kind<T>::load(rest), Kind<T>::load(states + (s * ROWS + r) * STEP));
    }
  for (int c = 0; c < CLASSES; c++) {
    for (int u = 1; u < UNROLL; u++)
      for (int r = 0; r < ROWS; r++) sum[c][0][r] += sum[c][u][r];
    Floats found = totals<ROWS>(sum[c][0]);
    for (int r = 0; r < ROWS; r++) out[r * classes + c] = Kind<T>::rounded(found[r]);
  }
}

// e to the power of each, for -87 to 0, within two units in the last place: 2^n times a polynomial (Cephes).
Floats power(Floats x) {
  const Floats n = __builtin_convertvector(__builtin_convertvector(x * 1.44269504f - 0.5f, Integers), Floats);
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (Floats)((__builtin_convertvector(n, Integers) + 127) << 23);
}

float largest(const float* logits) {
  Floats most = load(logits);
  for (int k = LANES; k < BLOCK; k += LANES) {
    const Floats x = load(logits + k);
    most = x > most ? x : most;
  }
  float found = most[0];
  for (int i = 1; i < LANES; i++) found = std::max(found, most[i]);
  return found;
}

// What is known of one state after a stretch of classes. mass: sum of e = exp(logit - first); moment: sum of
// e * (logit - first).
struct Found {
  int64_t label;
  float first, second, mass, moment;
};

// The statistics of BLOCK logits, -inf where there are fewer; overwrites them. sums: whether mass and moment are asked.
Found summarise(float* logits, int64_t start, bool sums) {
  Integers broken = {};
  for (int k = 0; k < BLOCK; k += LANES) broken |= load(logits + k) != load(logits + k);
  for (int i = 0; i < LANES; i++)
    if (broken[i]) return {0, NAN, NAN, NAN, NAN};
  const float first = largest(logits);
  long best = 0;
  while (logits[best] != first) best++;  // the first of equals
  logits[best] = -INFINITY;
  Found found = {start + best, first, largest(logits), 1, 0};  // its own e is 1
  if (!sums) return found;
  const float base = std::max(first, -FLT_MAX);
  Floats mass = {}, moment = {};
  for (int k = 0; k < BLOCK; k += LANES) {
    Floats x = load(logits + k) - base;
    x = x > LEAST ? x : Floats{} + LEAST;
    const Floats e = power(x);
    mass += e;
    moment += e * x;
  }
  found.mass += totals<1>(&mass)[0];
  found.moment = totals<1>(&moment)[0];
  return found;
}

// Writes label, and first, second, logsumexp and entropy `rows` apart, of all stretches, which lie `apart`.
void merge(const Found* found, long count, long apart, bool sums, int64_t* label, float* stats, long rows) {
  long best = 0;
  bool broken = false;
  for (long i = 0; i < count; i++) {
    const float first = found[i * apart].first;
    broken |= first != first;
    if (first > found[best * apart].first) best = i;
  }
  const Found& top = found[best * apart];
  if (broken || std::isinf(top.first)) {
    *label = 0;
    for (int i = 0; i < 4; i++) stats[i * rows] = NAN;
    return;
  }
  float second = top.second;
  double mass = 0, moment = 0;
  for (long i = 0; i < count; i++) {
    const Found& one = found[i * apart];
    if (i != best) second = std::max(second, one.first);
    if (!sums) continue;
    const double shift = std::max(one.first - top.first, LEAST), e = std::exp(shift);
    mass += one.mass * e;
    moment += (one.moment + one.mass * shift) * e;
  }
  *label = top.label;
  stats[0] = top.first;
  stats[rows] = second;
  stats[2 * rows] = float(std::log(mass) + top.first);
  stats[3 * rows] = float(std::max(0.0, std::log(mass) - moment / mass));
}

template <typename T, int ROWS, int UNROLL, int CLASSES>
void some(const T* weight, const T* hidden, int64_t* label, float* stats, long rows, long width, long stride,
          long classes, bool sums, int threads) {
  constexpr int STEP = Kind<T>::STEP;
  // step by step, so that they lie in a row: states 4,096 bytes apart would push one another out of the cache
  std::vector<T> packed((width + STEP - 1) / STEP * STEP * ROWS);
  for (long k = 0; k < width; k++)
    for (int r = 0; r < ROWS; r++) packed[(k / STEP * ROWS + r) * STEP + k % STEP] = hidden[r * width + k];
  const long blocks = (classes + BLOCK - 1) / BLOCK;
  std::vector<Found> found(blocks * ROWS);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++) {
    const long start = block * BLOCK, count = std::min(BLOCK, classes - start);
    float logits[ROWS * BLOCK];
    std::fill_n(logits, ROWS * BLOCK, -INFINITY);
    long c = 0;
    for (; c + CLASSES <= count; c += CLASSES)
      group<T, ROWS, UNROLL, CLASSES>(weight + (start + c) * stride, packed.data(), logits + c, width, stride, BLOCK);
    for (; c < count; c++)
      group<T, ROWS, UNROLL, 1>(weight + (start + c) * stride, packed.data(), logits + c, width, stride, BLOCK);
    for (int r = 0; r < ROWS; r++) found[block * ROWS + r] = summarise(logits + r * BLOCK, start, sums);
  }
  for (int r = 0; r < ROWS; r++) merge(found.data() + r, blocks, ROWS, sums, label + r, stats + r, rows);
}

template <typename T>
void head_stats(const T* weight, const T* hidden, int64_t* label, float* stats, long rows, long width, long stride,
                long classes, bool sums, int threads) {
  for (long r = 0, now; r < rows; r += now) {
    now = rows - r >= 8 ? 8 : rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
    const auto run = now == 8   ? some<T, 8, 1, 3>
                     : now == 4 ? some<T, 4, 1, 6>
                     : now == 2 ? some<T, 2, 4, 1>
                                : some<T, 1, 4, 1>;
    run(weight, hidden + r * width, label + r, stats + r, rows, width, stride, classes, sums, threads);
  }
}

}  // namespace

// weight [classes, width], its rows `stride` apart; hidden [rows, width]; label [rows]; stats [4, rows]: first, second,
// and where `sums`, logsumexp and entropy.
extern "C" void head_stats_float32(const float* weight, const float* hidden, int64_t* label, float* stats, long rows,
                                   long width, long stride, long classes, bool sums, int threads) {
  head_stats(weight, hidden, label, stats, rows, width, stride, classes, sums, threads);
}

extern "C" void head_stats_bfloat16(const uint16_t* weight, const uint16_t* hidden, int64_t* label, float* stats,
                                    long rows, long width, long stride, long classes, bool sums, int threads) {
  head_stats(weight, hidden, label, stats, rows, width, stride, classes, sums, threads);
}
