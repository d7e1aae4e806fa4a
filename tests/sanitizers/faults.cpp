// Controls of the sanitizer run: operators with a mistake each. They are linked into the instrumented library only.
#include <climits>

#include "cpu/tensors.h"

namespace {

using namespace mirepro;

/// Reads one number past the end.
int64_t beyond(const Tensor& t) { return view<int64_t>(t, "t", 1).data[t.size(0)]; }

/// Reads a copy that is gone.
int64_t freed(const Tensor& t) {
  const int64_t* gone = nullptr;
  {
    const std::vector<int64_t> copy(view<int64_t>(t, "t", 1).data, view<int64_t>(t, "t", 1).data + t.size(0));
    gone = copy.data();
  }
  return *gone;
}

/// Adds one to the largest number there is.
int64_t overflow(const Tensor& t) { return view<int64_t>(t, "t", 1).data[0] + INT64_MAX; }

}  // namespace

STABLE_TORCH_LIBRARY(mirepro_faults, m) {
  m.def("beyond(Tensor t) -> int");
  m.def("freed(Tensor t) -> int");
  m.def("overflow(Tensor t) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(mirepro_faults, CPU, m) {
  m.impl("beyond", TORCH_BOX(&beyond));
  m.impl("freed", TORCH_BOX(&freed));
  m.impl("overflow", TORCH_BOX(&overflow));
}
