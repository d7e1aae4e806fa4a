// Exact order statistics of every query's scores without a B x N buffer and without a sort.
#pragma once
#include <cstdint>
#include <vector>

#include "../key.h"
#include "scan.h"
#include "tensors.h"

namespace mirepro {

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
