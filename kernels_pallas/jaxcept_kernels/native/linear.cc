// y = x W + bias for a weight packed in panels of 16 columns, and rows of a packed weight.
//
// Every output is one chain of fused multiply-adds over k = 0, 1, ..., K - 1. Tiles, blocks and threads change the
// order in which outputs are computed, never the chain of one of them: a row's result is the same bits whatever shares
// the batch.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace jaxcept {
namespace {

namespace ffi = xla::ffi;

constexpr int kPanel = 16;              // columns of a panel
constexpr int kVecs = kPanel / kWidth;  // vectors across a panel

// How many rows and panels a register tile spans: accumulators fill the register file and leave room for operands.
#if defined(__AVX512F__)
constexpr int kRows = 12, kPanels = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6, kPanels = 1;
#else
constexpr int kRows = 3, kPanels = 1;
#endif

constexpr int64_t kBlockK = 256;            // k values between visits to memory when rows need several tiles
constexpr int64_t kBlockRows = 20 * kRows;  // rows whose x block stays in the second-level cache
constexpr int64_t kAheadBytes = 2048;       // how far before its use a weight is asked for

struct Problem {
  const float* x;
  const float* panels;  // [ceil(N / 16), K, 16]
  const float* bias;    // [N], or null
  float* y;
  int64_t M, K, N;
};

template <int Rows, int Panels>
void tile(const Problem& p, int64_t row, int64_t panel, int64_t k0, int64_t k1) {
  Vec acc[Rows][Panels][kVecs];
  const int64_t column = panel * kPanel;
  const int64_t width = std::min<int64_t>(p.N - column, Panels * kPanel);
  const bool whole = width == Panels * kPanel;
  float edge[Panels * kPanel] = {};
  for (int r = 0; r < Rows; ++r) {
    const float* start = k0 > 0 ? p.y + (row + r) * p.N + column : p.bias ? p.bias + column : edge;
    if (!whole && start != edge) {
      std::memcpy(edge, start, width * sizeof(float));
      start = edge;
    }
    for (int j = 0; j < Panels; ++j)
      for (int v = 0; v < kVecs; ++v) acc[r][j][v] = load(start + j * kPanel + v * kWidth);
  }
  const float* x = p.x + row * p.K;
  const float* w = p.panels + panel * p.K * kPanel;
  for (int64_t k = k0; k < k1; ++k) {
    Vec weight[Panels][kVecs];
    for (int j = 0; j < Panels; ++j) {
      const float* at = w + (j * p.K + k) * kPanel;
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kAheadBytes);
      for (int v = 0; v < kVecs; ++v) weight[j][v] = load(at + v * kWidth);
    }
    for (int r = 0; r < Rows; ++r) {
      const Vec value = splat(x[r * p.K + k]);
      for (int j = 0; j < Panels; ++j)
        for (int v = 0; v < kVecs; ++v) acc[r][j][v] = fma(value, weight[j][v], acc[r][j][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    float* out = p.y + (row + r) * p.N + column;
    float* to = whole ? out : edge;
    for (int j = 0; j < Panels; ++j)
      for (int v = 0; v < kVecs; ++v) store(to + j * kPanel + v * kWidth, acc[r][j][v]);
    if (!whole) std::memcpy(out, edge, width * sizeof(float));
  }
}

using Tile = void (*)(const Problem&, int64_t, int64_t, int64_t, int64_t);

template <int Panels, int... Rows>
Tile pick(int rows, std::integer_sequence<int, Rows...>) {
  static constexpr Tile tiles[] = {tile<Rows + 1, Panels>...};
  return tiles[rows - 1];
}

// Rows row0 .. row1 - 1 of the panels panel0 .. panel1 - 1.
void region(const Problem& p, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
  const int64_t tiles = (row1 - row0 + kRows - 1) / kRows;
  const int64_t block = tiles == 1 ? p.K : kBlockK;
  for (int64_t k0 = 0; k0 < p.K; k0 += block) {
    const int64_t k1 = std::min(p.K, k0 + block);
    for (int64_t panel = panel0; panel < panel1;) {
      const int count = panel + kPanels <= panel1 ? kPanels : 1;
      int64_t row = row0;
      for (int64_t t = 0; t < tiles; ++t) {
        const int rows = static_cast<int>((row1 - row + tiles - t - 1) / (tiles - t));
        constexpr auto sizes = std::make_integer_sequence<int, kRows>{};
        (count == 1 ? pick<1>(rows, sizes) : pick<kPanels>(rows, sizes))(p, row, panel, k0, k1);
        row += rows;
      }
      panel += count;
    }
  }
}

void run(ffi::ThreadPool& pool, const Problem& p) {
  const int64_t panels = (p.N + kPanel - 1) / kPanel;
  const int64_t row_blocks = (p.M + kBlockRows - 1) / kBlockRows;
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t wanted = std::max<int64_t>(1, threads * 4 / row_blocks);
  int64_t span = (panels + wanted - 1) / wanted;
  span = (span + kPanels - 1) / kPanels * kPanels;
  const int64_t spans = (panels + span - 1) / span;
  parallel_for(pool, spans * row_blocks, [&](int64_t item) {
    const int64_t row0 = item / spans * kBlockRows, panel0 = item % spans * span;
    region(p, row0, std::min(p.M, row0 + kBlockRows), panel0, std::min(panels, panel0 + span));
  });
}

ffi::Error check(ffi::Buffer<ffi::F32>& x, ffi::Buffer<ffi::F32>& w, ffi::Result<ffi::Buffer<ffi::F32>>& y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2 || xs[1] != ws[1] || ws[2] != kPanel || xs[0] != ys[0] ||
      (ys[1] + kPanel - 1) / kPanel != ws[0])
    return ffi::Error::InvalidArgument("linear: expected x [M, K], weight [ceil(N / 16), K, 16], y [M, N]");
  return ffi::Error::Success();
}

ffi::Error linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                  ffi::Result<ffi::Buffer<ffi::F32>> y) {
  if (ffi::Error error = check(x, w, y); error.failure()) return error;
  run(pool, {x.typed_data(), w.typed_data(), nullptr, y->typed_data(), x.dimensions()[0], x.dimensions()[1],
             y->dimensions()[1]});
  return ffi::Error::Success();
}

ffi::Error linear_bias(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                       ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  if (ffi::Error error = check(x, w, y); error.failure()) return error;
  if (bias.element_count() != static_cast<size_t>(y->dimensions()[1]))
    return ffi::Error::InvalidArgument("linear: the bias needs one value per output column");
  run(pool, {x.typed_data(), w.typed_data(), bias.typed_data(), y->typed_data(), x.dimensions()[0],
             x.dimensions()[1], y->dimensions()[1]});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxcept

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcept_linear, jaxcept::linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcept_linear_bias, jaxcept::linear_bias,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
