// Philox4x32-10 (Salmon et al., SC 2011), the same words as mirepro.rng. No torch headers.
#pragma once
#include <array>
#include <cstdint>

#include "host_device.h"

namespace mirepro {

/// Draw t of a sample is word t % 4 of block t / 4; key (seed, stream), counter (block, sample low, sample high, step).
struct Philox {
  uint32_t seed, stream, step;
  uint64_t sample;

  MIREPRO_HD std::array<uint32_t, 4> block(uint32_t number) const {
    uint32_t c0 = number, c1 = static_cast<uint32_t>(sample), c2 = static_cast<uint32_t>(sample >> 32), c3 = step;
    uint32_t k0 = seed, k1 = stream;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
  }
};

/// Maps a word to [0, size): the high half of word * size, size < 2^32.
MIREPRO_HD inline int64_t mulhi(uint32_t word, int64_t size) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(size)) >> 32);
}

}  // namespace mirepro
