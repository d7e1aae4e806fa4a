// The canonical score on the device: one __fmaf_rn chain over d = 0..D-1, started from 0, whatever the tiling.
#pragma once
#include "device.h"

namespace mirepro {

static_assert(kThreads == 256);
constexpr int kTileQueries = 64, kTileRows = 128, kTileDims = 16;  // a block's tile
constexpr int kOwnQueries = 4, kOwnRows = 8;                       // a thread's part of it; kThreads parts in all

/// A slice of kTileDims dimensions of a block's queries and rows, transposed.
struct alignas(16) Tile {
  float z[kTileDims][kTileQueries + 4];
  float rows[kTileDims][kTileRows + 4];
};

/// Neither NaN nor inf.
__device__ inline bool is_number(double x) { return x - x == 0; }

__device__ inline int own_query() { return threadIdx.x % (kTileQueries / kOwnQueries) * kOwnQueries; }
__device__ inline int own_row() { return threadIdx.x / (kTileQueries / kOwnQueries) * kOwnRows; }

struct alignas(16) Four {
  float at[4];
};

/// One dimension of a slice: the thread's queries times its rows.
__device__ inline void score_step(const Tile& tile, int d, float (&sum)[kOwnQueries][kOwnRows]) {
  const Four z = *reinterpret_cast<const Four*>(&tile.z[d][own_query()]);
  const Four rows[] = {*reinterpret_cast<const Four*>(&tile.rows[d][own_row()]), *reinterpret_cast<const Four*>(&tile.rows[d][own_row() + 4])};
#pragma unroll
  for (int i = 0; i < kOwnQueries; ++i)
#pragma unroll
    for (int j = 0; j < kOwnRows; ++j) sum[i][j] = __fmaf_rn(rows[j / 4].at[j % 4], z.at[i], sum[i][j]);
}

__device__ inline void score_slice(const Tile& tile, int width, float (&sum)[kOwnQueries][kOwnRows]) {
  if (width < kTileDims) {
    for (int d = 0; d < width; ++d) score_step(tile, d, sum);
    return;
  }
#pragma unroll
  for (int d = 0; d < kTileDims; ++d) score_step(tile, d, sum);
}

/// Scores of queries first_query.. and rows first_row.. of a block; each thread gets those of its own queries and rows.
/// Every thread of the block must take part. Places past the end hold rubbish.
__device__ inline void score_tile(Tile& tile, const float* z, int64_t queries, int64_t first_query, const float* bank, int64_t rows,
                                  int64_t first_row, int64_t dim, float (&sum)[kOwnQueries][kOwnRows]) {
  for (auto& of_query : sum)
    for (float& s : of_query) s = 0.0f;
  for (int64_t begin = 0; begin < dim; begin += kTileDims) {
    const int width = dim - begin < kTileDims ? static_cast<int>(dim - begin) : kTileDims;
    for (int i = threadIdx.x; i < kTileQueries * kTileDims; i += kThreads) {
      const int q = i / kTileDims, d = i % kTileDims;
      tile.z[d][q] = first_query + q < queries && d < width ? z[(first_query + q) * dim + begin + d] : 0.0f;
    }
    for (int i = threadIdx.x; i < kTileRows * kTileDims; i += kThreads) {
      const int r = i / kTileDims, d = i % kTileDims;
      tile.rows[d][r] = first_row + r < rows && d < width ? bank[(first_row + r) * dim + begin + d] : 0.0f;
    }
    __syncthreads();
    score_slice(tile, width, sum);
    __syncthreads();
  }
}

constexpr int kDotRows = 128, kDotDims = 32;  // gathered rows a block of kDotRows threads scores together

/// Thread t's score of z with row[t] (t < n <= kDotRows), rows staged through shared memory so that reads are wide.
/// Every thread of the block must take part; `row` lies in shared memory and stands already.
__device__ inline float dot_rows(const float* z, const float* bank, const int64_t* row, int n, int64_t dim) {
  __shared__ float part[kDotRows][kDotDims + 1];
  const int t = threadIdx.x;
  float sum = 0.0f;
  for (int64_t begin = 0; begin < dim; begin += kDotDims) {
    const int width = dim - begin < kDotDims ? static_cast<int>(dim - begin) : kDotDims;
    for (int i = t; i < n * kDotDims; i += kDotRows)
      if (i % kDotDims < width) part[i / kDotDims][i % kDotDims] = bank[row[i / kDotDims] * dim + begin + i % kDotDims];
    __syncthreads();
    if (t < n)
      for (int d = 0; d < width; ++d) sum = __fmaf_rn(part[t][d], z[begin + d], sum);
    __syncthreads();
  }
  return sum;
}

}  // namespace mirepro
