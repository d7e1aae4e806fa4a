// exp and log from + - * / alone: libm chooses variants by CPU, these give the same bits everywhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../host_device.h"

namespace mirepro {

/// e^x for x <= 709 in float64; relative error below 1e-15; below -708 it stays at e^-708. Without branches and
/// conversions, so that loops over it are vectorised.
MIREPRO_HD inline double fixed_exp(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, kept in the low bits
  constexpr double kInverseFactorial[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                          1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                          1.0 / 2,         1.0,            1.0};
  x = x > -708.0 ? x : -708.0;
  const double shifted = x * 1.4426950408889634 + kMagic;
  const double turns = shifted - kMagic;
  const double r = (x - turns * 6.93147180369123816490e-01) - turns * 1.90821492927058770002e-10;
  double sum = 1.0 / 6227020800.0;
  for (double c : kInverseFactorial) sum = sum * r + c;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

/// Natural logarithm of a positive normal number; the series of mirepro.rng.log.
MIREPRO_HD inline double fixed_log(double x) {
  int exponent;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < 0.70710678118654752440) {
    mantissa *= 2;
    --exponent;
  }
  const double s = (mantissa - 1) / (mantissa + 1), square = s * s;
  double total = 0;
  for (int odd = 23; odd > 0; odd -= 2) total = total * square + 1.0 / odd;
  return exponent * 0.6931471805599453 + 2 * s * total;
}

}  // namespace mirepro
