#include "../cpu/region.h"
#include "select.h"

namespace mirepro {
namespace {

__global__ void unpack_kernel(const Key* keys, int64_t stride, int64_t queries, int64_t k, float* score, int64_t* index) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < queries * k; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const Key key = keys[i / k * stride + i % k];
    score[i] = score_of(key);
    index[i] = row_of(key);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> neighbors(const Tensor& z, const Tensor& bank, int64_t k) {
  const auto [q, b] = queries_and_bank(z, bank);
  const Device device(z);
  Checks checks(device);
  checks.finite(q, "z");
  checks.verify();
  require(1 <= k && k <= b.rows, "k: need 1 <= k <= " + std::to_string(b.rows) + ", got " + std::to_string(k));
  auto score = new_floats(z, {q.rows, k}), index = new_longs(z, {q.rows, k});
  const int64_t at_once = queries_at_once(b, k);
  for (int64_t begin = 0; begin < q.rows; begin += at_once) {
    Matrix part = q;
    part.data = q.row(begin);
    part.rows = std::min(at_once, q.rows - begin);
    const auto best = find_best(device, part, b, k);
    device.run(unpack_kernel, blocks_for(part.rows * k), kThreads, best.keys.data, best.stride, part.rows, k, floats(score) + begin * k,
               longs(index) + begin * k);
  }
  return {score, index};
}

}  // namespace mirepro
