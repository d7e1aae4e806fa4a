// Members of one query's region: exclusions, fallback, and the member of a given number.
#pragma once
#include <algorithm>
#include <optional>

#include "region.h"
#include "select.h"

namespace mirepro {

/// Own rows and cluster labels as they came in; all optional.
struct Company {
  std::optional<View<int64_t>> own, labels;

  Company(const MaybeTensor& own_, const MaybeTensor& labels_, int64_t queries, int64_t rows) {
    if (own_) {
      own = view<int64_t>(*own_, "own", 1);
      require(own->rows == queries, "own: needs one row per query");
      require_index(*own, rows, "own");
    }
    if (labels_) {
      labels = view<int64_t>(*labels_, "labels", 2);
      require(labels->cols == rows, "labels: needs one column per bank row, shape (C, N)");
    }
  }

  /// Whether row j shares a cluster with row i; without labels only i itself does.
  bool mates(int64_t i, int64_t j) const {
    if (i == j) return true;
    if (!labels) return false;
    for (int64_t c = 0; c < labels->rows; ++c)
      if (labels->row(c)[i] == labels->row(c)[j]) return true;
    return false;
  }
};

/// f(row) for every set bit, ascending.
template <class F>
void for_each_bit(const uint64_t* bits, int64_t words, const F& f) {
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t left = bits[w]; left != 0; left &= left - 1) f(w * 64 + __builtin_ctzll(left));
}

/// A query's members after exclusion, numbered in bank-index order.
class Members {
 public:
  Members(const uint64_t* bits, int64_t words) : bits_(bits, bits + words), before_(words + 1) { count(); }

  int64_t size() const { return before_.back(); }

  void clear(int64_t row) { bits_[row / 64] &= ~(uint64_t{1} << (row % 64)); }

  /// Removes the own row or its mates; false if nobody is left (the members are then the region without own).
  bool exclude(const Company& company, int64_t query, bool mates) {
    const int64_t own = company.own->data[query];
    const auto region = bits_;
    clear(own);
    if (mates && company.labels)
      for_each_bit(region.data(), words(), [&](int64_t j) {
        if (company.mates(own, j)) clear(j);
      });
    count();
    if (size() > 0) return true;
    bits_ = region;
    if (before_of(region) > 1) clear(own);
    count();
    return false;
  }

  /// All members, ascending: quicker than operator[] where most of them are asked for.
  std::vector<uint32_t> list() const {
    std::vector<uint32_t> rows;
    rows.reserve(size());
    for_each_bit(bits_.data(), words(), [&](int64_t row) { rows.push_back(static_cast<uint32_t>(row)); });
    return rows;
  }

  int64_t operator[](int64_t number) const {
    const auto word = std::upper_bound(before_.begin(), before_.end(), number) - before_.begin() - 1;
    uint64_t left = bits_[word];
    for (int64_t skip = number - before_[word]; skip > 0; --skip) left &= left - 1;
    return word * 64 + __builtin_ctzll(left);
  }

 private:
  int64_t words() const { return static_cast<int64_t>(bits_.size()); }

  static int64_t before_of(const std::vector<uint64_t>& bits) {
    int64_t total = 0;
    for (uint64_t word : bits) total += __builtin_popcountll(word);
    return total;
  }

  void count() {
    for (int64_t w = 0; w < words(); ++w) before_[w + 1] = before_[w] + __builtin_popcountll(bits_[w]);
  }

  std::vector<uint64_t> bits_;
  std::vector<int64_t> before_;  // members before each word
};

}  // namespace mirepro
