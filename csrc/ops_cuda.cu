// The CUDA kernels of the operators: one translation unit, since most of the compile time is torch's headers. Compiled
// as plain C++ it is the emulation that the tests run (cuda/emulate.h), in a namespace of its own.
#include "schemas.h"

#include "cuda/device.cu"
#include "cuda/select.cu"
#include "cuda/sort.cu"

#include "cuda/bank_assign.cu"
#include "cuda/bank_update.cu"
#include "cuda/gather.cu"
#include "cuda/gather_dot.cu"
#include "cuda/gather_nce.cu"
#include "cuda/neighbors.cu"
#include "cuda/region_logsumexp.cu"
#include "cuda/region_sample.cu"
#include "cuda/region_thresholds.cu"

#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_IMPL(mirepro, CUDA, m) { mirepro::implement_operators(m); }
#else
STABLE_TORCH_LIBRARY(mirepro_emulated, m) { mirepro::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(mirepro_emulated, CPU, m) { mirepro::implement_operators(m); }
#endif
