// The canonical score and its helpers, one set of functions per instruction set, all with the same bits.
#pragma once
#include <cstdint>

namespace mirepro {

constexpr int64_t kLanes = 32;   // queries scored together
constexpr int64_t kTile = 384;   // bank rows scored together: a multiple of 64 (bitmap words) and of 12 (register block)
constexpr int64_t kGather = 16;  // gathered rows scored together

struct Kernels {
  /// out[r * 32 + q] = chain over d of fma(rows[r * dim + d], zt[d * 32 + q], .), from 0.
  void (*score)(const float* zt, const float* rows, int64_t n, int64_t dim, float* out);
  /// Bit q is set where score[q] >= threshold[q] (false for NaN).
  uint32_t (*at_least)(const float* score, const float* threshold);
  /// out[r] = the same chain for one query and kGather rows given by pointer.
  void (*dot)(const float* z, const float* const* rows, int64_t dim, float* out);
  /// acc[d] = fma(weight[r], rows[r][d], acc[d]) for r = 0..n-1 in order.
  void (*accumulate)(const float* weight, const float* const* rows, int64_t n, int64_t dim, float* acc);
  /// f[r] = e^(f[r] - shift) for kGather entries.
  void (*exponentials)(double* f, double shift);
};

/// The set chosen by MIREPRO_ISA or by the CPU.
const Kernels& kernels();

}  // namespace mirepro
