#include "../cpu/bank.h"
#include "score.h"

namespace mirepro {
namespace {

/// Half the squared norm of every centroid by the canonical chain.
__global__ void half_norms_kernel(const float* centroids, int64_t n, int64_t dim, float* half) {
  for (int64_t c = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; c < n; c += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    float sum = 0.0f;
    for (int64_t d = 0; d < dim; ++d) sum = __fmaf_rn(centroids[c * dim + d], centroids[c * dim + d], sum);
    half[c] = 0.5f * sum;
  }
}

/// The scan with roles swapped: kTileQueries bank rows of a block against all centroids.
__global__ void bank_assign_kernel(const float* bank, int64_t rows, const float* centroids, int64_t clusters, int64_t dim, const float* half,
                                   int64_t* out) {
  constexpr int kParts = kTileRows / kOwnRows;
  __shared__ Tile tile;
  __shared__ float value[kParts][kTileQueries];
  __shared__ int32_t cluster[kParts][kTileQueries];
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kTileQueries); first < rows; first += static_cast<int64_t>(gridDim.x) * kTileQueries) {
    float best[kOwnQueries];
    int32_t arg[kOwnQueries];
    for (int i = 0; i < kOwnQueries; ++i) {
      best[i] = -INFINITY;
      arg[i] = 0;
    }
    for (int64_t begin = 0; begin < clusters; begin += kTileRows) {
      float sum[kOwnQueries][kOwnRows];
      score_tile(tile, bank, rows, first, centroids, clusters, begin, dim, sum);
      for (int j = 0; j < kOwnRows; ++j) {
        const int64_t c = begin + own_row() + j;
        if (c >= clusters) break;
        for (int i = 0; i < kOwnQueries; ++i) {
          const float score = sum[i][j] - half[c];
          if (score > best[i]) {
            best[i] = score;
            arg[i] = static_cast<int32_t>(c);
          }
        }
      }
    }
    for (int i = 0; i < kOwnQueries; ++i) {
      value[own_row() / kOwnRows][own_query() + i] = best[i];
      cluster[own_row() / kOwnRows][own_query() + i] = arg[i];
    }
    __syncthreads();
    if (threadIdx.x < kTileQueries && first + threadIdx.x < rows) {
      float top = value[0][threadIdx.x];
      int32_t winner = cluster[0][threadIdx.x];
      for (int p = 1; p < kParts; ++p) {
        const float v = value[p][threadIdx.x];
        const int32_t c = cluster[p][threadIdx.x];
        if (v > top || (v == top && c < winner)) {
          top = v;
          winner = c;
        }
      }
      out[first + threadIdx.x] = winner;
    }
    __syncthreads();
  }
}

}  // namespace

Tensor bank_assign(const Tensor& bank, const Tensor& centroids) {
  const auto b = view<float>(bank, "bank", 2), c = view<float>(centroids, "centroids", 2);
  require(c.rows >= 1 && b.cols == c.cols, "centroids: need shape (K, D), K >= 1, D that of the bank");
  const Device device(bank);
  Checks checks(device);
  checks.finite(c, "centroids");
  checks.finite(b, "bank");
  checks.verify();
  const Buffer<float> half(device, c.rows);
  auto result = new_longs(bank, {b.rows});
  device.run(half_norms_kernel, blocks_for(c.rows), kThreads, c.data, c.rows, c.cols, half.data);
  device.run(bank_assign_kernel, blocks_for(b.rows, kTileQueries), kThreads, b.data, b.rows, c.data, c.rows, b.cols, half.data, longs(result));
  return result;
}

}  // namespace mirepro
