#include "gather.h"

#include <atomic>

#include "lse.h"

namespace mirepro {
namespace {

struct Gather {
  Matrix bank;
  View<int64_t> index;

  Gather(const Tensor& bank_, const Tensor& index_, int64_t queries)
      : bank(view<float>(bank_, "bank", 2)), index(view<int64_t>(index_, "index", 2)) {
    require(index.rows == queries, "index: needs one row per query");
    require(index.cols >= 1, "index: needs at least one column");
    require_index(index, bank.rows, "index");
  }

  /// Rows t..t+15 of query i as far as they exist; returns their number. Fetches the next ones: they lie anywhere.
  int64_t rows(int64_t i, int64_t t, const float** out) const {
    const int64_t n = std::min(kGather, index.cols - t);
    for (int64_t r = t + kGather; r < std::min(t + 2 * kGather, index.cols); ++r)
      for (int64_t d = 0; d < bank.cols; d += 16) __builtin_prefetch(bank.row(index.row(i)[r]) + d);
    for (int64_t r = 0; r < n; ++r) out[r] = bank.row(index.row(i)[t + r]);
    return n;
  }

  /// Called where a result is not finite: names the row at fault.
  [[noreturn]] void blame(int64_t i) const {
    for (int64_t t = 0; t < index.cols; ++t) {
      const int64_t row = index.row(i)[t];
      if (!is_finite(bank.row(row), bank.cols)) fail("bank: row " + std::to_string(row) + " holds NaN or inf");
    }
    fail("z: the scores of row " + std::to_string(i) + " overflow");
  }
};

}  // namespace

std::tuple<Tensor, Tensor> gather_nce(const Tensor& z, const Tensor& bank, const Tensor& index, double tau, bool gradient) {
  const auto [q, b] = query_and_bank(z, bank);
  require(tau > 0, "tau: must be positive");
  const Gather gather(bank, index, q.rows);
  const int64_t dim = q.cols, width = gradient ? dim : 0;
  auto ce = new_floats(z, {q.rows}), dz = new_floats(z, {q.rows, width});
  float *out = floats(ce), *dout = floats(dz);
  std::atomic<int64_t> bad{-1};
  parallel(q.rows, [&, &q = q](int64_t i) {
    LogSumExp sum(width);
    const float* rows[kGather];
    double f[kGather], positive = 0;
    for (int64_t t = 0; t < gather.index.cols; t += kGather) {
      const int64_t n = gather.rows(i, t, rows);
      scores_over_tau(q.row(i), rows, n, dim, tau, f);
      if (t == 0) positive = f[0];
      for (int64_t r = 0; r < n; ++r)
        if (!std::isfinite(f[r])) bad = i;
      sum.add(f, rows, n);
    }
    out[i] = static_cast<float>(sum.value() - positive);
    const float* own = gather.bank.row(gather.index.row(i)[0]);
    for (int64_t d = 0; d < width; ++d) dout[i * dim + d] = static_cast<float>((sum.weighted[d] / sum.sum - own[d]) / tau);
  });
  if (bad >= 0) gather.blame(bad);
  return {ce, dz};
}

Tensor gather_dot(const Tensor& z, const Tensor& bank, const Tensor& index) {
  const auto [q, b] = query_and_bank(z, bank);
  const Gather gather(bank, index, q.rows);
  const int64_t k = gather.index.cols;
  auto result = new_floats(z, {q.rows, k});
  float* out = floats(result);
  std::atomic<int64_t> bad{-1};
  parallel(q.rows, [&, &q = q](int64_t i) {
    const float* rows[kGather];
    float score[kGather];
    for (int64_t t = 0; t < k; t += kGather) {
      const int64_t n = gather.rows(i, t, rows);
      for (int64_t r = n; r < kGather; ++r) rows[r] = rows[n - 1];
      kernels().dot(q.row(i), rows, q.cols, score);
      for (int64_t r = 0; r < n; ++r) {
        out[i * k + t + r] = score[r];
        if (!std::isfinite(score[r])) bad = i;
      }
    }
  });
  if (bad >= 0) gather.blame(bad);
  return result;
}

Tensor gather_dot_backward(const Tensor& grad, const Tensor& bank, const Tensor& index) {
  const auto g = view<float>(grad, "grad", 2);
  const Gather gather(bank, index, g.rows);
  require(g.cols == gather.index.cols, "grad: must have the shape of index");
  auto result = torch::stable::new_zeros(grad, std::vector<int64_t>{g.rows, gather.bank.cols}, ScalarType::Float);
  float* out = floats(result);
  parallel(g.rows, [&](int64_t i) {
    const float* rows[kGather];
    for (int64_t t = 0; t < g.cols; t += kGather) {
      const int64_t n = gather.rows(i, t, rows);
      kernels().accumulate(g.row(i) + t, rows, n, gather.bank.cols, out + i * gather.bank.cols);
    }
  });
  return result;
}

}  // namespace mirepro
