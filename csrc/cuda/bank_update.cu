#include "../cpu/bank.h"
#include "device.h"

namespace mirepro {
namespace {

/// One block per entry. The first entry of a row does all of the row's entries in order; the others do nothing.
__global__ void bank_update_kernel(float* bank, const int64_t* index, const float* z, int64_t entries, int64_t dim, float m) {
  __shared__ double square;
  const int64_t own = index[blockIdx.x];
  for (int64_t i = 0; i < blockIdx.x; ++i)
    if (index[i] == own) return;  // the whole block leaves
  float* row = bank + own * dim;
  for (int64_t i = blockIdx.x; i < entries; ++i) {
    if (index[i] != own) continue;
    const float* update = z + i * dim;
    if (threadIdx.x == 0) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const float mixed = m * row[d] + (1.0f - m) * update[d];
        sum += static_cast<double>(mixed) * mixed;
      }
      square = sum;
    }
    __syncthreads();
    const double norm = sqrt(square);
    for (int64_t d = threadIdx.x; d < dim && square != 0; d += blockDim.x)
      row[d] = m == 0 ? update[d] : static_cast<float>((m * row[d] + (1.0f - m) * update[d]) / norm);
    __syncthreads();
  }
}

}  // namespace

void bank_update_(Tensor bank, const Tensor& index, const Tensor& z, double momentum) {
  require(bank.is_contiguous(), "bank: must be contiguous to be updated in place");
  const auto b = view<float>(bank, "bank", 2), q = view<float>(z, "z", 2);
  const auto rows = view<int64_t>(index, "index", 1);
  require(b.cols == q.cols && rows.rows == q.rows, "bank, index and z: shapes (N, D), (B,), (B, D) do not fit");
  require(momentum >= 0 && momentum <= 1, "momentum: must lie in [0, 1]");
  const Device device(bank);
  Checks checks(device);
  checks.inside(rows, b.rows, "index");
  checks.finite(q, "z");
  checks.verify();
  if (momentum == 1) return;
  device.run(bank_update_kernel, dim3(q.rows), 128, floats(bank), rows.data, q.data, q.rows, b.cols, static_cast<float>(momentum));
}

}  // namespace mirepro
