// The operators (namespace mirepro) and their CPU kernels, on torch's stable ABI.
#include "cpu/views.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(mirepro, m) {
  mirepro::define_operators(m);
  m.def("augment(Tensor images, Tensor boxes, Tensor gray, Tensor order, Tensor amount, Tensor flip, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mirepro, CPU, m) {
  mirepro::implement_operators(m);
  m.impl("augment", TORCH_BOX(&mirepro::augment));
}
