// y = x W + bias for a weight packed in panels of 16 columns; or for rows in groups that have a weight each.
//
// Every output is one chain of fused multiply-adds over k = 0, 1, ..., K - 1. Tiles, blocks and threads change the
// order in which outputs are computed, never the chain of one of them: a row's result is the same bits whatever shares
// the batch.

#include <algorithm>
#include <memory>
#include <utility>

#include "parallel.h"
#include "vec.h"

namespace jaxcept {
namespace {

namespace ffi = xla::ffi;

constexpr int kPanel = 16;              // columns of a panel
constexpr int kVecs = kPanel / kWidth;  // vectors across a panel

// Most rows of a register tile, which is one panel wide (its accumulators leave room for a weight and a value), and how
// many k values of a panel it shares with other tiles: they fill about half of the first-level cache.
#if defined(__AVX512F__)
constexpr int kRows = 24;
constexpr int64_t kBlockK = 512;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6;
constexpr int64_t kBlockK = 256;
#else
constexpr int kRows = 3;
constexpr int64_t kBlockK = 256;
#endif

constexpr int64_t kBlockTiles = 240 / kRows;    // tiles whose x stays in the second-level cache for kBlockK values of k
constexpr int64_t kSmallX = 48 * 1024;          // floats of x that stay there whole
constexpr int64_t kAhead = 256;                 // how many k before its use a weight is asked for
constexpr int64_t kPackedTogether = 64 * 1024;  // floats of x worth packing on several threads

struct Problem {
  const float* x;       // [M, K]
  const float* panels;  // [ceil(N / 16), K, 16]
  const float* bias;    // [N], or null
  float* y;             // [M, N]
  int64_t M, K, N;
  int64_t num_tiles() const { return (M + kRows - 1) / kRows; }
  int64_t first_row(int64_t tile) const { return tile * M / num_tiles(); }
};

// y[row .. row + Rows)[panel] over k0 .. k1 - 1, for x in the order [k][row]. `ahead` is where the weights lie that
// come next; `lines` of them are asked for.
template <int Rows>
void tile(const Problem& p, const float* x, int64_t row, int64_t panel, int64_t k0, int64_t k1, const float* ahead,
          int64_t lines) {
  Vec acc[Rows][kVecs];
  const int64_t column = panel * kPanel, width = std::min<int64_t>(p.N - column, kPanel);
  float edge[kPanel] = {};
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r) {
    const float* start = k0 > 0 ? p.y + (row + r) * p.N + column : p.bias ? p.bias + column : edge;
    if (width < kPanel && start != edge) start = static_cast<float*>(std::memcpy(edge, start, width * sizeof(float)));
    for (int v = 0; v < kVecs; ++v) acc[r][v] = load(start + v * kWidth);
  }
  const float* w = p.panels + (panel * p.K + k0) * kPanel;
  x += k0 * Rows;
  for (int64_t k = k0; k < k1; ++k, w += kPanel, x += Rows) {
    if (lines-- > 0) __builtin_prefetch(ahead);
    ahead += kPanel;
    Vec weight[kVecs];
    for (int v = 0; v < kVecs; ++v) weight[v] = load(w + v * kWidth);
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r) {
      const Vec value = splat(x[r]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(value, weight[v], acc[r][v]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r) {
    float* out = p.y + (row + r) * p.N + column;
    float* to = width < kPanel ? edge : out;
    for (int v = 0; v < kVecs; ++v) store(to + v * kWidth, acc[r][v]);
    if (width < kPanel) std::memcpy(out, edge, width * sizeof(float));
  }
}

using Tile = decltype(&tile<1>);

template <int... Rows>
Tile pick(int64_t rows, std::integer_sequence<int, Rows...>) {
  static constexpr Tile tiles[] = {tile<Rows + 1>...};
  return tiles[rows - 1];
}

// Tiles tile0 .. tile1 - 1 of one panel over k0 .. k1 - 1. Each asks for its share of the weights that come next.
void block(const Problem& p, const float* packed, int64_t tile0, int64_t tile1, int64_t panel, int64_t k0, int64_t k1,
           const float* ahead) {
  const int64_t tiles = tile1 - tile0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = p.first_row(tile0 + t), rows = p.first_row(tile0 + t + 1) - row;
    const int64_t from = (k1 - k0) * t / tiles, to = (k1 - k0) * (t + 1) / tiles;
    pick(rows, std::make_integer_sequence<int, kRows>{})(p, packed + row * p.K, row, panel, k0, k1,
                                                         ahead + from * kPanel, to - from);
  }
}

// Tiles tile0 .. tile1 - 1 of the panels panel0 .. panel1 - 1. With one tile a panel is read once, from end to end.
// With several, a block of kBlockK values of a panel stays in the first-level cache while they use it, and the x block
// of all of them in the second-level cache: all of x if it is small, else the kBlockK columns that every panel needs.
void region(const Problem& p, const float* packed, int64_t tile0, int64_t tile1, int64_t panel0, int64_t panel1) {
  const int64_t rows = p.first_row(tile1) - p.first_row(tile0);
  const int64_t step = tile1 - tile0 == 1 ? p.K : kBlockK;
  const auto at = [&](int64_t panel, int64_t k) { return p.panels + (panel * p.K + k) * kPanel; };
  if (rows * p.K <= kSmallX || step == p.K) {
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      for (int64_t k0 = 0; k0 < p.K; k0 += step) {
        const int64_t k1 = std::min(p.K, k0 + step);
        block(p, packed, tile0, tile1, panel, k0, k1, at(panel, step == p.K ? kAhead : k1));
      }
    }
    return;
  }
  for (int64_t k0 = 0; k0 < p.K; k0 += step) {
    const int64_t k1 = std::min(p.K, k0 + step);
    for (int64_t panel = panel0; panel < panel1; ++panel)
      block(p, packed, tile0, tile1, panel, k0, k1, at(panel + 1, k0));
  }
}

// The rows of a tile, so that the values of one k lie side by side.
void pack(const Problem& p, int64_t tile, float* packed) {
  constexpr int64_t kRun = 64;  // k values: what is written stays in the first-level cache
  const int64_t row = p.first_row(tile), rows = p.first_row(tile + 1) - row;
  const float* x = p.x + row * p.K;
  packed += row * p.K;
  for (int64_t k0 = 0; k0 < p.K; k0 += kRun) {
    const int64_t k1 = std::min(p.K, k0 + kRun);
    for (int64_t r = 0; r < rows; r += 4) {
      int64_t k = k0;
      for (; r + 4 <= rows && k + 4 <= k1; k += 4) transpose4(x + r * p.K + k, p.K, packed + k * rows + r, rows);
      for (; k < k1; ++k)
        for (int64_t i = r; i < std::min(rows, r + 4); ++i) packed[k * rows + i] = x[i * p.K + k];
    }
  }
}

void run(ffi::ThreadPool& pool, const Problem& p) {
  if (p.M == 0 || p.N == 0) return;
  std::unique_ptr<float[]> storage(p.M == 1 ? nullptr : new float[p.M * p.K]);
  const float* packed = p.M == 1 ? p.x : storage.get();
  if (p.M * p.K >= kPackedTogether) {
    parallel_for(pool, p.num_tiles(), [&](int64_t t) { pack(p, t, storage.get()); });
  } else if (p.M > 1) {
    for (int64_t t = 0; t < p.num_tiles(); ++t) pack(p, t, storage.get());
  }
  const int64_t panels = (p.N + kPanel - 1) / kPanel;
  const int64_t row_blocks = (p.num_tiles() + kBlockTiles - 1) / kBlockTiles;
  const int64_t wanted = std::max<int64_t>(1, pool.num_threads() * 4 / row_blocks);
  const int64_t span = (panels + wanted - 1) / wanted, spans = (panels + span - 1) / span;
  parallel_for(pool, spans * row_blocks, [&](int64_t item) {
    const int64_t block = item / spans, panel0 = item % spans * span;
    const int64_t tile0 = block * p.num_tiles() / row_blocks, tile1 = (block + 1) * p.num_tiles() / row_blocks;
    region(p, packed, tile0, tile1, panel0, std::min(panels, panel0 + span));
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

// Rows lie sorted by group; those behind the last group come out zero.
ffi::Error grouped_linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                          ffi::Buffer<ffi::S32> sizes, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 4 || ys.size() != 2 || xs[1] != ws[2] || ws[3] != kPanel || xs[0] != ys[0] ||
      (ys[1] + kPanel - 1) / kPanel != ws[1] || sizes.element_count() != static_cast<size_t>(ws[0]))
    return ffi::Error::InvalidArgument(
        "grouped_linear: expected x [M, K], weight [E, ceil(N / 16), K, 16], sizes [E], y [M, N]");
  const int64_t M = xs[0], K = xs[1], N = ys[1];
  int64_t row = 0;
  for (int64_t e = 0; e < ws[0]; ++e) {
    const int64_t count = sizes.typed_data()[e];
    if (count < 0 || count > M - row) return ffi::Error::InvalidArgument("grouped_linear: more rows than x has");
    run(pool, {x.typed_data() + row * K, w.typed_data() + e * ws[1] * K * kPanel, nullptr, y->typed_data() + row * N,
               count, K, N});
    row += count;
  }
  std::fill(y->typed_data() + row * N, y->typed_data() + M * N, 0.0f);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcept_grouped_linear, jaxcept::grouped_linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
