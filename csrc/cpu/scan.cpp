// Tile by tile: a tile of the bank stays in cache while every group of queries is scored against it, so the bank is
// read once. Scores are compared with four cuts; only those near a bracket are looked at one by one. A first pass on
// rounded vectors moves the cuts apart by its error bound, and the scores in between are computed canonically.
#include "scan.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "score.h"

namespace mirepro {

Packed::Packed(const Matrix& z) : count(z.rows), groups((z.rows + kLanes - 1) / kLanes), data(groups * z.cols * kLanes, 0.0f) {
  for (int64_t q = 0; q < count; ++q)
    for (int64_t d = 0; d < z.cols; ++d) data[(q / kLanes * z.cols + d) * kLanes + q % kLanes] = z.row(q)[d];
}

const float* Packed::group(int64_t g, int64_t dim) const { return data.data() + g * dim * kLanes; }

namespace {

constexpr int64_t kPatience = 16;    // tiles scored canonically after a first pass left too much open
constexpr int64_t kStep = 48;        // rows scored at a time: a multiple of 12
constexpr int64_t kOpenShare = 16;   // too much: one score in so many

/// What all slices share.
struct Plan {
  const Search& search;
  std::vector<Cuts> cuts;           // per group, for canonical scores
  std::vector<CoarseGroup> coarse;  // per group
  std::atomic<int64_t> bad_row{-1};

  explicit Plan(const Search& s) : search(s), cuts(s.queries.groups) {
    for (int64_t g = 0; g < s.queries.groups; ++g) {
      for (int64_t q = 0; q < kLanes; ++q) set_cuts(g, q);
      if (s.coarse != nullptr) coarse.emplace_back(*s.coarse, s.z, g * kLanes);
    }
  }

  /// Keys before a bracket have a score above its best one, or the same and a lower row: those are looked at.
  void set_cuts(int64_t g, int64_t q) {
    const int64_t i = g * kLanes + q;
    for (int e = 0; e < 2; ++e) {
      const auto [lo, hi] = search.brackets[i][e];
      const bool wanted = i < search.queries.count && (e == 1 || !search.top);
      cuts[g].reach[e][q] = !wanted || hi == kBest ? NAN : hi == kWorst ? -INFINITY : score_of(hi);
      cuts[g].clear[e][q] = !wanted || lo == kBest ? NAN : lo == kWorst ? -INFINITY : score_of(lo);
    }
  }
};

/// Rows of one query that wait for their canonical scores.
struct Waiting {
  int64_t count = 0, rows[kGather];
};

/// Columns of a 32 x 32 bit matrix become rows: bit r of x[q] was bit q of x[r].
void transpose_bits(uint32_t (&x)[32]) {
  uint32_t mask = 0x0000FFFFu;
  for (int j = 16; j != 0; j >>= 1, mask ^= mask << j)
    for (int k = 0; k < 32; k = (k + j + 1) & ~j) {
      const uint32_t swap = (x[k] >> j ^ x[k + j]) & mask;
      x[k] ^= swap << j;
      x[k + j] ^= swap;
    }
}

/// A contiguous part of the bank, scanned by one thread.
class Slice {
 public:
  Slice(Plan& plan, Pass& pass)
      : plan_(plan), search_(plan.search), pass_(pass), scores_(kTile * kLanes), patience_(search_.queries.groups, 0),
        waiting_(plan.coarse.empty() ? 0 : search_.queries.count) {}

  /// Makes room for a share of the keys, so that vectors need not grow to twice their content.
  void reserve(int64_t share) {
    for (int64_t q = 0; q < search_.queries.count; ++q)
      for (int e = 0; e < 2; ++e) pass_[q][e].keys.reserve(search_.room[e] / share);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kTile) tile(first, std::min(kTile, end - first));
    for (int64_t q = 0; q < static_cast<int64_t>(waiting_.size()); ++q) settle(q);
  }

 private:
  bool wants_coarse(int64_t g) const { return !plan_.coarse.empty() && plan_.coarse[g].valid && patience_[g] == 0; }

  void tile(int64_t first, int64_t n) {
    bool rounded = false;
    for (int64_t g = 0; g < search_.queries.groups && !rounded; ++g) rounded = wants_coarse(g);
    rounded = rounded && tile_.round(*search_.coarse, search_.bank.row(first), n, search_.bank.cols);
    for (int64_t g = 0; g < search_.queries.groups; ++g) {
      const bool coarse = rounded && wants_coarse(g);
      if (coarse && coarse_block(g, first, n)) continue;
      if (coarse) patience_[g] = kPatience;
      if (patience_[g] > 0) --patience_[g];
      exact_block(g, first, n);
    }
  }

  void exact_block(int64_t g, int64_t first, int64_t n) {
    const int64_t dim = search_.bank.cols;
    kernels().score(search_.queries.group(g, dim), search_.bank.row(first), n, dim, scores_.data());
    // A row with NaN or inf gives every query a score that is not finite: one lane tells.
    for (int64_t r = 0; r < n && g == 0; ++r)
      if (!std::isfinite(scores_[r * kLanes])) plan_.bad_row = first + r;
    judge(plan_.cuts[g], n);
    each_unsure(n, [&](int64_t r, int64_t lane) {
      const int64_t row = first + r;
      look(&scores_[r * kLanes + lane], &row, 1, g * kLanes + lane);
    });
    record(g, first, n);
  }

