// Sorts keys on the device.
#pragma once
#include "../key.h"
#include "device.h"

namespace mirepro {

/// Sorts arrays of n keys each (n a power of two), ascending.
void sort_keys(const Device& device, Key* keys, int64_t arrays, int64_t n);
int64_t power_of_two(int64_t at_least);

}  // namespace mirepro
