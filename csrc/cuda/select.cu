// Floyd-Rivest, as on the CPU: a sample of the bank brackets the wanted ranks, one pass over the bank keeps the few
// keys inside the brackets, a count proves them; where it does not, bisection over keys. Keys are distinct, counts and
// sets do not depend on the order of work, so neither does the result.
#include "select.h"

#include <algorithm>
#include <cstdlib>

#include "score.h"
#include "sort.h"

namespace mirepro {
namespace {

constexpr int kEnds = 2;  // of a region: the first and the last rank

/// What one pass over rows needs and leaves. Brackets and counts lie as [query][end].
struct Scan {
  const float* z;
  int64_t queries;
  const float* rows;
  int64_t count, dim;
  const uint32_t* row_ids;  // null: row i is bank row i
  const Bracket* brackets;  // null: every key goes to keys[1], in order of the rows
  Count *better, *inside;
  Key* keys[kEnds];
  int64_t capacity[kEnds];
  uint8_t* members;  // null, or bit r of a query: its key lies between the brackets
  int64_t member_bytes;
  Count* bad_row;  // null, or the first row with a score of query 0 that is not finite
};

__global__ void scan_kernel(Scan scan) {
  __shared__ Tile tile;
  __shared__ Bracket bracket[kTileQueries][kEnds];
  __shared__ float threshold[kTileQueries];
  const int64_t first_query = blockIdx.y * static_cast<int64_t>(kTileQueries);
  if (threadIdx.x < kTileQueries && scan.brackets != nullptr) {
    const int64_t q = first_query + threadIdx.x < scan.queries ? first_query + threadIdx.x : scan.queries - 1;
    Key worst = 0;
    for (int e = 0; e < kEnds; ++e) {
      bracket[threadIdx.x][e] = scan.brackets[q * kEnds + e];
      if (bracket[threadIdx.x][e].hi > worst) worst = bracket[threadIdx.x][e].hi;
    }
    // A key that is no score's (a bisection's midpoint) may decode to NaN: then every score is worth a look.
    const float score = score_of(worst);
    threshold[threadIdx.x] = is_number(score) ? score : -INFINITY;
  }
  __syncthreads();
  Count better[kOwnQueries][kEnds] = {};
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kTileRows); first < scan.count; first += static_cast<int64_t>(gridDim.x) * kTileRows) {
    float sum[kOwnQueries][kOwnRows];
    score_tile(tile, scan.z, scan.queries, first_query, scan.rows, scan.count, first, scan.dim, sum);
    const int64_t row = first + own_row();
#pragma unroll
    for (int i = 0; i < kOwnQueries; ++i) {
      const int lane = own_query() + i;
      const int64_t q = first_query + lane;
      if (q >= scan.queries || row >= scan.count) continue;
      uint8_t bits = 0;
#pragma unroll
      for (int j = 0; j < kOwnRows; ++j) {
        if (row + j >= scan.count) continue;
        const float score = sum[i][j];
        const Key key = make_key(score, scan.row_ids == nullptr ? row + j : scan.row_ids[row + j]);
        if (scan.brackets == nullptr) {
          scan.keys[1][q * scan.capacity[1] + row + j] = key;
          continue;
        }
        if (scan.bad_row != nullptr && q == 0 && !is_number(score)) atomicMin(scan.bad_row, static_cast<Count>(row + j));
        if (!(score >= threshold[lane])) continue;
#pragma unroll
        for (int e = 0; e < kEnds; ++e) {
          if (key < bracket[lane][e].lo) {
            ++better[i][e];
          } else if (key <= bracket[lane][e].hi) {
            const Count at = atomicAdd(&scan.inside[q * kEnds + e], Count{1});
            if (at < static_cast<Count>(scan.capacity[e])) scan.keys[e][q * scan.capacity[e] + at] = key;
          }
        }
        if (key > bracket[lane][0].hi && key < bracket[lane][1].lo) bits |= static_cast<uint8_t>(1u << j);
      }
      if (scan.members != nullptr) scan.members[q * scan.member_bytes + row / 8] = bits;
    }
  }
  if (scan.brackets == nullptr) return;
#pragma unroll
  for (int i = 0; i < kOwnQueries; ++i)
#pragma unroll
    for (int e = 0; e < kEnds; ++e)
      if (better[i][e] != 0) atomicAdd(&scan.better[(first_query + own_query() + i) * kEnds + e], better[i][e]);
}

