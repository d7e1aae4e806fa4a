// Floyd-Rivest: a sample of the bank brackets the wanted ranks, one pass keeps the few keys inside the brackets, a
// count proves them. Counts and key sets do not depend on the order of work, so neither does the result.
#include "select.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "../bracket.h"
#include "score.h"

namespace mirepro {

Packed::Packed(const Matrix& z) : count(z.rows), groups((z.rows + kLanes - 1) / kLanes), data(groups * z.cols * kLanes, 0.0f) {
  for (int64_t q = 0; q < count; ++q)
    for (int64_t d = 0; d < z.cols; ++d) data[(q / kLanes * z.cols + d) * kLanes + q % kLanes] = z.row(q)[d];
}

const float* Packed::group(int64_t g, int64_t dim) const { return data.data() + g * dim * kLanes; }

namespace {

using Brackets = std::vector<std::array<Bracket, 2>>;  // per query: of the first and of the last rank

/// What one pass saw of a bracket: the number of better keys and the keys inside.
struct Seen {
  int64_t better = 0;
  std::vector<Key> keys;
};
using Pass = std::vector<std::array<Seen, 2>>;

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

Brackets make_brackets(const Packed& queries, const Matrix& bank, int64_t lo, int64_t last, double sigmas) {
  const auto rows = sample_rows(bank.rows);
  const auto size = static_cast<int64_t>(rows.size());
  std::vector<float> sample(size * bank.cols);
  for (int64_t i = 0; i < size; ++i) std::copy_n(bank.row(rows[i]), bank.cols, sample.data() + i * bank.cols);
  Brackets result(queries.groups * kLanes);
  parallel(queries.groups, [&](int64_t g) {
    std::vector<float> scores(size * kLanes);
    std::vector<Key> keys(size);
    kernels().score(queries.group(g, bank.cols), sample.data(), size, bank.cols, scores.data());
    for (int64_t q = 0; q < kLanes; ++q) {
      for (int64_t i = 0; i < size; ++i) keys[i] = make_key(scores[i * kLanes + q], rows[i]);
      auto& pair = result[g * kLanes + q];
      pair[1] = bracket(keys, bank.rows, last, sigmas);
      pair[0] = lo < 0 ? Bracket{kBest, kBest} : lo == last ? pair[1] : bracket(keys, bank.rows, lo, sigmas);
    }
  });
  return result;
}

/// One slice of the bank against all queries, tile by tile: the tile stays in cache, the bank is read once.
struct Scanner {
  const Packed& queries;
  const Matrix& bank;
  const Brackets& brackets;
  const std::vector<float>& threshold;  // worst score worth a look, per lane
  Bitmap* members;
  std::atomic<int64_t>& bad_row;

  void look(float score, int64_t row, int64_t q, Pass& pass) const {
    const Key key = make_key(score, row);
    const auto& pair = brackets[q];
    for (int e = 0; e < 2; ++e) {
      if (key < pair[e].lo)
        ++pass[q][e].better;
      else if (key <= pair[e].hi)
        pass[q][e].keys.push_back(key);
    }
    if (members != nullptr && key > pair[0].hi && key < pair[1].lo) members->set(q, row);
  }

