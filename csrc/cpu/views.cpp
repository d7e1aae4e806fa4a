// Views: crop with antialiased resize, gray, colour jitter in a drawn order, flip. An image stays in cache from its
// bytes to its view. Every value is computed by the same operations in the same order whatever the vectors' width.
#include "views.h"

#include <algorithm>

#include "../isa.h"

#define MIREPRO_INLINE inline __attribute__((always_inline))  // into the variant of each instruction set

namespace mirepro {
namespace {

/// What each of `size` outputs takes from the pixels [start, start + length): a triangle as wide as an output, at least a pixel.
struct Taps {
  struct Tap {
    int64_t first, count, at;  // pixels, and where their weights begin
  };
  std::vector<Tap> taps;
  std::vector<float> weights;

  Taps(int64_t start, int64_t length, int64_t size) : taps(size) {
    const double scale = static_cast<double>(length) / size, support = std::max(scale, 1.0);
    for (int64_t i = 0; i < size; ++i) {
      const double centre = (i + 0.5) * scale;
      const auto first = std::max<int64_t>(0, static_cast<int64_t>(std::floor(centre - support + 0.5)));
      const auto end = std::min<int64_t>(length, static_cast<int64_t>(std::floor(centre + support + 0.5)));
      taps[i] = {start + first, end - first, static_cast<int64_t>(weights.size())};
      double total = 0;
      const auto weight = [&](int64_t p) { return std::max(0.0, 1 - std::fabs(p + 0.5 - centre) / support); };
      for (int64_t p = first; p < end; ++p) total += weight(p);
      for (int64_t p = first; p < end; ++p) weights.push_back(static_cast<float>(weight(p) / total));
    }
  }
};

/// The same taps by their number, as many for each output: those that an output lacks weigh nothing, which adds +0.
struct Columns {
  int64_t taps = 0, size;
  std::vector<int32_t> first;
  std::vector<float> weights;  // (taps, size)

  explicit Columns(const Taps& from) : size(from.taps.size()), first(size) {
    for (const auto& tap : from.taps) taps = std::max(taps, tap.count);
    weights.resize(taps * size);
    for (int64_t i = 0; i < size; ++i) {
      first[i] = static_cast<int32_t>(from.taps[i].first);
      for (int64_t t = 0; t < from.taps[i].count; ++t) weights[t * size + i] = from.weights[from.taps[i].at + t];
    }
  }
};

/// out[j] = sum over the taps of weight * row[j], rows of bytes `stride` apart; in [0, 255].
MIREPRO_INLINE void blend_rows(const uint8_t* rows, int64_t stride, const float* weights, int64_t taps, int64_t n,
                               float* __restrict out) {
  std::fill_n(out, n, 0.0f);
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* __restrict row = rows + t * stride;
    const float weight = weights[t];
    for (int64_t j = 0; j < n; ++j) out[j] += weight * static_cast<float>(row[j]);
  }
}

/// Columns of a blended row, to [0, 1]; behind the row stand as many zeros as an output has taps.
MIREPRO_INLINE void blend_columns(const float* __restrict row, const Columns& columns, float* __restrict out) {
  const int32_t* __restrict first = columns.first.data();
  const int64_t size = columns.size;
  std::fill_n(out, size, 0.0f);
  for (int64_t t = 0; t < columns.taps; ++t) {
    const float* __restrict weights = columns.weights.data() + t * size;
    for (int64_t i = 0; i < size; ++i) out[i] += weights[i] * row[first[i] + static_cast<int32_t>(t)];
  }
  for (int64_t i = 0; i < size; ++i) out[i] /= 255;
}

/// A box of an image `(3, side, side)` as `(3, size, size)`.
MIREPRO_INLINE void resize(const uint8_t* image, int64_t side, const int64_t* box, int64_t size, float* out) {
  const int64_t top = box[0], left = box[1], height = box[2], width = box[3];
  const Taps rows(top, height, size);
  const Columns columns(Taps(0, width, size));
  std::vector<float> blended(width + columns.taps);
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t i = 0; i < size; ++i) {
      const auto [first, count, at] = rows.taps[i];
      blend_rows(image + (c * side + first) * side + left, side, rows.weights.data() + at, count, width, blended.data());
      blend_columns(blended.data(), columns, out + (c * size + i) * size);
    }
}