void run_scan(const Device& device, const Scan& scan) {
  const int64_t groups = (scan.queries + kTileQueries - 1) / kTileQueries, tiles = (scan.count + kTileRows - 1) / kTileRows;
  device.run(scan_kernel, dim3(std::min<int64_t>(tiles, std::max<int64_t>(1, 2048 / groups)), groups), kThreads, scan);
}

__global__ void take_rows_kernel(const float* bank, const uint32_t* ids, int64_t n, int64_t dim, float* out) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n * dim; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    out[i] = bank[ids[i / dim] * dim + i % dim];
}

struct KeysOf {
  const Key* keys;
  __device__ Key operator()(int64_t i) const { return keys[i]; }
};

/// Ranks of the sample that bound the brackets; an end that is not wanted gets an empty bracket.
struct SampleEnds {
  SampleRanks ranks[kEnds];
  bool wanted[kEnds];
  bool from_best;  // the last bracket begins at the best key
};

__global__ void bracket_kernel(const Key* sample, int64_t size, SampleEnds ends, Bracket* brackets) {
  const KeysOf keys{sample + blockIdx.x * size};
  for (int e = 0; e < kEnds; ++e) {
    Bracket bracket{kBest, kWorst};
    if (!ends.wanted[e]) {
      bracket.hi = kBest;
    } else {
      const auto [lo, hi] = ends.ranks[e];
      if (lo >= 0 && lo < size && !(e == 1 && ends.from_best)) bracket.lo = radix_select(keys, size, lo);
      if (hi < size) bracket.hi = radix_select(keys, size, hi);
    }
    if (threadIdx.x == 0) brackets[blockIdx.x * kEnds + e] = bracket;
  }
}

/// Jittered rows of the bank, gathered once per call.
struct Sample {
  int64_t size;
  Buffer<uint32_t> ids;
  Buffer<float> rows;

  Sample(const Device& device, const Matrix& bank) : Sample(device, bank, sample_rows(bank.rows)) {}

 private:
  Sample(const Device& device, const Matrix& bank, const std::vector<int64_t>& chosen)
      : size(static_cast<int64_t>(chosen.size())),
        ids(device, std::vector<uint32_t>(chosen.begin(), chosen.end())),
        rows(device, size * bank.cols) {
    device.run(take_rows_kernel, blocks_for(size * bank.cols), kThreads, bank.data, ids.data, size, bank.cols, rows.data);
  }
};

void make_brackets(const Device& device, const Matrix& z, const Sample& sample, const SampleEnds& ends, Bracket* brackets) {
  const Buffer<Key> keys(device, z.rows * sample.size);
  Scan scan{};
  scan.z = z.data;
  scan.queries = z.rows;
  scan.rows = sample.rows.data;
  scan.count = sample.size;
  scan.dim = z.cols;
  scan.row_ids = sample.ids.data;
  scan.keys[1] = keys.data;
  scan.capacity[1] = sample.size;
  run_scan(device, scan);
  device.run(bracket_kernel, dim3(z.rows), kThreads, keys.data, sample.size, ends, brackets);
}

/// Half-width of the brackets in standard deviations; the tests set it to 0 to see brackets fail.
double sigmas() {
  const char* wish = std::getenv("MIREPRO_CUDA_SIGMAS");
  return wish == nullptr || *wish == '\0' ? 5.0 : std::atof(wish);
}

/// A pass over the whole bank with counts that start at zero.
struct Pass {
  Buffer<Count> counts;  // better[query][end], inside[query][end], the bad row
  std::vector<Count> read;

  Pass(const Device& device, int64_t queries) : counts(device, 2 * queries * kEnds + 1) {}

  void run(const Device& device, Scan scan, bool check_rows) {
    const int64_t n = scan.queries * kEnds;
    device.fill(counts.data, 0, 2 * n * sizeof(Count));
    device.fill(counts.data + 2 * n, 0xFF, sizeof(Count));
    scan.better = counts.data;
    scan.inside = counts.data + n;
    scan.bad_row = check_rows ? counts.data + 2 * n : nullptr;
    run_scan(device, scan);
    read = counts.read(device);
    if (read[2 * n] != kNone) fail("bank: row " + std::to_string(read[2 * n]) + " holds NaN or inf, or its scores overflow");
  }

