#include "region.h"

#include <algorithm>

#include "../philox.h"
#include "members.h"

namespace mirepro {
namespace {

/// The region's members; the whole bank needs no scan.
Bitmap region_members(const Matrix& z, const Matrix& bank, int64_t lo, int64_t hi) {
  if (lo != 0 || hi != bank.rows) return std::move(find_region(z, bank, lo, hi, true).members);
  Bitmap all(z.rows, bank.rows);
  std::fill(all.bits.begin(), all.bits.end(), ~uint64_t{0});
  for (int64_t q = 0; q < z.rows && bank.rows % 64; ++q) all.row(q)[all.words - 1] = (uint64_t{1} << (bank.rows % 64)) - 1;
  return all;
}

Members members_of(Bitmap& region, const Company& company, int64_t q, bool own, bool mates, bool& fallback) {
  Members members(region.row(q), region.words);
  fallback = (own || mates) && !members.exclude(company, q, mates);
  return members;
}

Company checked_company(const MaybeTensor& own, const MaybeTensor& labels, const Matrix& z, const Matrix& bank, bool excludes) {
  require(!excludes || own.has_value(), "own: needed to exclude the own row or its mates");
  return Company(own, labels, z.rows, bank.rows);
}

void draw_with_replacement(const Members& members, Philox random, int64_t k, int64_t* out) {
  const bool dense = members.size() <= 32 * k;
  const auto list = dense ? members.list() : std::vector<uint32_t>();
  for (int64_t t = 0; t < k; t += 4) {
    const auto words = random.block(static_cast<uint32_t>(t / 4));
    for (int64_t i = 0; i < std::min<int64_t>(4, k - t); ++i) {
      const int64_t number = mulhi(words[i], members.size());
      out[t + i] = dense ? list[number] : members[number];
    }
  }
}

/// The k members whose words are smallest (member m has word m), in that order, ties by number.
void draw_without_replacement(const Members& members, Philox random, int64_t k, int64_t* out) {
  std::vector<uint64_t> priority(members.size());
  for (int64_t m = 0; m < members.size(); m += 4) {
    const auto words = random.block(static_cast<uint32_t>(m / 4));
    for (int64_t i = 0; i < std::min<int64_t>(4, members.size() - m); ++i)
      priority[m + i] = static_cast<uint64_t>(words[i]) << 32 | static_cast<uint64_t>(m + i);
  }
  std::partial_sort(priority.begin(), priority.begin() + k, priority.end());
  for (int64_t t = 0; t < k; ++t) out[t] = members[static_cast<int64_t>(priority[t] & 0xFFFFFFFFu)];
}

}  // namespace

Tensor region_size(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank, MaybeTensor own, MaybeTensor labels,
                   bool exclude_own, bool exclude_mates) {
  const auto [q, b] = query_and_bank(z, bank);
  const auto company = checked_company(own, labels, q, b, exclude_own || exclude_mates);
  auto region = find_region(q, b, lo_rank, hi_rank, true).members;
  auto size = new_longs(z, {q.rows});
  auto* out = longs(size);
  parallel(q.rows, [&](int64_t i) {
    bool fallback = false;
    const auto members = members_of(region, company, i, exclude_own, exclude_mates, fallback);
    out[i] = fallback ? 0 : members.size();
  });
  return size;
}

Tensor region_sample(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank, int64_t k, int64_t seed,
                     int64_t stream, int64_t step, const Tensor& sample_index, MaybeTensor own, MaybeTensor labels,
                     bool exclude_own, bool exclude_mates, bool replacement) {
  const auto [q, b] = query_and_bank(z, bank);
  const auto company = checked_company(own, labels, q, b, exclude_own || exclude_mates);
  const auto sample = view<int64_t>(sample_index, "sample_index", 1);
  require(sample.rows == q.rows, "sample_index: needs one entry per query");
  require(k >= 1, "k: must be at least 1");
  require(0 <= lo_rank && lo_rank < hi_rank && hi_rank <= b.rows, "ranks: need 0 <= lo_rank < hi_rank <= " + std::to_string(b.rows));
  auto region = region_members(q, b, lo_rank, hi_rank);
  auto index = new_longs(z, {q.rows, k});
  auto* out = longs(index);
  std::vector<int64_t> size(q.rows);
  parallel(q.rows, [&](int64_t i) {
    bool fallback = false;
    const auto members = members_of(region, company, i, exclude_own, exclude_mates, fallback);
    const Philox random{static_cast<uint32_t>(seed), static_cast<uint32_t>(stream), static_cast<uint32_t>(step),
                        static_cast<uint64_t>(sample.data[i])};
    size[i] = members.size();
    if (replacement)
      draw_with_replacement(members, random, k, out + i * k);
    else if (k <= size[i])
      draw_without_replacement(members, random, k, out + i * k);
  });
  for (int64_t i = 0; i < q.rows && !replacement; ++i)
    require(k <= size[i], "k: " + std::to_string(k) + " draws without replacement from the " + std::to_string(size[i]) +
                              " members of row " + std::to_string(i) + "; lower k or widen the region");
  return index;
}

Tensor region_thresholds(const Tensor& z, const Tensor& bank, int64_t lo_rank, int64_t hi_rank) {
  const auto [q, b] = query_and_bank(z, bank);
  const auto region = find_region(q, b, lo_rank, hi_rank, false);
  auto result = new_floats(z, {q.rows, 2});
  auto* out = floats(result);
  for (int64_t i = 0; i < q.rows; ++i) {
    out[2 * i] = score_of(region.first[i]);
    out[2 * i + 1] = score_of(region.last[i]);
  }
  return result;
}

std::tuple<Tensor, Tensor> neighbors(const Tensor& z, const Tensor& bank, int64_t k) {
  const auto [q, b] = query_and_bank(z, bank);
  const auto best = find_best(q, b, k);
  auto score = new_floats(z, {q.rows, k}), index = new_longs(z, {q.rows, k});
  auto* s = floats(score);
  auto* j = longs(index);
  for (int64_t i = 0; i < q.rows * k; ++i) {
    s[i] = score_of(best[i]);
    j[i] = row_of(best[i]);
  }
  return {score, index};
}

}  // namespace mirepro
