// bank_assign: the nearest centroid of every row, argmax of dot - |c|^2 / 2. The scan with its roles swapped: 32 bank
// rows at a time against tiles of centroids. A first pass on rounded vectors leaves few centroids open.
#include <array>

#include "bank.h"
#include "coarse.h"
#include "scan.h"

namespace mirepro {
namespace {

constexpr int64_t kPays = 256;      // centroids from which on a first pass saves time
constexpr int64_t kPatience = 16;   // tiles scored canonically after a first pass left too much open
constexpr int64_t kOpenShare = 16;  // too much: one score in so many
constexpr float kSlack = 0x1p-20f;  // more than four roundings

/// The centroids with half their squared norms by the canonical chain, and rounded where a first pass runs.
struct Centroids {
  Matrix rows;
  std::vector<float> half;
  const Coarse* coarse;
  std::vector<CoarseTile> tiles;
  std::vector<bool> bounded;  // per tile: the error bound holds

  explicit Centroids(const Matrix& c) : rows(c), half(c.rows, 0.0f), coarse(first_pass(c.rows >= kPays)) {
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t d = 0; d < c.cols; ++d) half[i] = std::fma(c.row(i)[d], c.row(i)[d], half[i]);
      half[i] *= 0.5f;
    }
    if (coarse == nullptr) return;
    tiles.resize((c.rows + kTile - 1) / kTile);
    for (int64_t t = 0; t < static_cast<int64_t>(tiles.size()); ++t)
      bounded.push_back(tiles[t].round(*coarse, c.row(t * kTile), count(t), c.cols));
  }

  int64_t count(int64_t tile) const { return std::min(kTile, rows.rows - tile * kTile); }
};

/// 32 bank rows and their best centroids so far.
class Group {
 public:
  Group(const Centroids& centroids, const Matrix& bank, int64_t first)
      : centroids_(centroids), bank_(bank), first_(first), lanes_(std::min(kLanes, bank.rows - first)), exact_(part(bank, first, lanes_)),
        scores_(kTile * kLanes) {
    if (centroids.coarse != nullptr) coarse_.emplace(*centroids.coarse, bank, first);
    best_.fill(-INFINITY);
    least_.fill(-INFINITY);
  }

  void run(int64_t* out) {
    int64_t patience = 0;
    for (int64_t t = 0; t * kTile < centroids_.rows.rows; ++t) {
      const bool rounded = patience == 0 && coarse_ && coarse_->valid && centroids_.bounded[t];
      if (rounded && coarse_tile(t)) continue;
      if (rounded) patience = kPatience;
      if (patience > 0) --patience;
      exact_tile(t);
    }
    for (int64_t q = 0; q < lanes_; ++q) settle(q);
    std::copy_n(arg_.begin(), lanes_, out + first_);
  }

 private:
  /// A centroid whose value is at most `most`.
  struct Open {
    float most;
    int64_t centroid;
  };

  static Matrix part(const Matrix& bank, int64_t first, int64_t n) {
    Matrix rows = bank;
    rows.data = bank.row(first);
    rows.rows = n;
    return rows;
  }

  void exact_tile(int64_t t) {
    const int64_t begin = t * kTile, n = centroids_.count(t), dim = bank_.cols;
    kernels().score(exact_.group(0, dim), centroids_.rows.row(begin), n, dim, scores_.data());
    const auto top = lower(begin, n);
    each_from([&](int64_t q) { return top[q] > best_[q] ? top[q] : NAN; }, n, [&](int64_t r, int64_t q) {
      if (top[q] == best_[q]) return;  // the first one counts
      consider(q, top[q], begin + r);
    });
    for (int64_t q = 0; q < lanes_; ++q) least_[q] = std::max(least_[q], best_[q]);
  }

