// Floyd-Rivest: a sample of the bank brackets the wanted ranks, one pass keeps the few keys inside the brackets, a
// count proves them. Counts and key sets do not depend on the order of work, so neither does the result.
#include "select.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "../bracket.h"
#include "score.h"

namespace mirepro {
namespace {

constexpr int64_t kSample = 32768;   // rows at most: more narrow the brackets, but cost time themselves
constexpr int64_t kSelective = 50;   // below N / 50 wanted rows a first pass leaves little open
constexpr int64_t kAtOnce = 128;     // queries that scan for a region together: more would keep too many keys
constexpr double kFirstTry = 5;      // half the width of the first brackets, in standard deviations

/// Bracket of `rank` of n from a sample whose keys are partly sorted as far as needed.
Bracket bracket(std::vector<Key>& keys, int64_t n, int64_t rank, double sigmas) {
  const auto size = static_cast<int64_t>(keys.size());
  const auto [lo, hi] = sample_ranks(size, n, rank, sigmas);
  Bracket result{kBest, kWorst};
  auto end = keys.end();
  if (hi < size) {
    std::nth_element(keys.begin(), keys.begin() + hi, end);
    result.hi = keys[hi];
    end = keys.begin() + hi + 1;
  }
  if (lo >= 0 && lo < size) {
    std::nth_element(keys.begin(), keys.begin() + lo, end);
    result.lo = keys[lo];
  }
  return result;
}

/// The sample's scores of kLanes queries, `(size, kLanes)`, counted in bins of equal width between each lane's extremes.
struct Histogram {
  static constexpr int64_t kBins = 4096;
  const std::vector<float>& scores;
  int64_t size;
  std::array<float, kLanes> low, high, scale;
  std::vector<uint16_t> counts;  // [lane][bin]

  explicit Histogram(const std::vector<float>& s) : scores(s), size(s.size() / kLanes), counts(kLanes * kBins, 0) {
    low.fill(INFINITY);
    high.fill(-INFINITY);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t q = 0; q < kLanes; ++q) {
        low[q] = std::min(low[q], s[i * kLanes + q]);
        high[q] = std::max(high[q], s[i * kLanes + q]);
      }
    for (int64_t q = 0; q < kLanes; ++q) scale[q] = high[q] > low[q] ? (kBins - 1) / (high[q] - low[q]) : 0.0f;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t q = 0; q < kLanes; ++q) ++counts[q * kBins + bin(s[i * kLanes + q], q)];
  }

  int64_t bin(float score, int64_t q) const {
    const float place = (score - low[q]) * scale[q];
    return place >= 0 && place < kBins ? static_cast<int64_t>(place) : 0;  // NaN and inf go anywhere
  }

  /// Bracket of `rank` of n at bins' edges, a bin wider because edges are rounded; false where bins are too coarse, as for many equal scores.
  bool bracket(int64_t q, int64_t n, int64_t rank, double sigmas, Bracket& result) const {
    const auto [lo, hi] = sample_ranks(size, n, rank, sigmas);
    const uint16_t* count = counts.data() + q * kBins;
    int64_t b = kBins - 1, before = 0;  // sample keys in the bins above b
    for (; b > 0 && before + count[b] <= lo; --b) before += count[b];
    result.lo = lo < 0 || b == kBins - 1 ? kBest : make_key(edge(b + 2, q), 0);
    const int64_t first = lo < 0 ? 0 : before;
    for (; b >= 0 && before <= hi; --b) before += count[b];
    result.hi = hi >= size || b < 1 ? kWorst : make_key(edge(b, q), 0xFFFFFFFF);
    return scale[q] > 0 && std::isfinite(scale[q]) && before - first <= 2 * (hi - lo) + 64;
  }

  float edge(int64_t b, int64_t q) const { return low[q] + static_cast<float>(b) / scale[q]; }

  std::vector<Key> keys(int64_t q, const std::vector<int64_t>& rows) const {
    std::vector<Key> result(size);
    for (int64_t i = 0; i < size; ++i) result[i] = make_key(scores[i * kLanes + q], rows[i]);
    return result;
  }
};

