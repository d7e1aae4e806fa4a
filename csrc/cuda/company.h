// Own rows and cluster labels of an operator's queries, as kernels see them.
#pragma once
#include "../cpu/region.h"
#include "device.h"

namespace mirepro {

struct Company {
  const int64_t* own = nullptr;     // (B), or null
  const int64_t* labels = nullptr;  // (C, N), or null
  int64_t clusterings = 0, rows = 0;

  /// Whether row j shares a cluster with row i; without labels only i itself does.
  __device__ bool mates(int64_t i, int64_t j) const {
    if (i == j) return true;
    for (int64_t c = 0; c < clusterings; ++c)
      if (labels[c * rows + i] == labels[c * rows + j]) return true;
    return false;
  }
};

/// The tensors behind a `Company`.
struct CompanyTensors {
  std::optional<View<int64_t>> own, labels;

  CompanyTensors(const MaybeTensor& own_, const MaybeTensor& labels_, int64_t queries, int64_t rows, Checks& checks) : rows_(rows) {
    if (own_) {
      own = view<int64_t>(*own_, "own", 1);
      require(own->rows == queries, "own: needs one row per query");
      checks.inside(*own, rows, "own");
    }
    if (labels_) {
      labels = view<int64_t>(*labels_, "labels", 2);
      require(labels->cols == rows, "labels: needs one column per bank row, shape (C, N)");
    }
  }

  Company company() const {
    return {own ? own->data : nullptr, labels ? labels->data : nullptr, labels ? labels->rows : 0, rows_};
  }

 private:
  int64_t rows_;
};

}  // namespace mirepro
