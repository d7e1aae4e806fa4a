#include "gather.h"

namespace mirepro {
namespace {

__global__ void find_bad_gathered(const float* bank, const int64_t* index, int64_t k, int64_t dim, Count* first) {
  for (int64_t t = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; t < k; t += static_cast<int64_t>(gridDim.x) * blockDim.x)
    for (int64_t d = 0; d < dim; ++d)
      if (!is_number(bank[index[t] * dim + d])) atomicMin(first, static_cast<Count>(t));
}

}  // namespace

Gather::Gather(const Device& device_, int64_t queries, const Matrix& bank_, const Tensor& index_, const Matrix* z)
    : device(device_), bank(bank_), index(view<int64_t>(index_, "index", 2)), bad(device_, 1) {
  require(index.rows == queries, "index: needs one row per query");
  require(index.cols >= 1, "index: needs at least one column");
  Checks checks(device);
  if (z != nullptr) checks.finite(*z, "z");
  checks.inside(index, bank.rows, "index");
  checks.verify();
  bad.fill(device, 0xFF);
}

void Gather::verify() const {
  const Count query = bad.read(device)[0];
  if (query == kNone) return;
  const int64_t* of_query = index.row(static_cast<int64_t>(query));
  const Buffer<Count> first(device, 1);
  first.fill(device, 0xFF);
  device.run(find_bad_gathered, blocks_for(index.cols), kThreads, bank.data, of_query, index.cols, bank.cols, first.data);
  const Count at = first.read(device)[0];
  if (at == kNone) fail("z: the scores of row " + std::to_string(query) + " overflow");
  int64_t row = 0;
  device.download(&row, of_query + at, sizeof row);
  fail("bank: row " + std::to_string(row) + " holds NaN or inf");
}

}  // namespace mirepro
