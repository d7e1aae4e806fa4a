// Keys of the exact selection, the same on the CPU and on CUDA. No torch headers.
#pragma once
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace mirepro {

/// A score and its bank row as one integer: smaller is better (score descending, then index ascending).
using Key = uint64_t;
constexpr Key kBest = 0, kWorst = ~Key{0};

MIREPRO_HD inline Key make_key(float score, int64_t row) {
  const float canonical = score + 0.0f;  // -0 becomes +0
  uint32_t bits;
  memcpy(&bits, &canonical, sizeof bits);
  const uint32_t ascending = bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
  return static_cast<Key>(~ascending) << 32 | static_cast<uint32_t>(row);
}

MIREPRO_HD inline float score_of(Key key) {
  const uint32_t ascending = ~static_cast<uint32_t>(key >> 32);
  const uint32_t bits = ascending ^ ((ascending >> 31) ? 0x80000000u : 0xFFFFFFFFu);
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

MIREPRO_HD inline int64_t row_of(Key key) { return static_cast<int64_t>(key & 0xFFFFFFFFu); }

}  // namespace mirepro
