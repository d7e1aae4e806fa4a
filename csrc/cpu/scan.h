// One pass over the bank: the shared scan of all operators on ranks.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../bracket.h"
#include "coarse.h"
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

/// Where the members of a scan's queries are marked: the bitmap's rows from `first` on; or nowhere.
struct Marks {
  Bitmap* bitmap = nullptr;
  int64_t first = 0;

  explicit operator bool() const { return bitmap != nullptr; }
  uint64_t* row(int64_t q) const { return bitmap->row(first + q); }
  void set(int64_t q, int64_t j) const { bitmap->set(first + q, j); }
  void clear(int64_t queries) const {
    if (bitmap != nullptr) std::fill_n(row(0), queries * bitmap->words, 0);
  }
};

/// Queries in groups of kLanes, transposed to [group][dim][lane], padded with zeros.
struct Packed {
  int64_t count = 0, groups = 0;
  std::vector<float> data;

  explicit Packed(const Matrix& z);
  const float* group(int64_t g, int64_t dim) const;
};

using Brackets = std::vector<std::array<Bracket, 2>>;  // per lane of all groups: of the first and of the last rank

/// What one pass saw of a bracket: the number of better keys and the keys inside.
struct Seen {
  int64_t better = 0;
  std::vector<Key> keys;
};
using Pass = std::vector<std::array<Seen, 2>>;
using Room = std::array<int64_t, 2>;  // keys that a query's brackets are expected to hold

struct Search {
  const Matrix& z;
  const Packed& queries;
  const Matrix& bank;
  const Brackets& brackets;
  Room room;
  bool top;               // the last bracket begins with the best key, and the first one does not matter
  const Coarse* coarse;   // null: canonical scores only
  Marks members;          // take the rows between the brackets
};

/// Throws std::invalid_argument naming a bank row that is not finite.
Pass scan(const Search& search);

}  // namespace mirepro
