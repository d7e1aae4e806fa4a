// region_size and region_sample: bitmaps of the members, exclusion, and draws by number in bank-index order.
#include "../philox.h"
#include "company.h"
#include "select.h"
#include "sort.h"

namespace mirepro {
namespace {

/// Members of every query after exclusion: bits, members before each word, and how many there are.
struct Members {
  const uint64_t* bits;
  const uint32_t* before;
  const int64_t* size;
  int64_t words;

  /// Bank row of query q's member of the given number.
  __device__ int64_t row(int64_t q, int64_t number) const {
    const uint32_t* of_query = before + q * words;
    int64_t lo = 0, hi = words;  // the last word with before <= number
    while (hi - lo > 1) {
      const int64_t middle = (lo + hi) / 2;
      if (of_query[middle] <= number)
        lo = middle;
      else
        hi = middle;
    }
    uint64_t left = bits[q * words + lo];
    for (int64_t skip = number - of_query[lo]; skip > 0; --skip) left &= left - 1;
    return lo * 64 + __ffsll(static_cast<long long>(left)) - 1;
  }
};

__device__ inline uint64_t without_own(uint64_t word, int64_t w, int64_t own) {
  return own / 64 == w ? word & ~(uint64_t{1} << (own % 64)) : word;
}

__device__ inline uint64_t without_mates(uint64_t word, int64_t w, const Company& company, int64_t own) {
  uint64_t kept = word;
  for (uint64_t left = word; left != 0; left &= left - 1) {
    const int bit = __ffsll(static_cast<long long>(left)) - 1;
    if (company.mates(own, w * 64 + bit)) kept &= ~(uint64_t{1} << bit);
  }
  return kept;
}

/// One block per query, a run of words per thread. Where exclusion leaves nobody: the region without the own row, or
/// the region itself where that is empty too.
__global__ void exclude_kernel(uint64_t* bits, int64_t words, Company company, bool exclude, bool mates, uint32_t* before, int64_t* size,
                               int64_t* size_or_zero) {
  __shared__ Count all, kept;
  __shared__ uint32_t sums[kThreads];
  const int64_t q = blockIdx.x, own = exclude ? company.own[q] : -1;
  const int64_t run = (words + kThreads - 1) / kThreads, begin = threadIdx.x * run;
  const int64_t end = begin + run < words ? begin + run : words;
  uint64_t* of_query = bits + q * words;
  if (threadIdx.x == 0) all = kept = 0;
  __syncthreads();
  const bool by_label = mates && company.clusterings > 0;
  Count all_here = 0, kept_here = 0;
  for (int64_t w = begin; w < end; ++w) {
    const uint64_t word = of_query[w];
    all_here += __popcll(word);
    if (exclude) kept_here += __popcll(by_label ? without_mates(word, w, company, own) : without_own(word, w, own));
  }
  atomicAdd(&all, all_here);
  atomicAdd(&kept, kept_here);
  __syncthreads();
  const bool fallback = exclude && kept == 0;
  uint32_t here = 0;
  for (int64_t w = begin; w < end; ++w) {
    uint64_t word = of_query[w];
    if (exclude && !fallback) word = by_label ? without_mates(word, w, company, own) : without_own(word, w, own);
    if (fallback && all > 1) word = without_own(word, w, own);
    of_query[w] = word;
    here += __popcll(word);
  }
  sums[threadIdx.x] = here;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t total = 0;
    for (unsigned t = 0; t < kThreads; ++t) {
      const uint32_t count = sums[t];
      sums[t] = total;
      total += count;
    }
    size[q] = total;
    size_or_zero[q] = fallback ? 0 : total;
  }
  __syncthreads();
  uint32_t total = sums[threadIdx.x];
  for (int64_t w = begin; w < end; ++w) {
    before[q * words + w] = total;
    total += __popcll(of_query[w]);
  }
}

struct Random {
  uint32_t seed, stream, step;
  const int64_t* sample;

  __device__ Philox of(int64_t q) const { return {seed, stream, step, static_cast<uint64_t>(sample[q])}; }
};

/// A thread makes the four draws of one Philox block.
__global__ void draw_kernel(Members members, Random random, int64_t queries, int64_t k, int64_t* out) {
  const int64_t blocks = (k + 3) / 4;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < queries * blocks; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t q = i / blocks, t = i % blocks * 4;
    const auto words = random.of(q).block(static_cast<uint32_t>(t / 4));
    for (int64_t j = 0; j < 4 && t + j < k; ++j) out[q * k + t + j] = members.row(q, mulhi(words[j], members.size[q]));
  }
}

/// Member m's priority: its word, ties by number.
struct Priority {
  Philox random;
  __device__ Key operator()(int64_t m) const {
    return static_cast<Key>(random.block(static_cast<uint32_t>(m / 4))[m % 4]) << 32 | static_cast<Key>(m);
  }
};

/// The k members of smallest priority of every query, in no order, at q * stride.
__global__ void smallest_kernel(const int64_t* size, Random random, int64_t k, int64_t stride, Key* out) {
  __shared__ unsigned filled;
  const int64_t q = blockIdx.x;
  const Priority priority{random.of(q)};
  const Key last = radix_select(priority, size[q], k - 1);
  if (threadIdx.x == 0) filled = 0;
  __syncthreads();
  for (int64_t m = threadIdx.x; m < size[q]; m += blockDim.x) {
    const Key key = priority(m);
    if (key <= last) out[q * stride + atomicAdd(&filled, 1u)] = key;
  }
}

