// Scoring kernels. Rounding happens once per fused step and the order over d never changes, so a variant may only
// differ in how many queries and rows it holds in registers.
#include "score.h"

#include <cmath>

#include "../isa.h"
#include "fixed_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mirepro {
namespace {

void score_scalar(const float* zt, const float* rows, int64_t n, int64_t dim, float* out) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t q = 0; q < kLanes; ++q) {
      float sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum = std::fma(rows[r * dim + d], zt[d * kLanes + q], sum);
      out[r * kLanes + q] = sum;
    }
}

uint32_t at_least_scalar(const float* score, const float* threshold) {
  uint32_t mask = 0;
  for (int64_t q = 0; q < kLanes; ++q) mask |= static_cast<uint32_t>(score[q] >= threshold[q]) << q;
  return mask;
}

void dot_scalar(const float* z, const float* const* rows, int64_t dim, float* out) {
  for (int64_t r = 0; r < kGather; ++r) {
    float sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum = std::fma(rows[r][d], z[d], sum);
    out[r] = sum;
  }
}

void accumulate_scalar(const float* weight, const float* const* rows, int64_t n, int64_t dim, float* acc) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t d = 0; d < dim; ++d) acc[d] = std::fma(weight[r], rows[r][d], acc[d]);
}

void exponentials_scalar(double* f, double shift) {
  for (int64_t r = 0; r < kGather; ++r) f[r] = fixed_exp(f[r] - shift);
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx2,fma")))

template <int R>
AVX2 inline void block_avx2(const float* zt, const float* rows, int64_t dim, float* out) {
  __m256 sum[R][4];
  for (auto& row : sum)
    for (auto& s : row) s = _mm256_setzero_ps();
  for (int64_t d = 0; d < dim; ++d)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 x = _mm256_set1_ps(rows[r * dim + d]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[r][v] = _mm256_fmadd_ps(x, _mm256_loadu_ps(zt + d * kLanes + v * 8), sum[r][v]);
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 4; ++v) _mm256_storeu_ps(out + r * kLanes + v * 8, sum[r][v]);
}

AVX2 void score_avx2(const float* zt, const float* rows, int64_t n, int64_t dim, float* out) {
  int64_t r = 0;
  for (; r + 3 <= n; r += 3) block_avx2<3>(zt, rows + r * dim, dim, out + r * kLanes);
  for (; r < n; ++r) block_avx2<1>(zt, rows + r * dim, dim, out + r * kLanes);
}

AVX2 uint32_t at_least_avx2(const float* score, const float* threshold) {
  uint32_t mask = 0;
  for (int v = 0; v < 4; ++v) {
    const __m256 hit = _mm256_cmp_ps(_mm256_loadu_ps(score + v * 8), _mm256_loadu_ps(threshold + v * 8), _CMP_GE_OQ);
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(hit)) << (v * 8);
  }
  return mask;
}

/// Eight rows x eight dimensions are transposed in registers, so that a lane is a row and the chain stays sequential.
AVX2 inline void transpose8(__m256 (&x)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < 2; ++i) {
      u[4 * h + 2 * i] = _mm256_shuffle_ps(t[4 * h + i], t[4 * h + 2 + i], 0x44);
      u[4 * h + 2 * i + 1] = _mm256_shuffle_ps(t[4 * h + i], t[4 * h + 2 + i], 0xEE);
    }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    x[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

AVX2 void dot_avx2(const float* z, const float* const* rows, int64_t dim, float* out) {
  const int64_t whole = dim / 8 * 8;
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t d = 0; d < whole; d += 8)
    for (int h = 0; h < 2; ++h) {
      __m256 x[8];
      for (int r = 0; r < 8; ++r) x[r] = _mm256_loadu_ps(rows[8 * h + r] + d);
      transpose8(x);
      for (int i = 0; i < 8; ++i) sum[h] = _mm256_fmadd_ps(x[i], _mm256_set1_ps(z[d + i]), sum[h]);
    }
  _mm256_storeu_ps(out, sum[0]);
  _mm256_storeu_ps(out + 8, sum[1]);
  for (int64_t r = 0; r < kGather; ++r)
    for (int64_t d = whole; d < dim; ++d) out[r] = __builtin_fmaf(rows[r][d], z[d], out[r]);
}

AVX2 void accumulate_avx2(const float* weight, const float* const* rows, int64_t n, int64_t dim, float* acc) {
  for (int64_t r = 0; r < n; ++r) {
    const float w = weight[r];
    const float* row = rows[r];
    for (int64_t d = 0; d < dim; ++d) acc[d] = __builtin_fmaf(w, row[d], acc[d]);
  }
}

AVX2 void exponentials_avx2(double* f, double shift) {
  for (int64_t r = 0; r < kGather; ++r) f[r] = fixed_exp(f[r] - shift);
}

template <int R>
AVX512 inline void block_avx512(const float* zt, const float* rows, int64_t dim, float* out) {
  __m512 sum[R][2];
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; ++d) {
    const __m512 z0 = _mm512_loadu_ps(zt + d * kLanes), z1 = _mm512_loadu_ps(zt + d * kLanes + 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(rows[r * dim + d]);
      sum[r][0] = _mm512_fmadd_ps(x, z0, sum[r][0]);
      sum[r][1] = _mm512_fmadd_ps(x, z1, sum[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(out + r * kLanes, sum[r][0]);
    _mm512_storeu_ps(out + r * kLanes + 16, sum[r][1]);
  }
}

AVX512 void score_avx512(const float* zt, const float* rows, int64_t n, int64_t dim, float* out) {
  int64_t r = 0;
  for (; r + 12 <= n; r += 12) block_avx512<12>(zt, rows + r * dim, dim, out + r * kLanes);
  for (; r + 4 <= n; r += 4) block_avx512<4>(zt, rows + r * dim, dim, out + r * kLanes);
  for (; r < n; ++r) block_avx512<1>(zt, rows + r * dim, dim, out + r * kLanes);
}

AVX512 uint32_t at_least_avx512(const float* score, const float* threshold) {
  const uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(score), _mm512_loadu_ps(threshold), _CMP_GE_OQ);
  const uint32_t high = _mm512_cmp_ps_mask(_mm512_loadu_ps(score + 16), _mm512_loadu_ps(threshold + 16), _CMP_GE_OQ);
  return low | high << 16;
}
#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels scalar{score_scalar, at_least_scalar, dot_scalar, accumulate_scalar, exponentials_scalar};
#if defined(__x86_64__)
  static const Kernels avx2{score_avx2, at_least_avx2, dot_avx2, accumulate_avx2, exponentials_avx2};
  static const Kernels avx512{score_avx512, at_least_avx512, dot_avx2, accumulate_avx2, exponentials_avx2};
  static const Isa isa = chosen_isa();
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx2) return avx2;
#endif
  return scalar;
}

}  // namespace mirepro