  void slice(int64_t begin, int64_t end, Pass& pass) const {
    std::vector<float> scores(kTile * kLanes);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t n = std::min(kTile, end - first);
      for (int64_t g = 0; g < queries.groups; ++g) {
        kernels().score(queries.group(g, bank.cols), bank.row(first), n, bank.cols, scores.data());
        for (int64_t r = 0; r < n; ++r) {
          const float* score = scores.data() + r * kLanes;
          // A row with NaN or inf gives every query a score that is not finite: one lane tells.
          if (g == 0 && !std::isfinite(score[0])) bad_row = first + r;
          for (uint32_t hits = kernels().at_least(score, threshold.data() + g * kLanes); hits != 0; hits &= hits - 1) {
            const int lane = __builtin_ctz(hits);
            look(score[lane], first + r, g * kLanes + lane, pass);
          }
        }
      }
    }
  }
};

Pass scan(const Packed& queries, const Matrix& bank, const Brackets& brackets, Bitmap* members) {
  std::vector<float> threshold(brackets.size(), INFINITY);
  for (int64_t q = 0; q < queries.count; ++q)
    threshold[q] = brackets[q][1].hi == kWorst ? -INFINITY : score_of(brackets[q][1].hi);
  std::atomic<int64_t> bad_row{-1};
  const Scanner scanner{queries, bank, brackets, threshold, members, bad_row};
  const int64_t tiles = (bank.rows + kTile - 1) / kTile;
  const int64_t slices = std::min<int64_t>(tiles, torch::stable::get_num_threads());
  std::vector<Pass> parts(slices, Pass(brackets.size()));
  parallel(slices, [&](int64_t s) {
    scanner.slice(s * tiles / slices * kTile, std::min(bank.rows, (s + 1) * tiles / slices * kTile), parts[s]);
  });
  if (bad_row >= 0) fail("bank: row " + std::to_string(bad_row) + " holds NaN or inf, or its scores overflow");
  for (int64_t s = 1; s < slices; ++s)
    for (size_t q = 0; q < brackets.size(); ++q)
      for (int e = 0; e < 2; ++e) {
        auto& into = parts[0][q][e];
        into.better += parts[s][q][e].better;
        into.keys.insert(into.keys.end(), parts[s][q][e].keys.begin(), parts[s][q][e].keys.end());
      }
  return std::move(parts[0]);
}

bool proves(const Seen& seen, int64_t rank) {
  return seen.better <= rank && rank < seen.better + static_cast<int64_t>(seen.keys.size());
}

Key settle(Seen& seen, int64_t rank) {
  const auto at = seen.keys.begin() + (rank - seen.better);
  std::nth_element(seen.keys.begin(), at, seen.keys.end());
  return *at;
}

/// Scans until the brackets of every query are proven, wider each time; the last try keeps everything.
Pass scan_proven(const Matrix& z, const Matrix& bank, int64_t lo, int64_t last, Bitmap* members) {
  const Packed queries(z);
  for (double sigmas : {5.0, 20.0, 1e9}) {
    const auto brackets = make_brackets(queries, bank, lo, last, sigmas);
    auto pass = scan(queries, bank, brackets, members);
    bool proven = true;
    for (int64_t q = 0; q < queries.count && proven; ++q)
      proven = proves(pass[q][1], last) && (lo < 0 || proves(pass[q][0], lo));
    if (proven) return pass;
    if (members != nullptr) std::fill(members->bits.begin(), members->bits.end(), 0);
  }
  fail("z and bank: scores overflow float32");
}

}  // namespace

Region find_region(const Matrix& z, const Matrix& bank, int64_t lo, int64_t hi, bool with_members) {
  require(0 <= lo && lo < hi && hi <= bank.rows, "ranks: need 0 <= lo_rank < hi_rank <= " + std::to_string(bank.rows) + ", got [" +
                                                     std::to_string(lo) + ", " + std::to_string(hi) + ")");
  Region region{std::vector<Key>(z.rows), std::vector<Key>(z.rows), with_members ? Bitmap(z.rows, bank.rows) : Bitmap()};
  auto pass = scan_proven(z, bank, lo, hi - 1, with_members ? &region.members : nullptr);
  parallel(z.rows, [&](int64_t q) {
    region.first[q] = settle(pass[q][0], lo);
    region.last[q] = settle(pass[q][1], hi - 1);
    if (!with_members) return;
    for (const auto& seen : pass[q])
      for (Key key : seen.keys)
        if (region.first[q] <= key && key <= region.last[q]) region.members.set(q, row_of(key));
  });
  return region;
}

std::vector<Key> find_best(const Matrix& z, const Matrix& bank, int64_t k) {
  require(1 <= k && k <= bank.rows, "k: need 1 <= k <= " + std::to_string(bank.rows) + ", got " + std::to_string(k));
  std::vector<Key> best(z.rows * k);
  const Packed queries(z);
  for (double sigmas : {5.0, 20.0, 1e9}) {
    auto brackets = make_brackets(queries, bank, -1, k - 1, sigmas);
    for (auto& pair : brackets) pair[1].lo = kBest;
    auto pass = scan(queries, bank, brackets, nullptr);
    bool proven = true;
    for (int64_t q = 0; q < z.rows && proven; ++q) proven = proves(pass[q][1], k - 1);
    if (!proven) continue;
    parallel(z.rows, [&](int64_t q) {
      auto& keys = pass[q][1].keys;
      settle(pass[q][1], k - 1);
      std::sort(keys.begin(), keys.begin() + k);
      std::copy_n(keys.begin(), k, best.begin() + q * k);
    });
    return best;
  }
  fail("z and bank: scores overflow float32");
}

}  // namespace mirepro
