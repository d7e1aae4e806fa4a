// Operators over regions of ranks.
#pragma once
#include <optional>
#include <tuple>

#include "tensors.h"

namespace mirepro {

using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> neighbors(const Tensor& z, const Tensor& bank, int64_t k);
Tensor region_thresholds(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank);
Tensor region_size(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank, MaybeTensor own, MaybeTensor labels,
                   bool exclude_own, bool exclude_mates);
Tensor region_sample(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank, int64_t k, int64_t seed,
                     int64_t stream, int64_t step, const Tensor& sample_index, MaybeTensor own, MaybeTensor labels,
                     bool exclude_own, bool exclude_mates, bool replacement);
std::tuple<Tensor, Tensor, Tensor, Tensor> region_logsumexp(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank,
                                                            double tau, MaybeTensor own, MaybeTensor labels, bool gradient);

}  // namespace mirepro
