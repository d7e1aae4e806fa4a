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

/// One row's verdict from the masks of its four comparisons.
struct Sorted {
  uint32_t unsure, before_first, before_last;

  Sorted(uint32_t reach_first, uint32_t clear_first, uint32_t reach_last, uint32_t clear_last)
      : unsure((reach_first & ~clear_first) | (reach_last & ~clear_last)),
        before_first(clear_first & ~unsure),
        before_last(clear_last & ~unsure) {}
};

void classify_scalar(const float* scores, int64_t n, const Cuts& cuts, Verdicts& verdicts) {
  for (int64_t r = 0; r < n; ++r) {
    uint32_t reach[2] = {}, clear[2] = {};
    for (int e = 0; e < 2; ++e)
      for (int64_t q = 0; q < kLanes; ++q) {
        reach[e] |= static_cast<uint32_t>(scores[r * kLanes + q] >= cuts.reach[e][q]) << q;
        clear[e] |= static_cast<uint32_t>(scores[r * kLanes + q] > cuts.clear[e][q]) << q;
      }
    const Sorted sorted(reach[0], clear[0], reach[1], clear[1]);
    verdicts.unsure[r] = sorted.unsure;
    verdicts.member[r] = sorted.before_last & ~sorted.before_first;
    for (int64_t q = 0; q < kLanes; ++q) {
      verdicts.before[0][q] += sorted.before_first >> q & 1;
      verdicts.before[1][q] += sorted.before_last >> q & 1;
    }
  }
}

void reached_scalar(const float* scores, int64_t n, const Cuts& cuts, Verdicts& verdicts) {
  for (int64_t r = 0; r < n; ++r) {
    verdicts.unsure[r] = 0;
    for (int64_t q = 0; q < kLanes; ++q) verdicts.unsure[r] |= static_cast<uint32_t>(scores[r * kLanes + q] >= cuts.reach[1][q]) << q;
  }
}

void lower_scalar(float* scores, const float* less, int64_t n, float* top) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t q = 0; q < kLanes; ++q) {
      const float value = scores[r * kLanes + q] -= less[r];
      top[q] = value > top[q] ? value : top[q];
    }
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

template <int kCompare>
AVX2 inline uint32_t compare_avx2(const float* score, const float* cut) {
  uint32_t mask = 0;
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m256 hit = _mm256_cmp_ps(_mm256_loadu_ps(score + v * 8), _mm256_loadu_ps(cut + v * 8), kCompare);
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(hit)) << (v * 8);
  }
  return mask;
}

/// counts[q] += bit q of mask.
AVX2 inline void count_avx2(uint32_t mask, int32_t* counts) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    auto* at = reinterpret_cast<__m256i*>(counts + v * 8);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask >> (v * 8))), bit), bit);
    _mm256_storeu_si256(at, _mm256_sub_epi32(_mm256_loadu_si256(at), set));
  }
}

AVX2 void classify_avx2(const float* scores, int64_t n, const Cuts& cuts, Verdicts& verdicts) {
  for (int64_t r = 0; r < n; ++r) {
    const float* row = scores + r * kLanes;
    const Sorted sorted(compare_avx2<_CMP_GE_OQ>(row, cuts.reach[0]), compare_avx2<_CMP_GT_OQ>(row, cuts.clear[0]),
                        compare_avx2<_CMP_GE_OQ>(row, cuts.reach[1]), compare_avx2<_CMP_GT_OQ>(row, cuts.clear[1]));
    verdicts.unsure[r] = sorted.unsure;
    verdicts.member[r] = sorted.before_last & ~sorted.before_first;
    if (sorted.before_first != 0) count_avx2(sorted.before_first, verdicts.before[0]);
    if (sorted.before_last != 0) count_avx2(sorted.before_last, verdicts.before[1]);
  }
}

AVX2 void reached_avx2(const float* scores, int64_t n, const Cuts& cuts, Verdicts& verdicts) {
  for (int64_t r = 0; r < n; ++r) verdicts.unsure[r] = compare_avx2<_CMP_GE_OQ>(scores + r * kLanes, cuts.reach[1]);
}

