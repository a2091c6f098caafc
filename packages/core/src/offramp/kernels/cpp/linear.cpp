// A linear layer for a few states, as one of torch's operators: a recording calls it without Python.
#include <array>
#include <optional>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "products.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// bytes of a weight from which on threads take less time than starting them
constexpr long SHARED = 1 << 18;

template <typename T, int ROWS>
void some(const T* weight, const T* states, const T* bias, T* out, long width, long stride, long classes) {
  const auto packed = pack<T, ROWS>(states, width);
  const int threads = classes * width * long(sizeof(T)) < SHARED ? 1 : torch::stable::get_num_threads();
  const auto share = [&](long thread) {
    const long stop = classes * (thread + 1) / threads;
    float found[ROWS * BLOCK];
    for (long c = classes * thread / threads, count; c < stop; c += count) {
      count = std::min(BLOCK, stop - c);
      project<T, ROWS>(weight + c * stride, packed.data(), bias ? bias + c : bias, found, width, stride, count);
      for (int r = 0; r < ROWS; r++)
        for (long i = 0; i < count; i++) out[r * classes + c + i] = Kind<T>::narrow(found[r * BLOCK + i]);
    }
  };
  if (threads == 1) return share(0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long thread = 0; thread < threads; thread++) share(thread);
}

template <typename T>
Tensor few(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, long rows) {
  const long classes = weight.size(0), width = weight.size(1), stride = weight.stride(0);
  std::vector<int64_t> shape(hidden.sizes().begin(), hidden.sizes().end());
  shape.back() = classes;
  Tensor made = torch::stable::new_empty(hidden, shape);
  const Tensor dense = torch::stable::contiguous(hidden);
  const auto at = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const T *states = at(dense), *weights = at(weight), *biases = bias ? at(*bias) : nullptr;
  T* out = static_cast<T*>(made.mutable_data_ptr());
  in_parts(rows, [&](long r, auto count) {
    some<T, count()>(weights, states + r * width, biases, out + r * classes, width, stride, classes);
  });
  return made;
}

Tensor linear(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType type = weight.scalar_type();
  const long width = weight.dim() == 2 ? weight.size(1) : 0, rows = width ? hidden.numel() / width : 0;
  // twice as many where torch takes longer for them than reading the weight twice: in float32 with 16 lanes, and in
  // bfloat16 with 8, of which it makes no use
  const long most = (type == ScalarType::Float) == WIDE ? 2 * MOST : MOST;
  bool fits = hidden.scalar_type() == type && 0 < rows && rows <= most && weight.stride(1) == 1;
  fits = fits && hidden.size(hidden.dim() - 1) == width;
  fits = fits && (!bias || (bias->scalar_type() == type && bias->numel() == weight.size(0) && bias->is_contiguous()));
  if (fits && type == ScalarType::Float) return few<float>(hidden, weight, bias, rows);
  if (fits && type == ScalarType::BFloat16) return few<uint16_t>(hidden, weight, bias, rows);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(hidden), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(offramp, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
