#include "gather.h"
#include "lse.h"

namespace mirepro {
namespace {

__global__ void gather_nce_kernel(const float* z, const float* bank, const int64_t* index, int64_t k, int64_t dim, double tau, float* ce,
                                  float* dz, Count* bad) {
  __shared__ Rows rows;
  __shared__ Sum sum;
  __shared__ double positive;
  const int64_t q = blockIdx.x;
  const int t = threadIdx.x;
  float* weighted = dz == nullptr ? nullptr : dz + q * dim;
  start(sum);
  for (int64_t first = 0; first < k; first += kDotRows) {
    const int n = k - first < kDotRows ? static_cast<int>(k - first) : kDotRows;
    if (t < n) rows.row[t] = index[q * k + first + t];
    if (t <= kBatches) rows.begin[t] = t * kBatch < n ? t * kBatch : n;
    __syncthreads();
    const float score = dot_rows(z + q * dim, bank, rows.row, n, dim);
    if (t < n) {
      rows.f[t] = static_cast<double>(score) / tau;
      if (!is_number(rows.f[t])) atomicMin(bad, static_cast<Count>(q));
      if (first + t == 0) positive = rows.f[0];
    }
    __syncthreads();
    add(sum, rows, bank, dim, weighted);
  }
  if (t == 0) ce[q] = static_cast<float>(value(sum) - positive);
  const float* own = bank + index[q * k] * dim;
  for (int64_t d = t; d < dim && weighted != nullptr; d += kDotRows)
    weighted[d] = static_cast<float>((weighted[d] / sum.sum - own[d]) / tau);
}

}  // namespace

std::tuple<Tensor, Tensor> gather_nce(const Tensor& z, const Tensor& bank, const Tensor& index, double tau, bool gradient) {
  const auto [q, b] = queries_and_bank(z, bank);
  require(tau > 0, "tau: must be positive");
  const Device device(z);
  const Gather gather(device, q.rows, b, index, &q);
  const int64_t width = gradient ? q.cols : 0;
  auto ce = new_floats(z, {q.rows}), dz = new_floats(z, {q.rows, width});
  if (gradient) device.fill(floats(dz), 0, q.rows * width * sizeof(float));
  device.run(gather_nce_kernel, dim3(q.rows), kDotRows, q.data, b.data, gather.index.data, gather.index.cols, b.cols, tau, floats(ce),
             gradient ? floats(dz) : nullptr, gather.bad.data);
  gather.verify();
  return {ce, dz};
}

}  // namespace mirepro
