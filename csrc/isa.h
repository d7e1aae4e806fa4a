// Run-time choice of the instruction set. No torch headers: the build-information module uses it too.
#pragma once
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mirepro {

enum class Isa { scalar, avx2, avx512 };

inline const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar";
}

/// The best instruction set of this CPU that has a variant here.
inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f")) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

/// MIREPRO_ISA (scalar, avx2, avx512) if set, else the best one. Throws on an unknown or unsupported name.
inline Isa chosen_isa() {
  const char* wish = std::getenv("MIREPRO_ISA");
  if (wish == nullptr || *wish == '\0') return best_isa();
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
    if (std::string(wish) == name(isa) && isa <= best_isa()) return isa;
  throw std::invalid_argument(std::string("MIREPRO_ISA=") + wish + ": unknown or not supported by this CPU; use scalar, avx2 or avx512 up to " +
                              name(best_isa()));
}

/// Whether the instructions of the certified first passes may be used: with the full AVX-512 variant only.
inline bool has_bf16() {
#if defined(__x86_64__)
  return chosen_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

inline bool has_vnni() {
#if defined(__x86_64__)
  return chosen_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace mirepro