  int64_t better(int64_t i) const { return static_cast<int64_t>(read[i]); }
  int64_t inside(int64_t i) const { return static_cast<int64_t>(read[read.size() / 2 + i]); }
};

Scan bank_scan(const Matrix& z, const Matrix& bank, const Bracket* brackets) {
  Scan scan{};
  scan.z = z.data;
  scan.queries = z.rows;
  scan.rows = bank.data;
  scan.count = bank.rows;
  scan.dim = bank.cols;
  scan.brackets = brackets;
  return scan;
}

/// Scans until the brackets of every query are proven and fit: as sampled at first, then bisected.
void scan_proven(const Device& device, const Scan& scan, const Buffer<Bracket>& brackets, const int64_t (&ranks)[kEnds], Pass& pass,
                 bool check_rows) {
  std::vector<Bracket> trial, known;
  for (int attempt = 0; attempt < 140; ++attempt) {
    pass.run(device, scan, check_rows);
    const int64_t n = scan.queries * kEnds;
    bool proven = true;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t rank = ranks[i % kEnds], capacity = scan.capacity[i % kEnds];
      Bracket unused_trial{kBest, kWorst}, unused_known{kBest, kWorst};
      if (trial.empty() && !settled(unused_trial, unused_known, pass.better(i), pass.inside(i), rank, capacity)) {
        trial = brackets.read(device);
        known.assign(n, Bracket{kBest, kWorst});
      }
      if (trial.empty()) continue;
      const bool done = settled(trial[i], known[i], pass.better(i), pass.inside(i), rank, capacity);
      if (known[i].lo > known[i].hi) fail("z and bank: scores overflow float32");
      proven = proven && done;
    }
    if (proven) return;
    brackets.write(device, trial);
  }
  fail("z and bank: scores overflow float32");
}

/// Settles both ends among the keys inside the brackets and marks the members there.
__global__ void settle_kernel(Scan scan, int64_t lo, int64_t hi, Key* first, Key* last) {
  const int64_t q = blockIdx.x;
  const int64_t ranks[kEnds] = {lo, hi - 1};
  Key found[kEnds];
  for (int e = 0; e < kEnds; ++e) {
    const KeysOf keys{scan.keys[e] + q * scan.capacity[e]};
    found[e] = radix_select(keys, static_cast<int64_t>(scan.inside[q * kEnds + e]), ranks[e] - static_cast<int64_t>(scan.better[q * kEnds + e]));
  }
  if (threadIdx.x == 0) {
    first[q] = found[0];
    last[q] = found[1];
  }
  if (scan.members == nullptr) return;
  auto* words = reinterpret_cast<uint32_t*>(scan.members + q * scan.member_bytes);
  for (int e = 0; e < kEnds; ++e)
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(scan.inside[q * kEnds + e]); i += blockDim.x) {
      const Key key = scan.keys[e][q * scan.capacity[e] + i];
      if (found[0] <= key && key <= found[1]) atomicOr(&words[row_of(key) / 32], 1u << (row_of(key) % 32));
    }
}

constexpr int64_t kScratch = int64_t{40} << 20;  // bytes of keys at a time, if 64 queries fit in

int64_t chunk_of_queries(int64_t bytes_per_query) {
  return std::max<int64_t>(kTileQueries, kScratch / bytes_per_query / kTileQueries * kTileQueries);
}

int64_t best_capacity(const Matrix& bank, int64_t k) {
  const auto size = static_cast<int64_t>(sample_rows(bank.rows).size());
  return power_of_two(std::min(bank.rows, k + bracket_capacity(size, bank.rows, k - 1, sigmas())));
}

}  // namespace

