// Log-sum-exp of one query over gathered rows by one block, with the softmax-weighted sum of the rows; the same steps
// in the same order as cpu/lse.h: batches of up to kBatch rows, each rescaled by the running maximum.
#pragma once
#include "../cpu/fixed_math.h"
#include "score.h"

namespace mirepro {

constexpr int kBatch = 16, kBatches = kDotRows / kBatch;

/// Running state, in shared memory.
struct Sum {
  double max, sum;
};

/// Up to kDotRows rows of one query, in shared memory: their numbers, f = s / tau, and where each batch begins.
struct Rows {
  int64_t row[kDotRows];
  double f[kDotRows];
  int begin[kBatches + 1];
};

__device__ inline void start(Sum& sum) {
  if (threadIdx.x == 0) {
    sum.max = -INFINITY;
    sum.sum = 0;
  }
  __syncthreads();
}

/// Adds the batches of `rows`. weighted (dim floats of the query, in global memory) may be null. Whole block.
__device__ inline void add(Sum& sum, const Rows& rows, const float* bank, int64_t dim, float* weighted) {
  __shared__ double shift[kBatches], scale[kBatches], power[kDotRows];
  const int t = threadIdx.x;
  if (t == 0) {
    double max = sum.max;
    for (int b = 0; b < kBatches; ++b) {
      scale[b] = 1;
      if (rows.begin[b] < rows.begin[b + 1]) {
        double top = rows.f[rows.begin[b]];
        for (int r = rows.begin[b] + 1; r < rows.begin[b + 1]; ++r)
          if (top < rows.f[r]) top = rows.f[r];
        if (top > max) {
          scale[b] = fixed_exp(max - top);
          max = top;
        }
      }
      shift[b] = max;
    }
    sum.max = max;
  }
  __syncthreads();
  for (int b = 0; b < kBatches; ++b)
    if (rows.begin[b] <= t && t < rows.begin[b + 1]) power[t] = fixed_exp(rows.f[t] - shift[b]);
  __syncthreads();
  if (t == 0) {
    double total = sum.sum;
    for (int b = 0; b < kBatches; ++b) {
      total *= scale[b];
      for (int r = rows.begin[b]; r < rows.begin[b + 1]; ++r) total += power[r];
    }
    sum.sum = total;
  }
  for (int64_t d = t; d < dim && weighted != nullptr; d += kDotRows) {
    float w = weighted[d];
    for (int b = 0; b < kBatches; ++b) {
      w *= static_cast<float>(scale[b]);
      for (int r = rows.begin[b]; r < rows.begin[b + 1]; ++r) w = __fmaf_rn(static_cast<float>(power[r]), bank[rows.row[r] * dim + d], w);
    }
    weighted[d] = w;
  }
  __syncthreads();
}

__device__ inline double value(const Sum& sum) { return sum.sum > 0 ? sum.max + fixed_log(sum.sum) : -INFINITY; }

}  // namespace mirepro