  /// False, and nothing has happened but a better `least_`, if too many centroids stay open.
  bool coarse_tile(int64_t t) {
    const int64_t begin = t * kTile, n = centroids_.count(t);
    const auto& tile = centroids_.tiles[t];
    centroids_.coarse->score(coarse_->units.data(), coarse_->scale.data(), tile.units.data(), tile.info.data(), n,
                             centroids_.coarse->units(bank_.cols), scores_.data());
    const auto top = lower(begin, n);
    std::array<float, kLanes> error{};
    for (int64_t q = 0; q < lanes_; ++q) {
      error[q] = error_bound(*coarse_, q, tile, bank_.cols);
      error[q] += kSlack * (std::fabs(top[q]) + error[q]);
      least_[q] = std::max(least_[q], top[q] - error[q]);
    }
    int64_t open = 0;
    const auto reach = [&](int64_t q) { return least_[q] - error[q] - kSlack * (std::fabs(least_[q]) + error[q]); };
    each_from(reach, n, [&](int64_t, int64_t) { ++open; });
    if (open * kOpenShare > n * kLanes) return false;
    each_from(reach, n, [&](int64_t r, int64_t q) {
      const float value = scores_[r * kLanes + q];
      open_[q].push_back({value + error[q] + kSlack * (std::fabs(value) + error[q]), begin + r});
    });
    return true;
  }

  /// Takes |c|^2 / 2 off the scores; returns each lane's best value of the tile.
  std::array<float, kLanes> lower(int64_t begin, int64_t n) {
    std::array<float, kLanes> top;
    top.fill(-INFINITY);
    kernels().lower(scores_.data(), centroids_.half.data() + begin, n, top.data());
    return top;
  }

  /// f(row, lane) for every score of at least reach(lane), rows ascending.
  template <class Reach, class F>
  void each_from(const Reach& reach, int64_t n, const F& f) {
    Cuts cuts;
    for (int64_t q = 0; q < kLanes; ++q) cuts.reach[1][q] = q < lanes_ ? reach(q) : NAN;
    kernels().reached(scores_.data(), n, cuts, verdicts_);
    for (int64_t r = 0; r < n; ++r)
      for (uint32_t left = verdicts_.unsure[r]; left != 0; left &= left - 1) f(r, __builtin_ctz(left));
  }

  /// Canonical values of a lane's open centroids, 16 at a time.
  void settle(int64_t q) {
    int64_t centroid[kGather], n = 0;
    for (size_t i = 0; i < open_[q].size(); ++i) {
      if (open_[q][i].most >= least_[q]) centroid[n++] = open_[q][i].centroid;
      if (n == kGather || (n > 0 && i + 1 == open_[q].size())) {
        const float* rows[kGather];
        float score[kGather];
        for (int64_t r = 0; r < kGather; ++r) rows[r] = centroids_.rows.row(centroid[std::min(r, n - 1)]);
        kernels().dot(bank_.row(first_ + q), rows, bank_.cols, score);
        for (int64_t r = 0; r < n; ++r) consider(q, score[r] - centroids_.half[centroid[r]], centroid[r]);
        n = 0;
      }
    }
  }

  /// Ties go to the lower index.
  void consider(int64_t q, float value, int64_t centroid) {
    if (!(value > best_[q] || (value == best_[q] && centroid < arg_[q]))) return;
    best_[q] = value;
    arg_[q] = centroid;
  }

  const Centroids& centroids_;
  const Matrix& bank_;
  const int64_t first_, lanes_;
  const Packed exact_;
  std::optional<CoarseGroup> coarse_;
  std::vector<float> scores_;
  Verdicts verdicts_;
  std::array<float, kLanes> best_, least_;  // canonical; and what the best value is at least
  std::array<int64_t, kLanes> arg_{};
  std::array<std::vector<Open>, kLanes> open_;
};

}  // namespace

Tensor bank_assign(const Tensor& bank, const Tensor& centroids) {
  const auto b = view<float>(bank, "bank", 2), c = view<float>(centroids, "centroids", 2);
  require(c.rows >= 1 && b.cols == c.cols, "centroids: need shape (K, D), K >= 1, D that of the bank");
  require_finite(c, "centroids");
  require_finite(b, "bank");
  auto result = new_longs(bank, {b.rows});
  auto* out = longs(result);
  const Centroids prepared(c);
  parallel((b.rows + kLanes - 1) / kLanes, [&, &b = b](int64_t g) { Group(prepared, b, g * kLanes).run(out); });
  return result;
}

}  // namespace mirepro
