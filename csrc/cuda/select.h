// Exact order statistics of every query's scores on the device: never a B x N buffer, never a sort of a bank.
#pragma once
#include "../bracket.h"
#include "device.h"

namespace mirepro {

/// The region of ranks [lo, hi): its first and last key per query, and its members, N bits a query, where asked for.
struct FoundRegion {
  Buffer<Key> first, last;
  int64_t words;
  Buffer<uint64_t> members;
};

/// Throws std::invalid_argument for ranks outside 0 <= lo < hi <= N or a bank row that is not finite.
FoundRegion find_region(const Device& device, const Matrix& z, const Matrix& bank, int64_t lo, int64_t hi, bool with_members);

/// The k best keys of every query, sorted: query q's begin at q * stride.
struct FoundBest {
  int64_t stride;
  Buffer<Key> keys;
};
/// As many queries as fit the scratch memory in one go are the caller's to choose: `queries_at_once`.
FoundBest find_best(const Device& device, const Matrix& z, const Matrix& bank, int64_t k);
int64_t queries_at_once(const Matrix& bank, int64_t k);

/// The key of number `rank` among key(0..n-1) by radix: eight passes, one digit of eight bits each. Whole block; every
/// thread gets the result.
template <class Source>
__device__ Key radix_select(const Source& key, int64_t n, int64_t rank) {
  __shared__ unsigned histogram[256];
  __shared__ Key digit;
  __shared__ int64_t left;
  Key found = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const Key k = key(i);
      if (shift == 56 || k >> (shift + 8) == found >> (shift + 8)) atomicAdd(&histogram[k >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t before = 0;
      unsigned d = 0;
      while (d < 255 && before + histogram[d] <= rank) before += histogram[d++];
      digit = d;
      left = rank - before;
    }
    __syncthreads();
    found |= digit << shift;
    rank = left;
    __syncthreads();
  }
  return found;
}

}  // namespace mirepro