__global__ void number_kernel(Members members, const Key* keys, int64_t stride, int64_t queries, int64_t k, int64_t* out) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < queries * k; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    out[i] = members.row(i / k, row_of(keys[i / k * stride + i % k]));
}

__global__ void fill_bits_kernel(uint64_t* bits, int64_t queries, int64_t rows, int64_t words) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < queries * words; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    bits[i] = i % words == words - 1 && rows % 64 != 0 ? (uint64_t{1} << (rows % 64)) - 1 : ~uint64_t{0};
}

/// The region's members; the whole bank needs no scan.
Buffer<uint64_t> region_members(const Device& device, const Matrix& z, const Matrix& bank, int64_t lo, int64_t hi) {
  if (lo != 0 || hi != bank.rows) return find_region(device, z, bank, lo, hi, true).members;
  const int64_t words = (bank.rows + 63) / 64;
  Buffer<uint64_t> bits(device, z.rows * words);
  device.run(fill_bits_kernel, blocks_for(bits.size), kThreads, bits.data, z.rows, bank.rows, words);
  return bits;
}

/// Bits after exclusion, with their counts.
struct Counted {
  int64_t words;
  Buffer<uint64_t> bits;
  Buffer<uint32_t> before;
  Buffer<int64_t> size;

  Counted(const Device& device, Buffer<uint64_t> members, int64_t queries, int64_t rows, const Company& company, bool exclude, bool mates,
          int64_t* size_or_zero)
      : words((rows + 63) / 64), bits(std::move(members)), before(device, queries * words), size(device, queries) {
    device.run(exclude_kernel, dim3(queries), kThreads, bits.data, words, company, exclude, mates, before.data, size.data, size_or_zero);
  }

  Members members() const { return {bits.data, before.data, size.data, words}; }
};

CompanyTensors checked_company(const Matrix& z, const Matrix& bank, const MaybeTensor& own, const MaybeTensor& labels, bool excludes,
                               Checks& checks) {
  require(!excludes || own.has_value(), "own: needed to exclude the own row or its mates");
  checks.finite(z, "z");
  return CompanyTensors(own, labels, z.rows, bank.rows, checks);
}

}  // namespace

Tensor region_size(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank, MaybeTensor own, MaybeTensor labels,
                   bool exclude_own, bool exclude_mates) {
  const auto [q, b] = queries_and_bank(z, bank);
  const Device device(z);
  Checks checks(device);
  const bool excludes = exclude_own || exclude_mates;
  const auto company = checked_company(q, b, own, labels, excludes, checks);
  checks.verify();
  auto size = new_longs(z, {q.rows});
  const Counted counted(device, find_region(device, q, b, lo_rank, hi_rank, true).members, q.rows, b.rows, company.company(), excludes,
                        exclude_mates, longs(size));
  return size;
}

Tensor region_sample(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank, int64_t k, int64_t seed, int64_t stream,
                     int64_t step, const Tensor& sample_index, MaybeTensor own, MaybeTensor labels, bool exclude_own, bool exclude_mates,
                     bool replacement) {
  const auto [q, b] = queries_and_bank(z, bank);
  const Device device(z);
  Checks checks(device);
  const bool excludes = exclude_own || exclude_mates;
  const auto company = checked_company(q, b, own, labels, excludes, checks);
  const auto sample = view<int64_t>(sample_index, "sample_index", 1);
  require(sample.rows == q.rows, "sample_index: needs one entry per query");
  require(k >= 1, "k: must be at least 1");
  require(0 <= lo_rank && lo_rank < hi_rank && hi_rank <= b.rows, "ranks: need 0 <= lo_rank < hi_rank <= " + std::to_string(b.rows));
  checks.verify();
  const Buffer<int64_t> size_or_zero(device, q.rows);
  const Counted counted(device, region_members(device, q, b, lo_rank, hi_rank), q.rows, b.rows, company.company(), excludes, exclude_mates,
                        size_or_zero.data);
  const Random random{static_cast<uint32_t>(seed), static_cast<uint32_t>(stream), static_cast<uint32_t>(step), sample.data};
  auto index = new_longs(z, {q.rows, k});
  if (replacement) {
    device.run(draw_kernel, blocks_for(q.rows * ((k + 3) / 4)), kThreads, counted.members(), random, q.rows, k, longs(index));
    return index;
  }
  const auto size = counted.size.read(device);
  for (int64_t i = 0; i < q.rows; ++i)
    require(k <= size[i], "k: " + std::to_string(k) + " draws without replacement from the " + std::to_string(size[i]) +
                              " members of row " + std::to_string(i) + "; lower k or widen the region");
  const int64_t stride = power_of_two(k);
  const Buffer<Key> keys(device, q.rows * stride);
  keys.fill(device, 0xFF);
  device.run(smallest_kernel, dim3(q.rows), kThreads, counted.size.data, random, k, stride, keys.data);
  sort_keys(device, keys.data, q.rows, stride);
  device.run(number_kernel, blocks_for(q.rows * k), kThreads, counted.members(), keys.data, stride, q.rows, k, longs(index));
  return index;
}

}  // namespace mirepro
