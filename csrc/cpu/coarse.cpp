#include "coarse.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "../isa.h"

namespace mirepro {
namespace {

constexpr float kHuge = 1e8f;  // norms beyond it are left to the canonical chain: no score below can overflow
constexpr int64_t kWidest = 32768;  // int32 sums of int8 products fit

/// Upper bound of a norm from the square a float32 sum gave; the last term stands for squares that underflow.
float norm_bound(float square, int64_t dim) {
  return static_cast<float>(std::sqrt(static_cast<double>(square)) * (1 + std::ldexp(dim + 16.0, -22)) + 1e-18 * dim);
}

}  // namespace

CoarseGroup::CoarseGroup(const Coarse& coarse, const Matrix& z, int64_t first) {
  const int64_t dim = z.cols, size = coarse.units(dim);
  units.assign(size * kLanes, 0);
  std::vector<uint32_t> row(size);
  const float rounding = static_cast<float>(std::ldexp(dim + 16.0, -22));
  for (int64_t q = 0; q < std::min(kLanes, z.rows - first); ++q) {
    Rounded info;
    coarse.round(z.row(first + q), 1, dim, size, row.data(), &info);
    for (int64_t u = 0; u < size; ++u) units[u * kLanes + q] = row[u] ^ coarse.query_flip;
    const float norm = norm_bound(info.square, dim), residual = norm_bound(info.residual, dim);
    scale[q] = info.scale;
    narrow[q] = (norm + residual) * (1 + rounding);
    wide[q] = residual + narrow[q] * rounding;
    valid = valid && norm <= kHuge && dim <= kWidest;
  }
}

bool CoarseTile::round(const Coarse& coarse, const float* rows, int64_t n, int64_t dim) {
  const int64_t size = coarse.units(dim);
  units.resize(size * kTile);
  coarse.round(rows, n, dim, size, units.data(), info.data());
  float square = 0, rest = 0;
  bool finite = true;
  for (int64_t r = 0; r < n; ++r) {
    finite = finite && info[r].square <= kHuge * kHuge;  // false for NaN
    square = std::max(square, info[r].square);
    rest = std::max(rest, info[r].residual);
  }
  norm = norm_bound(square, dim);
  residual = norm_bound(rest, dim);
  return finite;
}

float error_bound(const CoarseGroup& group, int64_t q, const CoarseTile& tile, int64_t dim) {
  const float tiny = 1e-27f * static_cast<float>(dim);  // underflow of products and of denormal inputs
  return (group.wide[q] * tile.norm + group.narrow[q] * tile.residual + tiny) * (1 + 0x1p-18f);
}

Cuts widen(const Cuts& cuts, const CoarseGroup& group, const CoarseTile& tile, int64_t dim) {
  Cuts wider = cuts;
  for (int e = 0; e < 2; ++e)
    for (int64_t q = 0; q < kLanes; ++q) {
      const float error = error_bound(group, q, tile, dim);
      wider.reach[e][q] -= error + std::fabs(cuts.reach[e][q]) * 0x1p-22f;  // the last term: rounding of this line
      wider.clear[e][q] += error + std::fabs(cuts.clear[e][q]) * 0x1p-22f;
    }
  return wider;
}

const Coarse* first_pass(bool selective) {
  const char* wish = std::getenv("MIREPRO_FIRST_PASS");
  const std::string name = wish == nullptr ? "" : wish;
  if (name == "exact") return nullptr;
  if (name == "bf16") return &bf16_pass();
  if (name == "int8") return &int8_pass();
  require(name.empty(), "MIREPRO_FIRST_PASS=" + name + ": unknown; use exact, bf16 or int8");
  if (!selective) return nullptr;
  return has_bf16() ? &bf16_pass() : has_vnni() ? &int8_pass() : nullptr;
}

}  // namespace mirepro
