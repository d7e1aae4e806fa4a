// Operators that write or partition the bank.
#pragma once
#include "tensors.h"

namespace mirepro {

void bank_update_(Tensor bank, const Tensor& index, const Tensor& z, double momentum);
Tensor bank_assign(const Tensor& bank, const Tensor& centroids);

}  // namespace mirepro
