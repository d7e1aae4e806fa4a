#include "company.h"
#include "lse.h"
#include "select.h"

namespace mirepro {
namespace {

constexpr int64_t kSlice = 384;  // rows between two flushes of a batch: cpu/score.h's kTile, part of the fixed order
constexpr int kSliceWords = kSlice / 64;

/// The own row always counts: where it is no member, the member of the last rank gives way.
__global__ void admit_own_kernel(uint64_t* bits, int64_t words, const int64_t* own, const Key* last, int64_t queries) {
  for (int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; q < queries; q += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint64_t* of_query = bits + q * words;
    const int64_t row = own[q], gives_way = row_of(last[q]);
    if (of_query[row / 64] >> (row % 64) & 1) continue;
    of_query[gives_way / 64] &= ~(uint64_t{1} << (gives_way % 64));
    of_query[row / 64] |= uint64_t{1} << (row % 64);
  }
}

struct Output {
  float *value, *gradient;  // gradient: null, or (B, D) zeros
};

__device__ inline void write(const Sum& sum, const Output& out, int64_t q, int64_t dim, double tau) {
  if (threadIdx.x == 0) out.value[q] = static_cast<float>(value(sum));
  for (int64_t d = threadIdx.x; d < dim && out.gradient != nullptr; d += kDotRows) {
    float& g = out.gradient[q * dim + d];
    g = sum.sum > 0 ? static_cast<float>(g / sum.sum / tau) : 0.0f;
  }
}

/// The mates among `rows`, batch by batch as they stood there. Thread 0 works: mates are few.
__device__ inline void take_mates(const Rows& rows, const bool* mate, Rows& mates) {
  if (threadIdx.x != 0) return;
  int taken = 0;
  for (int b = 0; b < kBatches; ++b) {
    mates.begin[b] = taken;
    for (int r = rows.begin[b]; r < rows.begin[b + 1]; ++r)
      if (mate[r]) {
        mates.row[taken] = rows.row[r];
        mates.f[taken++] = rows.f[r];
      }
  }
  mates.begin[kBatches] = taken;
}

/// One block per query, its members in bank-index order: slices of kSlice rows, batches of kBatch members within.
__global__ void region_logsumexp_kernel(const float* z, const float* bank, int64_t dim, const uint64_t* bits, int64_t words,
                                        Company company, double tau, Output all_out, Output mates_out) {
  __shared__ Sum all, mates;
  __shared__ Rows piece, mate_piece;
  __shared__ bool mate[kDotRows];
  __shared__ int before[kSliceWords + 1];
  const int64_t q = blockIdx.x, own = company.own == nullptr ? -1 : company.own[q];
  const int t = threadIdx.x;
  float* weighted = all_out.gradient == nullptr ? nullptr : all_out.gradient + q * dim;
  float* mates_weighted = mates_out.gradient == nullptr ? nullptr : mates_out.gradient + q * dim;
  start(all);
  start(mates);
  for (int64_t first = 0; first < words; first += kSliceWords) {
    const uint64_t* slice = bits + q * words + first;
    if (t == 0) {
      before[0] = 0;
      for (int w = 0; w < kSliceWords; ++w) before[w + 1] = before[w] + (first + w < words ? __popcll(slice[w]) : 0);
    }
    __syncthreads();
    const int members = before[kSliceWords];
    for (int begin = 0; begin < members; begin += kDotRows) {
      const int n = members - begin < kDotRows ? members - begin : kDotRows;
      if (t < n) {
        int w = 0;
        while (before[w + 1] <= begin + t) ++w;
        uint64_t left = slice[w];
        for (int skip = begin + t - before[w]; skip > 0; --skip) left &= left - 1;
        piece.row[t] = (first + w) * 64 + __ffsll(static_cast<long long>(left)) - 1;
      }
      if (t <= kBatches) piece.begin[t] = t * kBatch < n ? t * kBatch : n;
      __syncthreads();
      const float score = dot_rows(z + q * dim, bank, piece.row, n, dim);
      if (t < n) {
        piece.f[t] = static_cast<double>(score) / tau;
        mate[t] = own >= 0 && company.mates(own, piece.row[t]);
      }
      __syncthreads();
      add(all, piece, bank, dim, weighted);
      if (own < 0) continue;
      take_mates(piece, mate, mate_piece);
      __syncthreads();
      if (mate_piece.begin[kBatches] > 0) add(mates, mate_piece, bank, dim, mates_weighted);
      __syncthreads();
    }
    __syncthreads();
  }
  write(all, all_out, q, dim, tau);
  write(mates, mates_out, q, dim, tau);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> region_logsumexp(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank,
                                                            double tau, MaybeTensor own, MaybeTensor labels, bool gradient) {
  const auto [q, b] = queries_and_bank(z, bank);
  require(tau > 0, "tau: must be positive");
  const Device device(z);
  Checks checks(device);
  checks.finite(q, "z");
  const CompanyTensors tensors(own, labels, q.rows, b.rows, checks);
  checks.verify();
  const auto company = tensors.company();
  const auto region = find_region(device, q, b, lo_rank, hi_rank, true);
  if (company.own != nullptr)
    device.run(admit_own_kernel, blocks_for(q.rows), kThreads, region.members.data, region.words, company.own, region.last.data, q.rows);
  const int64_t width = gradient ? q.cols : 0;
  auto all = new_floats(z, {q.rows}), mates = new_floats(z, {q.rows});
  auto d_all = new_floats(z, {q.rows, width}), d_mates = new_floats(z, {q.rows, width});
  for (auto& t : {d_all, d_mates})
    if (gradient) device.fill(floats(t), 0, q.rows * width * sizeof(float));
  device.run(region_logsumexp_kernel, dim3(q.rows), kDotRows, q.data, b.data, b.cols, region.members.data, region.words, company, tau,
             Output{floats(all), gradient ? floats(d_all) : nullptr}, Output{floats(mates), gradient ? floats(d_mates) : nullptr});
  return {all, mates, d_all, d_mates};
}

}  // namespace mirepro
