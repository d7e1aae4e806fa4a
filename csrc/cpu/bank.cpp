#include "bank.h"

#include <algorithm>
#include <atomic>

#include "score.h"
#include "select.h"

namespace mirepro {
namespace {

/// row <- normalize(m row + (1 - m) z); a zero vector keeps the old row; m = 0 stores z as it is.
void blend(float* row, const float* z, int64_t dim, float m) {
  double square = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float mixed = m * row[d] + (1.0f - m) * z[d];
    square += static_cast<double>(mixed) * mixed;
  }
  if (square == 0) return;
  const double norm = std::sqrt(square);
  for (int64_t d = 0; d < dim; ++d)
    row[d] = m == 0 ? z[d] : static_cast<float>((m * row[d] + (1.0f - m) * z[d]) / norm);
}

/// Half the squared norm of every centroid by the canonical chain.
std::vector<float> half_norms(const Matrix& centroids) {
  std::vector<float> half(centroids.rows);
  for (int64_t c = 0; c < centroids.rows; ++c) {
    const float* row = centroids.row(c);
    float sum = 0;
    for (int64_t d = 0; d < centroids.cols; ++d) sum = std::fma(row[d], row[d], sum);
    half[c] = 0.5f * sum;
  }
  return half;
}

}  // namespace

void bank_update_(Tensor bank, const Tensor& index, const Tensor& z, double momentum) {
  require(bank.is_contiguous(), "bank: must be contiguous to be updated in place");
  const auto b = view<float>(bank, "bank", 2), q = view<float>(z, "z", 2);
  const auto rows = view<int64_t>(index, "index", 1);
  require(b.cols == q.cols && rows.rows == q.rows, "bank, index and z: shapes (N, D), (B,), (B, D) do not fit");
  require(momentum >= 0 && momentum <= 1, "momentum: must lie in [0, 1]");
  require_index(rows, b.rows, "index");
  require_finite(q, "z");
  if (momentum == 1) return;
  float* data = floats(bank);
  for (int64_t i = 0; i < q.rows; ++i) blend(data + rows.data[i] * b.cols, q.row(i), b.cols, static_cast<float>(momentum));
}

Tensor bank_assign(const Tensor& bank, const Tensor& centroids) {
  const auto b = view<float>(bank, "bank", 2), c = view<float>(centroids, "centroids", 2);
  require(c.rows >= 1 && b.cols == c.cols, "centroids: need shape (K, D), K >= 1, D that of the bank");
  require_finite(c, "centroids");
  require_finite(b, "bank");
  const auto half = half_norms(c);
  auto result = new_longs(bank, {b.rows});
  auto* out = longs(result);
  parallel((b.rows + kLanes - 1) / kLanes, [&, &b = b, &c = c](int64_t g) {
    const int64_t first = g * kLanes, n = std::min(kLanes, b.rows - first);
    Matrix rows = b;
    rows.data = b.row(first);
    rows.rows = n;
    const Packed queries(rows);
    std::vector<float> scores(kTile * kLanes), best(kLanes, -INFINITY);
    std::vector<int32_t> arg(kLanes, 0);
    for (int64_t begin = 0; begin < c.rows; begin += kTile) {
      const int64_t count = std::min(kTile, c.rows - begin);
      kernels().score(queries.group(0, b.cols), c.row(begin), count, b.cols, scores.data());
      for (int64_t r = 0; r < count; ++r)
        for (int64_t q = 0; q < kLanes; ++q) {
          const float value = scores[r * kLanes + q] - half[begin + r];
          arg[q] = value > best[q] ? static_cast<int32_t>(begin + r) : arg[q];
          best[q] = value > best[q] ? value : best[q];
        }
    }
    std::copy_n(arg.begin(), n, out + first);
  });
  return result;
}

}  // namespace mirepro
