#include "lse.h"
#include "members.h"
#include "region.h"

namespace mirepro {
namespace {

/// One query's sums over its region and over its mates, fed in bank-index order.
struct Sums {
  LogSumExp all, mates;
  std::vector<double> row_weight;

  explicit Sums(int64_t dim) : all(dim), mates(dim) {}
};

struct Job {
  const Matrix& z;
  const Matrix& bank;
  Bitmap& region;
  const Company& company;
  double tau;

  void add(Sums& sums, int64_t q, const int64_t* members, int64_t n) const {
    const float *rows[kGather], *mate_rows[kGather];
    double f[kGather], mate_f[kGather];
    int64_t mates = 0;
    for (int64_t r = 0; r < n; ++r) rows[r] = bank.row(members[r]);
    scores_over_tau(z.row(q), rows, n, bank.cols, tau, f);
    sums.all.add(f, rows, n);
    for (int64_t r = 0; r < n && company.own; ++r)
      if (company.mates(company.own->data[q], members[r])) {
        mate_rows[mates] = rows[r];
        mate_f[mates++] = f[r];
      }
    if (mates > 0) sums.mates.add(mate_f, mate_rows, mates);
  }

  /// Members in rows [begin, end) of one query; begin is a multiple of 64.
  void add_chunk(Sums& sums, int64_t q, int64_t begin, int64_t end) const {
    int64_t members[kGather], n = 0;
    for_each_bit(region.row(q) + begin / 64, (end - begin + 63) / 64, [&](int64_t bit) {
      members[n++] = begin + bit;
      if (n == kGather) {
        add(sums, q, members, n);
        n = 0;
      }
    });
    if (n > 0) add(sums, q, members, n);
  }

  /// Chunk by chunk for a block of queries, so that the block reads the bank once.
  std::vector<Sums> run(int64_t first, int64_t last, int64_t dim) const {
    std::vector<Sums> sums(last - first, Sums(dim));
    for (int64_t begin = 0; begin < bank.rows; begin += kTile)
      for (int64_t q = first; q < last; ++q) add_chunk(sums[q - first], q, begin, std::min(bank.rows, begin + kTile));
    return sums;
  }
};

/// The own row always counts: where it is no member, the member of the last rank gives way.
void admit_own(Region& region, const Company& company, int64_t queries) {
  for (int64_t q = 0; q < queries && company.own; ++q) {
    const int64_t own = company.own->data[q];
    if (region.members.test(q, own)) continue;
    region.members.clear(q, row_of(region.last[q]));
    region.members.set(q, own);
  }
}

void write(const LogSumExp& sum, double tau, float* value, float* gradient) {
  *value = static_cast<float>(sum.value());
  for (size_t d = 0; d < sum.weighted.size(); ++d)
    gradient[d] = sum.sum > 0 ? static_cast<float>(sum.weighted[d] / sum.sum / tau) : 0.0f;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> region_logsumexp(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank,
                                                            double tau, MaybeTensor own, MaybeTensor labels, bool gradient) {
  const auto [q, b] = query_and_bank(z, bank);
  require(tau > 0, "tau: must be positive");
  const Company company(own, labels, q.rows, b.rows);
  auto region = find_region(q, b, lo_rank, hi_rank, true);
  admit_own(region, company, q.rows);
  const int64_t width = gradient ? q.cols : 0;
  auto all = new_floats(z, {q.rows}), mates = new_floats(z, {q.rows});
  auto d_all = new_floats(z, {q.rows, width}), d_mates = new_floats(z, {q.rows, width});
  float *a = floats(all), *m = floats(mates), *da = floats(d_all), *dm = floats(d_mates);
  const Job job{q, b, region.members, company, tau};
  constexpr int64_t kBlock = 8;
  parallel((q.rows + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t first = block * kBlock, last = std::min(q.rows, first + kBlock);
    const auto sums = job.run(first, last, width);
    for (int64_t i = first; i < last; ++i) {
      write(sums[i - first].all, tau, a + i, da + i * width);
      write(sums[i - first].mates, tau, m + i, dm + i * width);
    }
  });
  return {all, mates, d_all, d_mates};
}

}  // namespace mirepro