/// max_ps takes its second operand where the first is NaN, as the scalar form does.
AVX2 void lower_avx2(float* scores, const float* less, int64_t n, float* top) {
  __m256 best[4];
  for (int v = 0; v < 4; ++v) best[v] = _mm256_loadu_ps(top + v * 8);
  for (int64_t r = 0; r < n; ++r)
    for (int v = 0; v < 4; ++v) {
      float* at = scores + r * kLanes + v * 8;
      const __m256 value = _mm256_sub_ps(_mm256_loadu_ps(at), _mm256_set1_ps(less[r]));
      _mm256_storeu_ps(at, value);
      best[v] = _mm256_max_ps(value, best[v]);
    }
  for (int v = 0; v < 4; ++v) _mm256_storeu_ps(top + v * 8, best[v]);
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

/// Four dimensions of 16 rows: quarter L of x[j] holds those of row 4 L + j, and a 4 x 4 transposition within quarters
/// makes a lane a row.
AVX512 inline void load4x16(const float* const* rows, int64_t d, __m512 (&x)[4]) {
  __m512 t[4];
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_castps128_ps512(_mm_loadu_ps(rows[j] + d));
    t[j] = _mm512_insertf32x4(t[j], _mm_loadu_ps(rows[4 + j] + d), 1);
    t[j] = _mm512_insertf32x4(t[j], _mm_loadu_ps(rows[8 + j] + d), 2);
    t[j] = _mm512_insertf32x4(t[j], _mm_loadu_ps(rows[12 + j] + d), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(t[0], t[1]), b = _mm512_unpackhi_ps(t[0], t[1]);
  const __m512 c = _mm512_unpacklo_ps(t[2], t[3]), e = _mm512_unpackhi_ps(t[2], t[3]);
  x[0] = _mm512_shuffle_ps(a, c, 0x44);
  x[1] = _mm512_shuffle_ps(a, c, 0xEE);
  x[2] = _mm512_shuffle_ps(b, e, 0x44);
  x[3] = _mm512_shuffle_ps(b, e, 0xEE);
}

AVX512 void dot_avx512(const float* z, const float* const* rows, int64_t dim, float* out) {
  const int64_t whole = dim / 4 * 4;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < whole; d += 4) {
    __m512 x[4];
    load4x16(rows, d, x);
    for (int i = 0; i < 4; ++i) sum = _mm512_fmadd_ps(x[i], _mm512_set1_ps(z[d + i]), sum);
  }
  _mm512_storeu_ps(out, sum);
  for (int64_t r = 0; r < kGather; ++r)
    for (int64_t d = whole; d < dim; ++d) out[r] = __builtin_fmaf(rows[r][d], z[d], out[r]);
}

template <int kCompare>
AVX512 inline uint32_t compare_avx512(const float* score, const float* cut) {
  const uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(score), _mm512_loadu_ps(cut), kCompare);
  const uint32_t high = _mm512_cmp_ps_mask(_mm512_loadu_ps(score + 16), _mm512_loadu_ps(cut + 16), kCompare);
  return low | high << 16;
}

AVX512 inline void count_avx512(uint32_t mask, __m512i (&counts)[2]) {
  const __m512i one = _mm512_set1_epi32(1);
  counts[0] = _mm512_mask_add_epi32(counts[0], static_cast<__mmask16>(mask), counts[0], one);
  counts[1] = _mm512_mask_add_epi32(counts[1], static_cast<__mmask16>(mask >> 16), counts[1], one);
}

AVX512 void classify_avx512(const float* scores, int64_t n, const Cuts& cuts, Verdicts& verdicts) {
  __m512i before[2][2];
  for (int e = 0; e < 2; ++e)
    for (int v = 0; v < 2; ++v) before[e][v] = _mm512_loadu_si512(verdicts.before[e] + 16 * v);
  for (int64_t r = 0; r < n; ++r) {
    const float* row = scores + r * kLanes;
    const Sorted sorted(compare_avx512<_CMP_GE_OQ>(row, cuts.reach[0]), compare_avx512<_CMP_GT_OQ>(row, cuts.clear[0]),
                        compare_avx512<_CMP_GE_OQ>(row, cuts.reach[1]), compare_avx512<_CMP_GT_OQ>(row, cuts.clear[1]));
    verdicts.unsure[r] = sorted.unsure;
    verdicts.member[r] = sorted.before_last & ~sorted.before_first;
    count_avx512(sorted.before_first, before[0]);
    count_avx512(sorted.before_last, before[1]);
  }
  for (int e = 0; e < 2; ++e)
    for (int v = 0; v < 2; ++v) _mm512_storeu_si512(verdicts.before[e] + 16 * v, before[e][v]);
}

AVX512 void reached_avx512(const float* scores, int64_t n, const Cuts& cuts, Verdicts& verdicts) {
  for (int64_t r = 0; r < n; ++r) verdicts.unsure[r] = compare_avx512<_CMP_GE_OQ>(scores + r * kLanes, cuts.reach[1]);
}
#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels scalar{score_scalar, classify_scalar, reached_scalar, lower_scalar, dot_scalar, accumulate_scalar, exponentials_scalar};
#if defined(__x86_64__)
  static const Kernels avx2{score_avx2, classify_avx2, reached_avx2, lower_avx2, dot_avx2, accumulate_avx2, exponentials_avx2};
  static const Kernels avx512{score_avx512, classify_avx512, reached_avx512, lower_avx2, dot_avx512, accumulate_avx2, exponentials_avx2};
  static const Isa isa = chosen_isa();
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx2) return avx2;
#endif
  return scalar;
}

}  // namespace mirepro
