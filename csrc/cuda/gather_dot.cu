#include "gather.h"

namespace mirepro {
namespace {

__global__ void gather_dot_kernel(const float* z, const float* bank, const int64_t* index, int64_t k, int64_t dim, float* out, Count* bad) {
  __shared__ int64_t row[kDotRows];
  const int64_t q = blockIdx.x;
  for (int64_t first = blockIdx.y * static_cast<int64_t>(kDotRows); first < k; first += static_cast<int64_t>(gridDim.y) * kDotRows) {
    const int n = k - first < kDotRows ? static_cast<int>(k - first) : kDotRows;
    const int t = threadIdx.x;
    if (t < n) row[t] = index[q * k + first + t];
    __syncthreads();
    const float score = dot_rows(z + q * dim, bank, row, n, dim);
    if (t < n) {
      out[q * k + first + t] = score;
      if (!is_number(score)) atomicMin(bad, static_cast<Count>(q));
    }
  }
}

__global__ void gather_dot_backward_kernel(const float* grad, const float* bank, const int64_t* index, int64_t k, int64_t dim, float* out) {
  const int64_t q = blockIdx.x;
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
    float sum = 0.0f;
    for (int64_t t = 0; t < k; ++t) sum = __fmaf_rn(grad[q * k + t], bank[index[q * k + t] * dim + d], sum);
    out[q * dim + d] = sum;
  }
}

}  // namespace

Tensor gather_dot(const Tensor& z, const Tensor& bank, const Tensor& index) {
  const auto [q, b] = queries_and_bank(z, bank);
  const Device device(z);
  const Gather gather(device, q.rows, b, index, &q);
  const int64_t k = gather.index.cols;
  auto result = new_floats(z, {q.rows, k});
  device.run(gather_dot_kernel, dim3(q.rows, blocks_for(k, kDotRows)), kDotRows, q.data, b.data, gather.index.data, k, b.cols,
             floats(result), gather.bad.data);
  gather.verify();
  return result;
}

Tensor gather_dot_backward(const Tensor& grad, const Tensor& bank, const Tensor& index) {
  const auto g = view<float>(grad, "grad", 2), b = view<float>(bank, "bank", 2);
  const Device device(grad);
  const Gather gather(device, g.rows, b, index, nullptr);
  require(g.cols == gather.index.cols, "grad: must have the shape of index");
  auto result = new_floats(grad, {g.rows, b.cols});
  device.run(gather_dot_backward_kernel, dim3(g.rows), kThreads, g.data, b.data, gather.index.data, g.cols, b.cols, floats(result));
  return result;
}

}  // namespace mirepro
