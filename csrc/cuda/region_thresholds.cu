#include "../cpu/region.h"
#include "select.h"

namespace mirepro {
namespace {

__global__ void thresholds_kernel(const Key* first, const Key* last, int64_t queries, float* out) {
  for (int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; q < queries; q += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    out[2 * q] = score_of(first[q]);
    out[2 * q + 1] = score_of(last[q]);
  }
}

}  // namespace

Tensor region_thresholds(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank) {
  const auto [q, b] = queries_and_bank(z, bank);
  const Device device(z);
  Checks checks(device);
  checks.finite(q, "z");
  checks.verify();
  const auto region = find_region(device, q, b, lo_rank, hi_rank, false);
  auto result = new_floats(z, {q.rows, 2});
  device.run(thresholds_kernel, blocks_for(q.rows), kThreads, region.first.data, region.last.data, q.rows, floats(result));
  return result;
}

}  // namespace mirepro
