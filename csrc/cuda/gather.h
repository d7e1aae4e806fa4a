// What the operators over gathered rows share: the checked index, and who is to blame for a result that is not finite.
#pragma once
#include "../cpu/gather.h"
#include "score.h"

namespace mirepro {

struct Gather {
  const Device& device;
  Matrix bank;
  View<int64_t> index;
  Buffer<Count> bad;  // the first query with a score that is not finite

  /// z: the queries to check, or null.
  Gather(const Device& device, int64_t queries, const Matrix& bank, const Tensor& index, const Matrix* z);

  /// Waits for the result; throws where a query was marked bad.
  void verify() const;
};

}  // namespace mirepro
