// int8: integers of -127..127 times a scale per row; four dimensions in a unit. Products are exact integers.
#include <algorithm>
#include <cmath>

#include "../isa.h"
#include "coarse.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mirepro {
namespace {

constexpr uint32_t kFlip = 0x80808080u;  // adds 128 to every byte: queries become unsigned
constexpr float kSmallest = 1e-30f;      // below it 127 / largest would overflow: such rows round to zero

void round_scalar(const float* rows, int64_t n, int64_t dim, int64_t units, uint32_t* out, Rounded* info) {
  for (int64_t r = 0; r < n; ++r, rows += dim, out += units) {
    std::fill_n(out, units, 0u);
    float largest = 0;
    for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(rows[d]));
    const bool usable = largest >= kSmallest && std::isfinite(largest);
    const float scale = usable ? largest / 127 : 0, inverse = usable ? 127 / largest : 0;
    info[r] = Rounded{scale};
    for (int64_t d = 0; d < dim; ++d) {
      const int32_t value = usable && std::isfinite(rows[d]) ? static_cast<int32_t>(std::nearbyint(rows[d] * inverse)) : 0;
      const float rest = std::fma(-scale, static_cast<float>(value), rows[d]);
      out[d / 4] |= static_cast<uint32_t>(value & 0xFF) << (d % 4 * 8);
      info[r].offset -= 128 * value;
      info[r].square += rows[d] * rows[d];
      info[r].residual += rest * rest;
    }
  }
}

void score_scalar(const uint32_t* queries, const float* scale, const uint32_t* rows, const Rounded* info, int64_t n, int64_t units,
                  float* out) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t q = 0; q < kLanes; ++q) {
      int32_t sum = info[r].offset;
      for (int64_t u = 0; u < units; ++u)
        for (int shift = 0; shift < 32; shift += 8)
          sum += static_cast<int8_t>(rows[r * units + u] >> shift) * static_cast<uint8_t>(queries[u * kLanes + q] >> shift);
      out[r * kLanes + q] = static_cast<float>(sum) * (info[r].scale * scale[q]);
    }
}

#if defined(__x86_64__)
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

VNNI void round_vnni(const float* rows, int64_t n, int64_t dim, int64_t units, uint32_t* out, Rounded* info) {
  for (int64_t r = 0; r < n; ++r, rows += dim, out += units) {
    const auto load = [&](int64_t d) VNNI {
      const int64_t left = dim - d;
      const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1;
      return _mm512_maskz_loadu_ps(mask, rows + d);
    };
    __m512 top = _mm512_setzero_ps(), square = top, residual = top;
    for (int64_t d = 0; d < dim; d += 16) {
      const __m512 x = load(d);
      top = _mm512_max_ps(top, _mm512_abs_ps(x));
      square = _mm512_fmadd_ps(x, x, square);
    }
    const float largest = _mm512_reduce_max_ps(top);
    const bool usable = largest >= kSmallest && std::isfinite(largest);
    const float scale = usable ? largest / 127 : 0;
    const __m512 step = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(usable ? 127 / largest : 0);
    __m512i total = _mm512_setzero_si512();
    for (int64_t d = 0; d < 4 * units; d += 16) {
      const __m512 x = load(d);
      const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
      const __m512 rest = _mm512_fnmadd_ps(step, _mm512_cvtepi32_ps(value), x);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d / 4), _mm512_cvtsepi32_epi8(value));
      total = _mm512_add_epi32(total, value);
      residual = _mm512_fmadd_ps(rest, rest, residual);
    }
    const auto offset = 0u - 128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(total));  // NaN makes it wrap around
    info[r] = {scale, static_cast<int32_t>(offset), _mm512_reduce_add_ps(square), _mm512_reduce_add_ps(residual)};
  }
}

/// sum += products of four unsigned and four signed bytes. As an instruction: around the intrinsic GCC 12 spills the sums.
VNNI inline void add_products(__m512i& sum, __m512i z, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(z), "v"(x));
}

template <int R>
VNNI inline void block(const uint32_t* queries, const float* scale, const uint32_t* rows, const Rounded* info, int64_t units,
                       float* out) {
  __m512i sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_set1_epi32(info[r].offset);
  for (int64_t u = 0; u < units; ++u) {
    const __m512i z0 = _mm512_loadu_si512(queries + u * kLanes), z1 = _mm512_loadu_si512(queries + u * kLanes + 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(rows[r * units + u]));
      add_products(sum[r][0], z0, x);
      add_products(sum[r][1], z1, x);
    }
  }
  const __m512 s0 = _mm512_loadu_ps(scale), s1 = _mm512_loadu_ps(scale + 16);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m512 factor = _mm512_set1_ps(info[r].scale);
    _mm512_storeu_ps(out + r * kLanes, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][0]), _mm512_mul_ps(factor, s0)));
    _mm512_storeu_ps(out + r * kLanes + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][1]), _mm512_mul_ps(factor, s1)));
  }
}

VNNI void score_vnni(const uint32_t* queries, const float* scale, const uint32_t* rows, const Rounded* info, int64_t n, int64_t units,
                     float* out) {
  int64_t r = 0;
  for (; r + 12 <= n; r += 12) block<12>(queries, scale, rows + r * units, info + r, units, out + r * kLanes);
  for (; r < n; ++r) block<1>(queries, scale, rows + r * units, info + r, units, out + r * kLanes);
}
#endif

}  // namespace

const Coarse& int8_pass() {
  static const Coarse scalar{"int8", 4, kFlip, round_scalar, score_scalar};
#if defined(__x86_64__)
  static const Coarse native{"int8", 4, kFlip, round_vnni, score_vnni};
  if (has_vnni()) return native;
#endif
  return scalar;
}

}  // namespace mirepro
