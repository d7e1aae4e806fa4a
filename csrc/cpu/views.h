// Augmented views of images.
#pragma once
#include "tensors.h"

namespace mirepro {

Tensor augment(const Tensor& images, const Tensor& boxes, const Tensor& gray, const Tensor& order, const Tensor& amount,
               const Tensor& flip, int64_t size);

}  // namespace mirepro