MIREPRO_INLINE float clamp(float x) { return std::min(std::max(x, 0.0f), 1.0f); }

/// ITU-R 601 weights, rounded as torchvision rounds them.
MIREPRO_INLINE float luma(float red, float green, float blue) { return 0.2989f * red + 0.587f * green + 0.114f * blue; }

MIREPRO_INLINE void make_gray(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[n + i] = x[2 * n + i] = luma(x[i], x[n + i], x[2 * n + i]);
}

MIREPRO_INLINE void brightness(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < 3 * n; ++i) x[i] = clamp(x[i] * factor);
}

/// Mean luma; sixteen partial sums, so that its order is the same for all vectors.
MIREPRO_INLINE float mean_luma(const float* x, int64_t n) {
  constexpr int64_t kParts = 16;
  double parts[kParts] = {};
  for (int64_t i = 0; i + kParts <= n; i += kParts)
    for (int64_t j = 0; j < kParts; ++j) parts[j] += luma(x[i + j], x[n + i + j], x[2 * n + i + j]);
  double total = 0;
  for (double part : parts) total += part;
  for (int64_t i = n / kParts * kParts; i < n; ++i) total += luma(x[i], x[n + i], x[2 * n + i]);
  return static_cast<float>(total / n);
}

MIREPRO_INLINE void contrast(float* x, int64_t n, float factor, float mean) {
  for (int64_t i = 0; i < 3 * n; ++i) x[i] = clamp(mean + (x[i] - mean) * factor);
}

MIREPRO_INLINE void saturation(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) {
    const float gray = luma(x[i], x[n + i], x[2 * n + i]);
    for (int64_t c = 0; c < 3; ++c) x[c * n + i] = clamp(gray + (x[c * n + i] - gray) * factor);
  }
}

/// x modulo 6 for x in [-6, 12).
MIREPRO_INLINE float wrap(float x) { return x < 0 ? x + 6 : x >= 6 ? x - 6 : x; }

/// Turns the hue by `turn` sixths through HSV.
MIREPRO_INLINE void hue(float* x, int64_t n, float turn) {
  float *__restrict reds = x, *__restrict greens = x + n, *__restrict blues = x + 2 * n;
  for (int64_t i = 0; i < n; ++i) {
    const float red = reds[i], green = greens[i], blue = blues[i];
    const float value = std::max(std::max(red, green), blue), chroma = value - std::min(std::min(red, green), blue);
    const float safe = chroma == 0 ? 1.0f : chroma;
    const float apart = value == red ? green - blue : value == green ? blue - red : red - green;
    const float turned = wrap((value == red ? 0.0f : value == green ? 2.0f : 4.0f) + apart / safe + turn);
    const auto channel = [&](float place) {
      const float k = wrap(turned + place);
      return value - chroma * clamp(std::min(k, 4 - k));
    };
    reds[i] = channel(5), greens[i] = channel(3), blues[i] = channel(1);
  }
}

/// One step of the jitter on an image `(3, n)`.
MIREPRO_INLINE void jitter(float* x, int64_t n, int64_t step, float amount) {
  const float factor = std::max(0.0f, 1 + amount);
  if (step == 0) brightness(x, n, factor);
  if (step == 1) contrast(x, n, factor, mean_luma(x, n));
  if (step == 2) saturation(x, n, factor);
  if (step == 3) hue(x, n, 6 * amount);
}

/// What is done to one image.
struct Recipe {
  const int64_t *box, *order;
  const float* amount;
  bool gray, flip;
};

