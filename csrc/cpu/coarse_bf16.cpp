// bf16: the upper half of a float32, rounded to nearest; two dimensions in a unit.
#include <cstring>

#include "../isa.h"
#include "coarse.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mirepro {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

/// Round to nearest, ties to even; NaN and inf make the square of the row NaN or inf, which is enough.
uint32_t upper_half(float x) {
  const uint32_t bits = bits_of(x);
  return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}

void round_scalar(const float* rows, int64_t n, int64_t dim, int64_t units, uint32_t* out, Rounded* info) {
  for (int64_t r = 0; r < n; ++r, rows += dim, out += units) {
    std::fill_n(out, units, 0u);
    info[r] = Rounded{1.0f};
    for (int64_t d = 0; d < dim; ++d) {
      const uint32_t half = upper_half(rows[d]);
      const float rest = rows[d] - float_of(half << 16);
      out[d / 2] |= half << (d % 2 * 16);
      info[r].square += rows[d] * rows[d];
      info[r].residual += rest * rest;
    }
  }
}

void score_scalar(const uint32_t* queries, const float*, const uint32_t* rows, const Rounded*, int64_t n, int64_t units, float* out) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t q = 0; q < kLanes; ++q) {
      float sum = 0;
      for (int64_t u = 0; u < units; ++u) {
        const uint32_t x = rows[r * units + u], z = queries[u * kLanes + q];
        sum += float_of(x << 16) * float_of(z << 16);
        sum += float_of(x & 0xFFFF0000u) * float_of(z & 0xFFFF0000u);
      }
      out[r * kLanes + q] = sum;
    }
}

#if defined(__x86_64__)
#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

BF16 void round_bf16(const float* rows, int64_t n, int64_t dim, int64_t units, uint32_t* out, Rounded* info) {
  for (int64_t r = 0; r < n; ++r, rows += dim, out += units) {
    __m512 square = _mm512_setzero_ps(), residual = square;
    for (int64_t d = 0; d < 2 * units; d += 16) {
      const int64_t left = dim - d;
      const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1;
      const __m512 x = _mm512_maskz_loadu_ps(mask, rows + d);
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(x);
      const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d / 2), half);
      square = _mm512_fmadd_ps(x, x, square);
      residual = _mm512_fmadd_ps(rest, rest, residual);
    }
    info[r] = {1.0f, 0, _mm512_reduce_add_ps(square), _mm512_reduce_add_ps(residual)};
  }
}

template <int R>
BF16 inline void block(const uint32_t* queries, const uint32_t* rows, int64_t units, float* out) {
  __m512 sum[R][2];
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t u = 0; u < units; ++u) {
    const __m512bh z0 = (__m512bh)_mm512_loadu_si512(queries + u * kLanes);
    const __m512bh z1 = (__m512bh)_mm512_loadu_si512(queries + u * kLanes + 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[r * units + u]));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], z0, x);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], z1, x);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(out + r * kLanes, sum[r][0]);
    _mm512_storeu_ps(out + r * kLanes + 16, sum[r][1]);
  }
}

BF16 void score_bf16(const uint32_t* queries, const float*, const uint32_t* rows, const Rounded*, int64_t n, int64_t units, float* out) {
  int64_t r = 0;
  for (; r + 12 <= n; r += 12) block<12>(queries, rows + r * units, units, out + r * kLanes);
  for (; r < n; ++r) block<1>(queries, rows + r * units, units, out + r * kLanes);
}
#endif

}  // namespace

const Coarse& bf16_pass() {
  static const Coarse scalar{"bf16", 2, 0, round_scalar, score_scalar};
#if defined(__x86_64__)
  static const Coarse native{"bf16", 2, 0, round_bf16, score_bf16};
  if (has_bf16()) return native;
#endif
  return scalar;
}

}  // namespace mirepro