Brackets make_brackets(const Packed& queries, const Matrix& bank, int64_t lo, int64_t last, double sigmas) {
  const auto rows = sample_rows(bank.rows, kSample);
  const auto size = static_cast<int64_t>(rows.size());
  std::vector<float> sample(size * bank.cols);
  for (int64_t i = 0; i < size; ++i) std::copy_n(bank.row(rows[i]), bank.cols, sample.data() + i * bank.cols);
  Brackets result(queries.groups * kLanes);
  parallel(queries.groups, [&](int64_t g) {
    std::vector<float> scores(size * kLanes);
    kernels().score(queries.group(g, bank.cols), sample.data(), size, bank.cols, scores.data());
    const Histogram histogram(scores);
    for (int64_t q = 0; q < std::min(kLanes, queries.count - g * kLanes); ++q) {
      auto& pair = result[g * kLanes + q];
      const auto find = [&](int64_t rank, Bracket& found) {
        if (sigmas == kFirstTry && histogram.bracket(q, bank.rows, rank, sigmas, found)) return;
        auto keys = histogram.keys(q, rows);
        found = bracket(keys, bank.rows, rank, sigmas);
      };
      find(last, pair[1]);
      if (lo >= 0) find(lo, pair[0]);
    }
  });
  return result;
}

bool proves(const Seen& seen, int64_t rank) {
  return seen.better <= rank && rank < seen.better + static_cast<int64_t>(seen.keys.size());
}

Key settle(Seen& seen, int64_t rank) {
  const auto at = seen.keys.begin() + (rank - seen.better);
  std::nth_element(seen.keys.begin(), at, seen.keys.end());
  return *at;
}

/// Keys that two brackets will hold in all but the rarest cases: room for them is made at once.
Room room(const Matrix& bank, int64_t lo, int64_t last, double sigmas) {
  const auto size = static_cast<int64_t>(sample_rows(bank.rows, kSample).size());
  const auto of = [&](int64_t rank, int64_t certain) {
    return std::min(bank.rows, certain + bracket_capacity(size, bank.rows, rank, std::min(sigmas, 100.0)));
  };
  return lo < 0 ? Room{0, of(last, last)} : Room{of(lo, 0), of(last, 0)};
}

/// Scans until the brackets of every query are proven, wider each time; the last try keeps everything. lo < 0: all keys
/// up to rank `last` are wanted, not only that rank's.
Pass scan_proven(const Matrix& z, const Matrix& bank, int64_t lo, int64_t last, const Marks& members) {
  const bool top = lo < 0;
  const Packed queries(z);
  const Coarse* coarse = first_pass(top && last * kSelective < bank.rows);
  for (double sigmas : {kFirstTry, 20.0, 1e9}) {
    auto brackets = make_brackets(queries, bank, lo, last, sigmas);
    for (auto& pair : brackets)
      if (top) pair[1].lo = kBest;
    auto pass = scan({z, queries, bank, brackets, room(bank, lo, last, sigmas), top, coarse, members});
    bool proven = true;
    for (int64_t q = 0; q < queries.count && proven; ++q) proven = proves(pass[q][1], last) && (top || proves(pass[q][0], lo));
    if (proven) return pass;
    members.clear(z.rows);
  }
  fail("z and bank: scores overflow float32");
}

}  // namespace

Region find_region(const Matrix& z, const Matrix& bank, int64_t lo, int64_t hi, bool with_members) {
  require(0 <= lo && lo < hi && hi <= bank.rows, "ranks: need 0 <= lo_rank < hi_rank <= " + std::to_string(bank.rows) + ", got [" +
                                                     std::to_string(lo) + ", " + std::to_string(hi) + ")");
  Region region{std::vector<Key>(z.rows), std::vector<Key>(z.rows), with_members ? Bitmap(z.rows, bank.rows) : Bitmap()};
  for (int64_t begin = 0; begin < z.rows; begin += kAtOnce) {
    Matrix part = z;
    part.data = z.row(begin);
    part.rows = std::min(kAtOnce, z.rows - begin);
    auto pass = scan_proven(part, bank, lo, hi - 1, with_members ? Marks{&region.members, begin} : Marks{});
    parallel(part.rows, [&](int64_t q) {
      const Key first = region.first[begin + q] = settle(pass[q][0], lo);
      const Key last = region.last[begin + q] = settle(pass[q][1], hi - 1);
      if (!with_members) return;
      for (const auto& seen : pass[q])
        for (Key key : seen.keys)
          if (first <= key && key <= last) region.members.set(begin + q, row_of(key));
    });
  }
  return region;
}

std::vector<Key> find_best(const Matrix& z, const Matrix& bank, int64_t k) {
  require(1 <= k && k <= bank.rows, "k: need 1 <= k <= " + std::to_string(bank.rows) + ", got " + std::to_string(k));
  std::vector<Key> best(z.rows * k);
  auto pass = scan_proven(z, bank, -1, k - 1, {});
  parallel(z.rows, [&](int64_t q) {
    auto& keys = pass[q][1].keys;
    settle(pass[q][1], k - 1);
    std::sort(keys.begin(), keys.begin() + k);
    std::copy_n(keys.begin(), k, best.begin() + q * k);
  });
  return best;
}

}  // namespace mirepro
