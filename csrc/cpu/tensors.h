// Checked views of the tensors an operator receives, and parallel loops.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace mirepro {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

/// Throws what Python sees as a ValueError.
[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline void require(bool holds, const std::string& message) {
  if (!holds) fail(message);
}

#if defined(__CUDACC__)
constexpr const char* kPlace = "CUDA";
inline bool is_here(const Tensor& t) { return t.is_cuda(); }
#else
constexpr const char* kPlace = "CPU";
inline bool is_here(const Tensor& t) { return t.is_cpu(); }
#endif

/// A contiguous tensor of T, on the device these operators are compiled for, with `dims` dimensions; keeps a contiguous copy alive if one was needed.
template <class T>
struct View {
  Tensor keep;
  const T* data = nullptr;
  int64_t rows = 0, cols = 1;

  const T* row(int64_t i) const { return data + i * cols; }
};

template <class T>
View<T> view(const Tensor& t, const char* name, int64_t dims) {
  constexpr bool is_float = std::is_same_v<T, float>;
  require(is_here(t), std::string(name) + ": must be a " + kPlace + " tensor");
  require(t.scalar_type() == (is_float ? ScalarType::Float : ScalarType::Long), std::string(name) + ": dtype must be " + (is_float ? "float32" : "int64"));
  require(t.dim() == dims, std::string(name) + ": must have " + std::to_string(dims) + " dimensions, has " + std::to_string(t.dim()));
  View<T> v{t.is_contiguous() ? t : torch::stable::contiguous(t)};
  v.data = static_cast<const T*>(v.keep.const_data_ptr());
  v.rows = t.size(0);
  v.cols = dims == 2 ? t.size(1) : 1;
  return v;
}

using Matrix = View<float>;

/// Whether no value is NaN or inf, that is, no exponent has all bits set.
inline bool is_finite(const float* values, int64_t n) {
  uint32_t bad = 0;
  for (int64_t d = 0; d < n; ++d) {
    uint32_t bits;
    std::memcpy(&bits, values + d, sizeof bits);
    bad |= (bits & 0x7F800000u) == 0x7F800000u;
  }
  return bad == 0;
}

/// Throws naming the first row with NaN or inf.
inline void require_finite(const Matrix& m, const char* name) {
  for (int64_t i = 0; i < m.rows; ++i)
    if (!is_finite(m.row(i), m.cols)) fail(std::string(name) + ": row " + std::to_string(i) + " holds NaN or inf");
}

/// Queries and a bank of the same width; the queries are checked to be finite.
inline std::pair<Matrix, Matrix> query_and_bank(const Tensor& z, const Tensor& bank) {
  auto q = view<float>(z, "z", 2), b = view<float>(bank, "bank", 2);
  require(b.rows > 0 && b.rows < (int64_t{1} << 32), "bank: needs 1 to 2^32 - 1 rows");
  require(q.cols == b.cols, "z and bank: widths differ (" + std::to_string(q.cols) + ", " + std::to_string(b.cols) + ")");
  require_finite(q, "z");
  return {q, b};
}

/// Throws unless every index lies in [0, n).
inline void require_index(const View<int64_t>& index, int64_t n, const char* name) {
  for (int64_t i = 0; i < index.rows * index.cols; ++i) {
    if (0 <= index.data[i] && index.data[i] < n) continue;
    fail(std::string(name) + ": " + std::to_string(index.data[i]) + " (row " + std::to_string(i / index.cols) + ") is outside [0, " +
         std::to_string(n) + ")");
  }
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline int64_t* longs(const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }
inline Tensor new_floats(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}
inline Tensor new_longs(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Long);
}

/// f(i) for i in [0, n), over torch's threads; f must not throw and must write to places of its own.
template <class F>
void parallel(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace mirepro
