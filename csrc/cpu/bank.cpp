#include "bank.h"

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

}  // namespace mirepro