FoundRegion find_region(const Device& device, const Matrix& z, const Matrix& bank, int64_t lo, int64_t hi, bool with_members) {
  require(0 <= lo && lo < hi && hi <= bank.rows, "ranks: need 0 <= lo_rank < hi_rank <= " + std::to_string(bank.rows) + ", got [" +
                                                     std::to_string(lo) + ", " + std::to_string(hi) + ")");
  const int64_t words = (bank.rows + 63) / 64;
  FoundRegion region{Buffer<Key>(device, z.rows), Buffer<Key>(device, z.rows), words,
                     Buffer<uint64_t>(device, with_members ? z.rows * words : 0)};
  region.members.fill(device, 0);
  const Sample sample(device, bank);
  const int64_t ranks[kEnds] = {lo, hi - 1};
  SampleEnds ends{};
  int64_t capacity[kEnds];
  for (int e = 0; e < kEnds; ++e) {
    ends.ranks[e] = sample_ranks(sample.size, bank.rows, ranks[e], sigmas());
    ends.wanted[e] = true;
    capacity[e] = std::min(bank.rows, bracket_capacity(sample.size, bank.rows, ranks[e], sigmas()));
  }
  const int64_t at_once = std::min(z.rows, chunk_of_queries((capacity[0] + capacity[1] + sample.size) * static_cast<int64_t>(sizeof(Key))));
  const Buffer<Key> keys0(device, at_once * capacity[0]), keys1(device, at_once * capacity[1]);
  for (int64_t begin = 0; begin < z.rows; begin += at_once) {
    Matrix part = z;
    part.data = z.row(begin);
    part.rows = std::min(at_once, z.rows - begin);
    const Buffer<Bracket> brackets(device, part.rows * kEnds);
    make_brackets(device, part, sample, ends, brackets.data);
    Scan scan = bank_scan(part, bank, brackets.data);
    scan.keys[0] = keys0.data;
    scan.keys[1] = keys1.data;
    for (int e = 0; e < kEnds; ++e) scan.capacity[e] = capacity[e];
    scan.member_bytes = words * 8;
    if (with_members) scan.members = reinterpret_cast<uint8_t*>(region.members.data + begin * words);
    Pass pass(device, part.rows);
    scan_proven(device, scan, brackets, ranks, pass, begin == 0);
    scan.better = pass.counts.data;
    scan.inside = pass.counts.data + part.rows * kEnds;
    device.run(settle_kernel, dim3(part.rows), kThreads, scan, lo, hi, region.first.data + begin, region.last.data + begin);
  }
  return region;
}

int64_t queries_at_once(const Matrix& bank, int64_t k) {
  const auto size = static_cast<int64_t>(sample_rows(bank.rows).size());
  return chunk_of_queries((best_capacity(bank, k) + size) * static_cast<int64_t>(sizeof(Key)));
}

namespace {

__global__ void up_to_kernel(const Key* last, int64_t queries, Bracket* brackets) {
  for (int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; q < queries; q += static_cast<int64_t>(gridDim.x) * blockDim.x)
    brackets[q * kEnds + 1] = {kBest, last[q]};
}

}  // namespace

FoundBest find_best(const Device& device, const Matrix& z, const Matrix& bank, int64_t k) {
  const Sample sample(device, bank);
  SampleEnds ends{};
  ends.ranks[1] = sample_ranks(sample.size, bank.rows, k - 1, sigmas());
  ends.wanted[1] = ends.from_best = true;
  const int64_t capacity = best_capacity(bank, k);
  FoundBest best{capacity, Buffer<Key>(device, z.rows * capacity)};
  const Buffer<Bracket> brackets(device, z.rows * kEnds);
  make_brackets(device, z, sample, ends, brackets.data);
  Scan scan = bank_scan(z, bank, brackets.data);
  scan.keys[1] = best.keys.data;
  scan.capacity[1] = capacity;
  Pass pass(device, z.rows);
  for (const bool exact : {false, true}) {
    if (exact) {  // a bracket failed: end it at the exact key of the last rank
      const auto region = find_region(device, z, bank, 0, k, false);
      device.run(up_to_kernel, blocks_for(z.rows), kThreads, region.last.data, z.rows, brackets.data);
    }
    best.keys.fill(device, 0xFF);
    pass.run(device, scan, true);
    bool proven = true;
    for (int64_t q = 0; q < z.rows && proven; ++q)
      proven = k <= pass.inside(q * kEnds + 1) && pass.inside(q * kEnds + 1) <= capacity;
    if (!proven) continue;
    sort_keys(device, best.keys.data, z.rows, capacity);
    return best;
  }
  fail("z and bank: scores overflow float32");
}

}  // namespace mirepro