  /// False, and nothing has happened, if too many scores stay open.
  bool coarse_block(int64_t g, int64_t first, int64_t n) {
    const auto& group = plan_.coarse[g];
    const int64_t units = search_.coarse->units(search_.bank.cols);
    for (int64_t r = 0; r < n; r += kStep) {
      prefetch(first + kTile, g * kTile + r);
      search_.coarse->score(group.units.data(), group.scale.data(), tile_.units.data() + r * units, tile_.info.data() + r,
                            std::min(kStep, n - r), units, scores_.data() + r * kLanes);
    }
    judge(widen(plan_.cuts[g], group, tile_, search_.bank.cols), n);
    int64_t open = 0;
    for (int64_t r = 0; r < n; ++r) open += __builtin_popcount(verdicts_.unsure[r]);
    if (open * kOpenShare > n * kLanes) return false;
    each_unsure(n, [&](int64_t r, int64_t lane) { wait(g * kLanes + lane, first + r); });
    record(g, first, n);
    return true;
  }

  /// Fetches a share of the next tile while this one is scored: step `at` of groups * kTile rows of work.
  void prefetch(int64_t next, int64_t at) const {
    const int64_t dim = search_.bank.cols, work = search_.queries.groups * kTile;
    const int64_t floats = (std::min(search_.bank.rows, next + kTile) - next) * dim;
    for (int64_t i = at * floats / work / 16 * 16; i < (at + kStep) * floats / work; i += 16)
      __builtin_prefetch(search_.bank.row(next) + i, 0, 2);
  }

  void judge(const Cuts& cuts, int64_t n) {
    if (search_.top) return kernels().reached(scores_.data(), n, cuts, verdicts_);
    std::fill_n(verdicts_.before[0], 2 * kLanes, 0);
    kernels().classify(scores_.data(), n, cuts, verdicts_);
  }

  template <class F>
  void each_unsure(int64_t n, const F& f) const {
    for (int64_t r = 0; r < n; ++r)
      for (uint32_t left = verdicts_.unsure[r]; left != 0; left &= left - 1) f(r, __builtin_ctz(left));
  }

  void wait(int64_t q, int64_t row) {
    auto& waiting = waiting_[q];
    waiting.rows[waiting.count++] = row;
    if (waiting.count == kGather) settle(q);
  }

  void settle(int64_t q) {
    auto& waiting = waiting_[q];
    if (waiting.count == 0) return;
    const float* rows[kGather];
    float score[kGather];
    for (int64_t r = 0; r < kGather; ++r) rows[r] = search_.bank.row(waiting.rows[std::min(r, waiting.count - 1)]);
    kernels().dot(search_.z.row(q), rows, search_.bank.cols, score);
    look(score, waiting.rows, waiting.count, q);
    waiting.count = 0;
  }

  /// Exact scores of n rows of one query.
  void look(const float* score, const int64_t* rows, int64_t n, int64_t q) {
    const auto pair = search_.brackets[q];
    auto& seen = pass_[q];
    int64_t better[2] = {};
    for (int64_t r = 0; r < n; ++r) {
      const Key key = make_key(score[r], rows[r]);
      for (int e = search_.top; e < 2; ++e) {
        better[e] += key < pair[e].lo;
        if (pair[e].lo <= key && key <= pair[e].hi) seen[e].keys.push_back(key);
      }
      if (search_.members && key > pair[0].hi && key < pair[1].lo) search_.members.set(q, rows[r]);
    }
    for (int e = 0; e < 2; ++e) seen[e].better += better[e];
  }

  /// Counts and members of which the cuts were sure.
  void record(int64_t g, int64_t first, int64_t n) {
    if (search_.top) return;
    const int64_t lanes = std::min(kLanes, search_.queries.count - g * kLanes);
    for (int64_t q = 0; q < lanes; ++q)
      for (int e = 0; e < 2; ++e) pass_[g * kLanes + q][e].better += verdicts_.before[e][q];
    for (int64_t r = 0; r < n && search_.members; r += 32) {
      uint32_t bits[32] = {};
      std::copy_n(verdicts_.member + r, std::min<int64_t>(32, n - r), bits);
      transpose_bits(bits);
      for (int64_t q = 0; q < lanes; ++q)
        search_.members.row(g * kLanes + q)[(first + r) / 64] |= static_cast<uint64_t>(bits[q]) << ((first + r) % 64);
    }
  }

  Plan& plan_;
  const Search& search_;
  Pass& pass_;
  std::vector<float> scores_;
  std::vector<int64_t> patience_;
  std::vector<Waiting> waiting_;
  CoarseTile tile_;
  Verdicts verdicts_;
};

/// Moves what a slice has seen to the first one, query by query.
void append(Pass& into, Pass& part) {
  for (size_t q = 0; q < into.size(); ++q)
    for (int e = 0; e < 2; ++e) {
      const auto keys = std::move(part[q][e].keys);
      into[q][e].better += part[q][e].better;
      into[q][e].keys.insert(into[q][e].keys.end(), keys.begin(), keys.end());
    }
}

}  // namespace

Pass scan(const Search& search) {
  Plan plan(search);
  const int64_t rows = search.bank.rows, tiles = (rows + kTile - 1) / kTile;
  const int64_t slices = std::min<int64_t>(tiles, torch::stable::get_num_threads());
  std::vector<Pass> parts(slices, Pass(search.brackets.size()));
  parallel(slices, [&](int64_t s) {
    Slice slice(plan, parts[s]);
    slice.reserve(s == 0 ? 1 : slices);  // the first one takes all in the end
    slice.run(s * tiles / slices * kTile, std::min(rows, (s + 1) * tiles / slices * kTile));
  });
  if (plan.bad_row >= 0) fail("bank: row " + std::to_string(plan.bad_row) + " holds NaN or inf, or its scores overflow");
  for (int64_t s = 1; s < slices; ++s) append(parts[0], parts[s]);
  return std::move(parts[0]);
}

}  // namespace mirepro