/// The view `(3, size, size)` of an image `(3, side, side)`.
MIREPRO_INLINE void transform(const uint8_t* image, int64_t side, const Recipe& recipe, int64_t size, float* x) {
  const int64_t n = size * size;
  resize(image, side, recipe.box, size, x);
  if (recipe.gray) make_gray(x, n);
  for (int place = 0; place < 4; ++place)
    if (const int64_t step = recipe.order[place]; step >= 0) jitter(x, n, step, recipe.amount[step]);
  for (int64_t row = 0; row < 3 * size && recipe.flip; ++row) std::reverse(x + row * size, x + (row + 1) * size);
}

void transform_scalar(const uint8_t* image, int64_t side, const Recipe& recipe, int64_t size, float* x) {
  transform(image, side, recipe, size, x);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void transform_avx2(const uint8_t* image, int64_t side, const Recipe& recipe, int64_t size, float* x) {
  transform(image, side, recipe, size, x);
}
#else
constexpr auto transform_avx2 = transform_scalar;
#endif

/// What is done to each image, checked.
struct Plan {
  View<int64_t> boxes, gray, order, flip;
  Matrix amount;

  Plan(const Tensor& images, const Tensor& b, const Tensor& g, const Tensor& o, const Tensor& a, const Tensor& f)
      : boxes(view<int64_t>(b, "boxes", 2)), gray(view<int64_t>(g, "gray", 1)), order(view<int64_t>(o, "order", 2)),
        flip(view<int64_t>(f, "flip", 1)), amount(view<float>(a, "amount", 2)) {
    require(images.is_cpu() && images.scalar_type() == ScalarType::Byte, "images: must be a CPU tensor of dtype uint8");
    require(images.dim() == 4 && images.size(1) == 3 && images.size(2) == images.size(3), "images: must have shape (B, 3, S, S)");
    for (int64_t rows : {boxes.rows, gray.rows, order.rows, flip.rows, amount.rows})
      require(rows == images.size(0), "boxes, gray, order, amount, flip: need one row per image");
    require(boxes.cols == 4 && order.cols == 4 && amount.cols == 4, "boxes, order, amount: need shape (B, 4)");
    require_finite(amount, "amount");
    for (int64_t i = 0; i < boxes.rows; ++i) check(i, images.size(2));
  }

  void check(int64_t i, int64_t side) const {
    const int64_t* box = boxes.row(i);
    const std::string row = ": row " + std::to_string(i);
    for (int e = 0; e < 2; ++e)
      require(box[e] >= 0 && box[2 + e] >= 1 && box[2 + e] <= side - box[e], "boxes" + row + " does not lie in the image");
    for (int place = 0; place < 4; ++place)
      require(-1 <= order.row(i)[place] && order.row(i)[place] <= 3, "order" + row + " holds no step; use -1 to 3");
    require(std::fabs(amount.row(i)[3]) <= 0.5f, "amount" + row + " turns the hue by more than 0.5");
  }

  Recipe recipe(int64_t i) const {
    return {boxes.row(i), order.row(i), amount.row(i), gray.data[i] != 0, flip.data[i] != 0};
  }
};

}  // namespace

Tensor augment(const Tensor& images, const Tensor& boxes, const Tensor& gray, const Tensor& order, const Tensor& amount,
               const Tensor& flip, int64_t size) {
  const Plan plan(images, boxes, gray, order, amount, flip);
  require(size >= 1, "size: must be at least 1");
  const int64_t count = images.size(0), side = images.size(2);
  const auto bytes = torch::stable::contiguous(images);
  const auto* pixels = static_cast<const uint8_t*>(bytes.const_data_ptr());
  auto result = torch::stable::new_empty(images, {count, 3, size, size}, ScalarType::Float);
  auto* out = floats(result);
  const auto variant = chosen_isa() == Isa::scalar ? transform_scalar : transform_avx2;
  parallel(count, [&](int64_t i) { variant(pixels + i * 3 * side * side, side, plan.recipe(i), size, out + i * 3 * size * size); });
  return result;
}

}  // namespace mirepro
