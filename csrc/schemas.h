// Schemas of the operators and the functions behind them, the same for every backend.
#pragma once
#include "cpu/bank.h"
#include "cpu/gather.h"
#include "cpu/region.h"

namespace mirepro {

template <class Library>
void define_operators(Library& m) {
  m.def("neighbors(Tensor z, Tensor bank, int k) -> (Tensor, Tensor)");
  m.def("region_thresholds(Tensor z, Tensor bank, int lo_rank, int hi_rank) -> Tensor");
  m.def(
      "region_size(Tensor z, Tensor bank, int lo_rank, int hi_rank, Tensor? own, Tensor? labels, bool exclude_own, "
      "bool exclude_mates) -> Tensor");
  m.def(
      "region_sample(Tensor z, Tensor bank, int lo_rank, int hi_rank, int k, int seed, int stream, int step, "
      "Tensor sample_index, Tensor? own, Tensor? labels, bool exclude_own, bool exclude_mates, bool replacement) -> Tensor");
  m.def(
      "region_logsumexp(Tensor z, Tensor bank, int lo_rank, int hi_rank, float tau, Tensor? own, Tensor? labels, "
      "bool gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gather_nce(Tensor z, Tensor bank, Tensor index, float tau, bool gradient) -> (Tensor, Tensor)");
  m.def("gather_dot(Tensor z, Tensor bank, Tensor index) -> Tensor");
  m.def("gather_dot_backward(Tensor grad, Tensor bank, Tensor index) -> Tensor");
  m.def("bank_update_(Tensor(a!) bank, Tensor index, Tensor z, float momentum) -> ()");
  m.def("bank_assign(Tensor bank, Tensor centroids) -> Tensor");
}

/// Registers the functions of this shared object.
template <class Library>
void implement_operators(Library& m) {
  m.impl("neighbors", TORCH_BOX(&mirepro::neighbors));
  m.impl("region_thresholds", TORCH_BOX(&mirepro::region_thresholds));
  m.impl("region_size", TORCH_BOX(&mirepro::region_size));
  m.impl("region_sample", TORCH_BOX(&mirepro::region_sample));
  m.impl("region_logsumexp", TORCH_BOX(&mirepro::region_logsumexp));
  m.impl("gather_nce", TORCH_BOX(&mirepro::gather_nce));
  m.impl("gather_dot", TORCH_BOX(&mirepro::gather_dot));
  m.impl("gather_dot_backward", TORCH_BOX(&mirepro::gather_dot_backward));
  m.impl("bank_update_", TORCH_BOX(&mirepro::bank_update_));
  m.impl("bank_assign", TORCH_BOX(&mirepro::bank_assign));
}

}  // namespace mirepro
