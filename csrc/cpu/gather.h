// Operators over gathered bank rows.
#pragma once
#include <tuple>

#include "tensors.h"

namespace mirepro {

std::tuple<Tensor, Tensor> gather_nce(const Tensor& z, const Tensor& bank, const Tensor& index, double tau, bool gradient);
Tensor gather_dot(const Tensor& z, const Tensor& bank, const Tensor& index);
Tensor gather_dot_backward(const Tensor& grad, const Tensor& bank, const Tensor& index);

}  // namespace mirepro
