// Certified first passes: scores of rounded vectors with a bound on their error. What the bound leaves open is scored
// again by the canonical chain, so that results do not depend on the pass. docs/kernels.md proves the bound.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "score.h"
#include "tensors.h"

namespace mirepro {

/// A row after rounding: x = scale * (its integers) + residual; the squares are of the row and of the residual.
struct Rounded {
  float scale = 0;
  int32_t offset = 0;  // what int8 products of shifted queries have too much
  float square = 0, residual = 0;
};

/// A number format and its kernels. Four bytes are a unit; rows are padded with zeros to 16 units.
struct Coarse {
  const char* name;
  int64_t per_unit;     // dimensions in a unit: 2 (bf16) or 4 (int8)
  uint32_t query_flip;  // applied to the units of queries: int8 products want one side unsigned
  void (*round)(const float* rows, int64_t n, int64_t dim, int64_t units, uint32_t* out, Rounded* info);
  /// out[r * 32 + q] is close to the score of row r and query q; queries are [unit][lane].
  void (*score)(const uint32_t* queries, const float* scale, const uint32_t* rows, const Rounded* info, int64_t n, int64_t units,
                float* out);

  int64_t units(int64_t dim) const { return (dim + 16 * per_unit - 1) / (16 * per_unit) * 16; }
};

/// bf16, or int8 where the CPU has no bf16 products; null where neither pays: where many rows are wanted (not
/// `selective`), so that much stays open, or without AVX-512. MIREPRO_FIRST_PASS=exact|bf16|int8 forces one.
const Coarse* first_pass(bool selective);

const Coarse& bf16_pass();
const Coarse& int8_pass();

/// kLanes queries after rounding. |coarse - canonical| <= wide * X + narrow * R + tiny for rows with norms up to X and
/// residuals up to R.
struct CoarseGroup {
  std::vector<uint32_t> units;
  std::array<float, kLanes> scale{}, wide{}, narrow{};
  bool valid = true;  // no norm is so large that a score could overflow

  CoarseGroup(const Coarse& coarse, const Matrix& z, int64_t first);
};

/// Bank rows after rounding, with the largest norm and residual among them.
struct CoarseTile {
  std::vector<uint32_t> units;
  std::array<Rounded, kTile> info;
  float norm = 0, residual = 0;

  /// Returns whether the bound holds: false for huge rows and rows that are not finite.
  bool round(const Coarse& coarse, const float* rows, int64_t n, int64_t dim);
};

/// Bound on |coarse - canonical| for lane q of a group and any row of a tile.
float error_bound(const CoarseGroup& group, int64_t q, const CoarseTile& tile, int64_t dim);

/// Widens exact cuts by the error bound.
Cuts widen(const Cuts& cuts, const CoarseGroup& group, const CoarseTile& tile, int64_t dim);

}  // namespace mirepro
