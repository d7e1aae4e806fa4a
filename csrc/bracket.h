// Where a wanted rank is looked for: brackets from a sample of the bank, and bisection where they fail. Host logic
// of the CPU and the CUDA operators; the results do not depend on it, only the work does. No torch headers.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "key.h"

namespace mirepro {

/// The key of one rank is looked for in [lo, hi].
struct Bracket {
  Key lo, hi;
};

/// Rows of a jittered stratified sample: a plain stride would alias with banks ordered by class.
inline std::vector<int64_t> sample_rows(int64_t n, int64_t most = 16384) {
  int64_t size = 256;
  while (size < most && size * size * size < 64 * n * n) size += 64;
  if (n <= 512 || size > n) size = n;
  std::vector<int64_t> rows(size);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t begin = i * n / size, end = (i + 1) * n / size;
    rows[i] = begin + static_cast<int64_t>((i * 0x9E3779B97F4A7C15ull >> 33) % (end - begin));
  }
  return rows;
}

/// Ranks within the sample that enclose `rank` of n; lo < 0 or hi >= size: open on that side.
struct SampleRanks {
  int64_t lo, hi;
};

inline double sample_margin(int64_t size, int64_t n, int64_t rank, double sigmas) {
  const double p = (rank + 0.5) / n;
  return size == n ? 0.0 : sigmas * std::sqrt(size * p * (1 - p)) + 2;
}

inline SampleRanks sample_ranks(int64_t size, int64_t n, int64_t rank, double sigmas) {
  if (size == n) return {rank, rank};
  const double p = (rank + 0.5) / n, margin = sample_margin(size, n, rank, sigmas);
  return {static_cast<int64_t>(std::floor(p * size - margin)), static_cast<int64_t>(std::ceil(p * size + margin))};
}

/// Keys a buffer needs to hold a bracket's content in all but the rarest cases.
inline int64_t bracket_capacity(int64_t size, int64_t n, int64_t rank, double sigmas) {
  if (size == n) return 1;
  return static_cast<int64_t>(3 * sample_margin(size, n, rank, sigmas) * n / size) + 1024;
}

/// One step of a bisection over keys. `trial` held `inside` keys and `better` ones were before it; `known` encloses
/// the key of `rank` for certain. True: the trial holds that key and fits; false: `trial` is the next to look at.
/// Keys are distinct, so 64 steps suffice. An empty `known` (lo > hi) means that scores were not numbers.
inline bool settled(Bracket& trial, Bracket& known, int64_t better, int64_t inside, int64_t rank, int64_t capacity) {
  const bool holds = better <= rank && rank < better + inside;
  if (holds && inside <= capacity) return true;
  if (holds) {
    known = trial;
  } else if (rank < better) {
    known.hi = trial.lo - 1;
  } else if (trial.hi == kWorst) {
    known = {kWorst, kBest};
    return false;
  } else {
    known.lo = trial.hi + 1;
  }
  trial = {known.lo, known.lo + (known.hi - known.lo) / 2};
  return false;
}

}  // namespace mirepro
