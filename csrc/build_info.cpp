// Build information for Python; no torch headers, so it loads even where torch is missing or broken.
#include <pybind11/pybind11.h>

#include "isa.h"

#if defined(__clang__)
#define MIREPRO_COMPILER "clang " __clang_version__
#else
#define MIREPRO_COMPILER "gcc " __VERSION__
#endif

#ifndef MIREPRO_CUDA_ARCH_LIST
#define MIREPRO_CUDA_ARCH_LIST ""
#endif

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the compiled operators were built and which instruction set they use here.";
  m.def("compiler", [] { return std::string(MIREPRO_COMPILER); }, "Compiler and its version.");
  m.def("cuda_arch_list", [] { return std::string(MIREPRO_CUDA_ARCH_LIST); }, "CUDA architectures; empty for a CPU-only build.");
  m.def("isa", [] { return std::string(mirepro::name(mirepro::chosen_isa())); }, "Instruction set dispatched in this process.");
  m.def("best_isa", [] { return std::string(mirepro::name(mirepro::best_isa())); }, "Best instruction set of this CPU.");
}
