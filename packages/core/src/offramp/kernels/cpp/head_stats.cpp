// Statistics of the products of a few states with every row of a weight matrix, in float32.
#include <cfloat>
#include <cmath>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <tuple>

#include "products.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// no exponent is less: see `LEAST` in ../head_stats.py
constexpr float LEAST = -87.0f;

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

template <typename T, int ROWS>
void some(const T* weight, const T* hidden, int64_t* label, float* stats, long rows, long width, long stride,
          long classes, bool sums) {
  const auto packed = pack<T, ROWS>(hidden, width);
  const long blocks = (classes + BLOCK - 1) / BLOCK;
  std::vector<Found> found(blocks * ROWS);
#pragma omp parallel for num_threads(torch::stable::get_num_threads()) schedule(static)
  for (long block = 0; block < blocks; block++) {
    const long start = block * BLOCK;
    float logits[ROWS * BLOCK];
    std::fill_n(logits, ROWS * BLOCK, -INFINITY);
    project<T, ROWS>(weight + start * stride, packed.data(), nullptr, logits, width, stride,
                     std::min(BLOCK, classes - start));
    for (int r = 0; r < ROWS; r++) found[block * ROWS + r] = summarise(logits + r * BLOCK, start, sums);
  }
  for (int r = 0; r < ROWS; r++) merge(found.data() + r, blocks, ROWS, sums, label + r, stats + r, rows);
}

template <typename T>
void all(const Tensor& hidden, const Tensor& weight, bool sums, Tensor& label, Tensor& stats) {
  const auto states = static_cast<const T*>(hidden.const_data_ptr());
  const auto weights = static_cast<const T*>(weight.const_data_ptr());
  const long rows = hidden.size(0), width = hidden.size(1);
  auto labels = static_cast<int64_t*>(label.mutable_data_ptr());
  auto numbers = static_cast<float*>(stats.mutable_data_ptr());
  in_parts(rows, [&](long r, auto count) {
    some<T, count()>(weights, states + r * width, labels + r, numbers + r, rows, width, weight.stride(0),
                     weight.size(0), sums);
  });
}

// hidden [rows, width]; weight [classes, width], of the same type, float32 or bfloat16. Returns label [rows] and
// [4, rows]: first, second, and where `sums`, logsumexp and entropy.
std::tuple<Tensor, Tensor> head_stats(const Tensor& hidden, const Tensor& weight, bool sums) {
  const Tensor states = torch::stable::contiguous(hidden);
  const Tensor weights = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  const int64_t rows = hidden.size(0);
  Tensor label = torch::stable::new_empty(hidden, {rows}, ScalarType::Long);
  Tensor stats = torch::stable::new_empty(hidden, {4, rows}, ScalarType::Float);
  if (weight.scalar_type() == ScalarType::Float) all<float>(states, weights, sums, label, stats);
  else all<uint16_t>(states, weights, sums, label, stats);
  return {label, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(offramp, CPU, m) { m.impl("head_stats", TORCH_BOX(&head_stats)); }
