// Exact order statistics of every query's scores without a B x N buffer and without a sort.
#pragma once
#include <cstdint>
#include <vector>

#include "../key.h"
#include "tensors.h"

namespace mirepro {

/// N bits per query in bank-index order.
struct Bitmap {
  int64_t words = 0;
  std::vector<uint64_t> bits;

  Bitmap() = default;
  Bitmap(int64_t queries, int64_t rows) : words((rows + 63) / 64), bits(queries * words, 0) {}
  uint64_t* row(int64_t q) { return bits.data() + q * words; }
  bool test(int64_t q, int64_t j) { return row(q)[j / 64] >> (j % 64) & 1; }
  void set(int64_t q, int64_t j) { row(q)[j / 64] |= uint64_t{1} << (j % 64); }
  void clear(int64_t q, int64_t j) { row(q)[j / 64] &= ~(uint64_t{1} << (j % 64)); }
};

/// Queries in groups of kLanes, transposed to [group][dim][lane], padded with zeros.
struct Packed {
  int64_t count = 0, groups = 0;
  std::vector<float> data;

  explicit Packed(const Matrix& z);
  const float* group(int64_t g, int64_t dim) const;
};

/// The region of ranks [lo, hi): its first and last key per query, and its members where asked for.
struct Region {
  std::vector<Key> first, last;
  Bitmap members;
};

/// Throws std::invalid_argument for ranks outside 0 <= lo < hi <= N or a bank row that is not finite.
Region find_region(const Matrix& z, const Matrix& bank, int64_t lo, int64_t hi, bool with_members);

/// The k best keys of every query, sorted, `(B, k)`.
std::vector<Key> find_best(const Matrix& z, const Matrix& bank, int64_t k);

}  // namespace mirepro
