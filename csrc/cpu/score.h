// The canonical score and its helpers, one set of functions per instruction set, all with the same bits.
#pragma once
#include <cstdint>

namespace mirepro {

constexpr int64_t kLanes = 32;   // queries scored together
constexpr int64_t kTile = 384;   // bank rows scored together: a multiple of 64 (bitmap words) and of 12 (register block)
constexpr int64_t kGather = 16;  // gathered rows scored together

/// Scores around the two brackets of every lane's region: e = 0 that of its first rank, e = 1 that of its last.
/// NaN is never reached.
struct Cuts {
  float reach[2][kLanes];  // scores below it come after bracket e
  float clear[2][kLanes];  // scores above it come before bracket e
};

/// What cuts say about scored rows; bit q stands for lane q.
struct Verdicts {
  uint32_t unsure[kTile];       // maybe inside a bracket: to be looked at
  uint32_t member[kTile];       // after the first bracket and before the last one
  int32_t before[2][kLanes];    // rows before bracket e, the unsure ones left out; added to
};

struct Kernels {
  /// out[r * 32 + q] = chain over d of fma(rows[r * dim + d], zt[d * 32 + q], .), from 0.
  void (*score)(const float* zt, const float* rows, int64_t n, int64_t dim, float* out);
  /// Sorts n rows of scores by the cuts.
  void (*classify)(const float* scores, int64_t n, const Cuts& cuts, Verdicts& verdicts);
  /// The same where only the last bracket counts and nothing comes before it: unsure[r] alone is written.
  void (*reached)(const float* scores, int64_t n, const Cuts& cuts, Verdicts& verdicts);
  /// scores[r * 32 + q] -= less[r] for n rows; top[q] = the largest difference, no less than top[q] was.
  void (*lower)(float* scores, const float* less, int64_t n, float* top);
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
