// Streaming log-sum-exp over gathered rows, with the softmax-weighted sum of the rows as its gradient.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "fixed_math.h"
#include "score.h"

namespace mirepro {

/// Up to kGather rows at a time, in the caller's order: the result depends on that order only, never on threads.
/// Rescaling by the running maximum keeps every weight in float range at any tau.
struct LogSumExp {
  double max = -INFINITY, sum = 0;
  std::vector<float> weighted;  // sum of e^(f - max) * row; empty: no gradient wanted

  explicit LogSumExp(int64_t dim_or_zero) : weighted(dim_or_zero, 0.0f) {}

  void add(const double* f, const float* const* rows, int64_t n) {
    const double top = *std::max_element(f, f + n);
    if (top > max) {
      const double scale = fixed_exp(max - top);
      sum *= scale;
      for (float& w : weighted) w *= static_cast<float>(scale);
      max = top;
    }
    double power[kGather] = {};
    float weight[kGather];
    std::copy_n(f, n, power);
    kernels().exponentials(power, max);
    for (int64_t r = 0; r < n; ++r) {
      sum += power[r];
      weight[r] = static_cast<float>(power[r]);
    }
    if (!weighted.empty()) kernels().accumulate(weight, rows, n, static_cast<int64_t>(weighted.size()), weighted.data());
  }

  double value() const { return sum > 0 ? max + fixed_log(sum) : -INFINITY; }
};

/// f = s / tau of n <= kGather rows; unused places repeat the last row.
inline void scores_over_tau(const float* z, const float** rows, int64_t n, int64_t dim, double tau, double* f) {
  float score[kGather];
  for (int64_t r = n; r < kGather; ++r) rows[r] = rows[n - 1];
  kernels().dot(z, rows, dim, score);
  for (int64_t r = 0; r < n; ++r) f[r] = static_cast<double>(score[r]) / tau;
}

}  // namespace mirepro
