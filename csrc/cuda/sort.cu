// A bitonic sort of many arrays of keys at once: its steps depend on their length alone.
#include "sort.h"

#include <algorithm>

namespace mirepro {
namespace {

constexpr int64_t kChunk = 1024;  // keys a block sorts in shared memory

/// The stages of a bitonic sort whose partners lie within a chunk: sizes from..to, or the end of one larger size.
__global__ void sort_chunk_kernel(Key* keys, int64_t n, int64_t from, int64_t to) {
  __shared__ Key chunk[kChunk];
  const int64_t length = n < kChunk ? n : kChunk, begin = blockIdx.x * length;
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) chunk[i] = keys[begin + i];
  __syncthreads();
  for (int64_t size = from; size <= to; size *= 2)
    for (int64_t stride = (size < length ? size : length) / 2; stride > 0; stride /= 2) {
      for (int64_t p = threadIdx.x; p < length / 2; p += blockDim.x) {
        const int64_t i = p / stride * 2 * stride + p % stride;
        const bool ascending = ((begin + i) % n & size) == 0;
        const Key a = chunk[i], b = chunk[i + stride];
        if ((a > b) == ascending) {
          chunk[i] = b;
          chunk[i + stride] = a;
        }
      }
      __syncthreads();
    }
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) keys[begin + i] = chunk[i];
}

/// One stage whose partners lie `stride` >= kChunk apart.
__global__ void sort_step_kernel(Key* keys, int64_t pairs, int64_t n, int64_t size, int64_t stride) {
  for (int64_t p = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; p < pairs; p += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t i = p / stride * 2 * stride + p % stride;
    const bool ascending = (i % n & size) == 0;
    const Key a = keys[i], b = keys[i + stride];
    if ((a > b) == ascending) {
      keys[i] = b;
      keys[i + stride] = a;
    }
  }
}

}  // namespace

int64_t power_of_two(int64_t at_least) {
  int64_t n = 1;
  while (n < at_least) n *= 2;
  return n;
}

void sort_keys(const Device& device, Key* keys, int64_t arrays, int64_t n) {
  if (n < 2) return;
  const int64_t length = std::min(n, kChunk);
  const auto chunks = static_cast<unsigned>(arrays * n / length);
  device.run(sort_chunk_kernel, chunks, kThreads, keys, n, int64_t{2}, length);
  for (int64_t size = 2 * length; size <= n; size *= 2) {
    for (int64_t stride = size / 2; stride >= length; stride /= 2)
      device.run(sort_step_kernel, blocks_for(arrays * n / 2), kThreads, keys, arrays * n / 2, n, size, stride);
    device.run(sort_chunk_kernel, chunks, kThreads, keys, n, size, size);
  }
}

}  // namespace mirepro
