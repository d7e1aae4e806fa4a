#include "device.h"

namespace mirepro {
namespace {

__global__ void find_not_finite(const float* values, int64_t n, int64_t dim, Count* first) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    if ((bits & 0x7F800000u) == 0x7F800000u) atomicMin(first, static_cast<Count>(i / dim));
  }
}

__global__ void find_outside(const int64_t* index, int64_t n, int64_t limit, Count* first) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    if (index[i] < 0 || index[i] >= limit) atomicMin(first, static_cast<Count>(i));
}

}  // namespace

Checks::Checks(const Device& device) : device_(device), first_(device, kMost) { first_.fill(device, 0xFF); }

void Checks::finite(const Matrix& m, const char* name) {
  const int64_t n = m.rows * m.cols;
  device_.run(find_not_finite, blocks_for(n), kThreads, m.data, n, m.cols, first_.data + kinds_.size());
  kinds_.emplace_back(name, std::nullopt);
}

void Checks::inside(const View<int64_t>& index, int64_t n, const char* name) {
  const int64_t entries = index.rows * index.cols;
  device_.run(find_outside, blocks_for(entries), kThreads, index.data, entries, n, first_.data + kinds_.size());
  kinds_.emplace_back(name, Inside{name, index, n});
}

void Checks::verify() {
  const auto first = first_.read(device_);
  for (size_t i = 0; i < kinds_.size(); ++i) {
    if (first[i] == kNone) continue;
    const auto& [name, inside] = kinds_[i];
    const auto at = static_cast<int64_t>(first[i]);
    if (!inside) fail(std::string(name) + ": row " + std::to_string(at) + " holds NaN or inf");
    int64_t value = 0;
    device_.download(&value, inside->index.data + at, sizeof value);
    fail(std::string(name) + ": " + std::to_string(value) + " (row " + std::to_string(at / inside->index.cols) + ") is outside [0, " +
         std::to_string(inside->n) + ")");
  }
}

std::pair<Matrix, Matrix> queries_and_bank(const Tensor& z, const Tensor& bank) {
  auto q = view<float>(z, "z", 2), b = view<float>(bank, "bank", 2);
  require(b.rows > 0 && b.rows < (int64_t{1} << 32), "bank: needs 1 to 2^32 - 1 rows");
  require(q.cols == b.cols, "z and bank: widths differ (" + std::to_string(q.cols) + ", " + std::to_string(b.cols) + ")");
  return {q, b};
}

}  // namespace mirepro
