// The operators (namespace mirepro) and their CPU kernels, on torch's stable ABI.
#include "schemas.h"

STABLE_TORCH_LIBRARY(mirepro, m) { mirepro::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(mirepro, CPU, m) { mirepro::implement_operators(m); }
