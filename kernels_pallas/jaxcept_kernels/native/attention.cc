// Keys and values into the paged pool, and causal attention of a ragged batch straight out of it.
//
// A query's result is made of chunks of kChunk keys, counted from the start of its context and merged in order by the
// online softmax. Tiles of queries, tasks and threads decide who computes a chunk, never how: a query's result is the
// same bits whatever shares the batch, and whether it comes as a decode or as part of a prefill.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace jaxcept {
namespace {

namespace ffi = xla::ffi;

constexpr int kLine = 16;       // floats of a cache line
constexpr int kChunk = 256;     // keys merged at once
constexpr int kTileRows = 32;   // rows (query, head of the group) that aim to share the loads of a chunk
constexpr int kKeys = 4;        // keys of a register tile of scores
constexpr int kStride = kChunk + kLine;  // from one row's scores to the next one's, with room for a tile's last keys
constexpr int kValueVecs = 4;   // vectors of a register tile of weighted values
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostRows = 4;    // rows of a register tile: 32 registers
#else
constexpr int kMostRows = 2;    // 16 registers
#endif
constexpr int64_t kAheadFloats = 1024;  // how long before its use a key or value is asked for: a block or so
constexpr int64_t kAloneScores = 1024;      // scores that are computed before another thread wakes up
constexpr int64_t kTaskFloats = 32 * 1024;  // floats to copy that are worth a task

struct Problem {
  const float* q;        // [T, H, D]
  const float* keys;     // [rows of the pool, KH, B, D]
  const float* values;   // the same
  const int32_t* start;  // [S + 1]
  const int32_t* context;  // [S]
  const int32_t* tables;   // [S, C]
  float* out;              // [T, H, D]
  int64_t T, H, D, KH, B, S, C;
  int64_t first_row, num_blocks;  // of the layer in the pool
  int64_t window;  // keys that a query sees at most, 0 for all
  float scale, soft_cap;  // a cap of 0 is none
  int64_t group() const { return H / KH; }
  int64_t first_key(int64_t visible) const { return window == 0 ? 0 : std::max<int64_t>(visible - window, 0); }
};

// Queries token .. token + count - 1 of one entry; the first sees `visible` keys, each next one a key more.
struct Tile {
  int64_t entry, token, count, visible, first_key;
  int64_t first_chunk() const { return first_key / kChunk; }
  int64_t chunks() const { return (visible + count - 1 + kChunk - 1) / kChunk - first_chunk(); }
};

// What the rows of one (tile, kv head) gather: highest score, sum of exponentials, weighted sum of values.
struct Partial {
  float *highest, *total, *values;  // [rows], [rows], [rows, D]
  static int64_t floats(int64_t rows, int64_t D) { return rows * (D + 2); }
  static Partial at(float* p, int64_t rows) { return {p, p + rows, p + 2 * rows}; }
};

// Consecutive keys that lie side by side in one block.
struct Run {
  const float *keys, *values;
  int64_t key, count;  // key of the chunk
};

// The runs of a chunk, and where to ask for memory: `early` runs before its use.
struct Runs {
  const Run* run;
  int64_t count, early;
  const float* ahead_of_keys(int64_t i) const {
    i += early;
    return i < count ? run[i].keys : run[std::min(i - count, count - 1)].values;
  }
  const float* ahead_of_values(int64_t i) const { return run[std::min(i + early, count - 1)].values; }
};

int64_t find_runs(const Problem& p, const Tile& tile, int64_t head, int64_t key0, int64_t key1, int64_t chunk0,
                  Run* runs) {
  int64_t found = 0;
  for (int64_t key = key0; key < key1;) {
    const int64_t within = key % p.B, count = std::min(p.B - within, key1 - key);
    const int64_t column = std::min(key / p.B, p.C - 1);
    const int64_t block = std::clamp<int64_t>(p.tables[tile.entry * p.C + column], 0, p.num_blocks - 1);
    const int64_t at = (((p.first_row + block) * p.KH + head) * p.B + within) * p.D;
    runs[found++] = {p.keys + at, p.values + at, key - chunk0, count};
    key += count;
  }
  return found;
}

static inline void prefetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// scores[r][j] = q[r] . k[j] for Rows rows and kKeys keys, of which those from `count` on are of no use.
template <int Rows>
void score_tile(const float* q, const float* k, int64_t D, int64_t count, float* scores) {
  Vec acc[Rows][kKeys];
  for (auto& row : acc)
    for (Vec& v : row) v = splat(0.0f);
  const float* key[kKeys];
  for (int j = 0; j < kKeys; ++j) key[j] = k + std::min<int64_t>(j, count - 1) * D;
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    Vec part[kKeys];
    for (int j = 0; j < kKeys; ++j) part[j] = load(key[j] + d);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec query = load(q + r * D + d);
      for (int j = 0; j < kKeys; ++j) acc[r][j] = fma(query, part[j], acc[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    float* sums = scores + r * kStride;
    sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], sums);
    for (int64_t rest = d; rest < D; ++rest)
      for (int j = 0; j < kKeys; ++j) sums[j] = std::fma(q[r * D + rest], key[j][rest], sums[j]);
  }
}

template <int Rows>
void score_rows(const Problem& p, const float* q, const Runs& runs, bool fetch, float* scores) {
  for (int64_t i = 0; i < runs.count; ++i) {
    const Run& run = runs.run[i];
    const float* ahead = runs.ahead_of_keys(i);
    for (int64_t j = 0; j < run.count; j += kKeys) {
      const int64_t count = std::min<int64_t>(kKeys, run.count - j);
      if (fetch) prefetch(ahead + j * p.D, count * p.D);
      score_tile<Rows>(q, run.keys + j * p.D, p.D, count, scores + run.key + j);
    }
  }
}

// values[r][d .. d + Vecs * kWidth) = sum over keys of weights[r][key] v[key], in the order of the keys.
template <int Rows, int Vecs>
void value_tile(int64_t D, const float* weights, const Runs& runs, bool fetch, int64_t d, float* values) {
  Vec acc[Rows][Vecs];
  for (auto& row : acc)
    for (Vec& v : row) v = splat(0.0f);
  for (int64_t i = 0; i < runs.count; ++i) {
    const float *v = runs.run[i].values + d, *end = v + runs.run[i].count * D, *weight = weights + runs.run[i].key;
    const int64_t ahead = runs.ahead_of_values(i) + d - v;
    for (; v < end; v += D, ++weight) {
      if (fetch) prefetch(v + ahead, Vecs * kWidth);
      Vec part[Vecs];
      for (int c = 0; c < Vecs; ++c) part[c] = load(v + c * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Vec factor = splat(weight[r * kStride]);
        for (int c = 0; c < Vecs; ++c) acc[r][c] = fma(factor, part[c], acc[r][c]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Vecs; ++c) store(values + r * D + d + c * kWidth, acc[r][c]);
}

template <int Rows>
void value_rows(const Problem& p, const float* weights, const Runs& runs, bool fetch, float* values) {
  int64_t d = 0;
  for (; d + kValueVecs * kWidth <= p.D; d += kValueVecs * kWidth)
    value_tile<Rows, kValueVecs>(p.D, weights, runs, fetch, d, values);
  for (; d + kWidth <= p.D; d += kWidth) value_tile<Rows, 1>(p.D, weights, runs, fetch, d, values);
  for (; d < p.D; ++d) {
    for (int r = 0; r < Rows; ++r) {
      float acc = 0.0f;
      for (int64_t i = 0; i < runs.count; ++i)
        for (int64_t j = 0; j < runs.run[i].count; ++j)
          acc = std::fma(weights[r * kStride + runs.run[i].key + j], runs.run[i].values[j * p.D + d], acc);
      values[r * p.D + d] = acc;
    }
  }
}

// c * tanh(s / c) of each score.
void cap_scores(float* scores, int64_t count, float soft_cap) {
  const Vec cap = splat(soft_cap), inverse = splat(1.0f / soft_cap);
  for (int64_t j = 0; j < count; j += kWidth) store(scores + j, cap * tanh_of(load(scores + j) * inverse));
}

// Scores of one row to weights, in place: e^(score - highest) for keys in [first, seen), zeros elsewhere in the chunk.
void soften(float* scores, int64_t first, int64_t seen, float* highest, float* total) {
  std::fill(scores, scores + first, -std::numeric_limits<float>::infinity());
  std::fill(scores + seen, scores + kChunk, -std::numeric_limits<float>::infinity());
  Vec top = load(scores);
  for (int64_t j = kWidth; j < seen; j += kWidth) top = larger(top, load(scores + j));
  float lanes[kWidth];
  store(lanes, top);
  *highest = *std::max_element(lanes, lanes + kWidth);
  const Vec shift = splat(*highest);
  for (int64_t j = 0; j < seen; j += kWidth) store(scores + j, exp_of_negative(load(scores + j) - shift));
  std::fill(scores, scores + first, 0.0f);
  std::fill(scores + seen, scores + kChunk, 0.0f);
  Vec sum = load(scores);
  for (int64_t j = kWidth; j < seen; j += kWidth) sum = sum + load(scores + j);
  store(lanes, sum);
  *total = 0.0f;
  for (const float lane : lanes) *total += lane;
}

// Calls f(r, number) with the sizes of register tiles that cover `rows` rows.
template <typename F>
void by_rows(int64_t rows, F f) {
  int64_t r = 0;
  for (; r + kMostRows <= rows; r += kMostRows) f(r, std::integral_constant<int, kMostRows>{});
  for (; r + 2 <= rows; r += 2) f(r, std::integral_constant<int, 2>{});
  for (; r < rows; ++r) f(r, std::integral_constant<int, 1>{});
}

// The scaled queries of a tile for one kv head: [rows, D], a query's heads side by side.
void gather_queries(const Problem& p, const Tile& tile, int64_t head, float* q) {
  const int64_t width = p.group() * p.D;
  for (int64_t i = 0; i < tile.count; ++i) {
    const float* from = p.q + ((tile.token + i) * p.H + head * p.group()) * p.D;
    for (int64_t d = 0; d < width; ++d) q[i * width + d] = from[d] * p.scale;
  }
}

// One chunk's part of the attention of a tile's rows, its chunks counted from the first that any of them sees. Rows that
// see none of its keys get a highest score of -infinity.
void attend_chunk(const Problem& p, const Tile& tile, int64_t head, int64_t chunk, const float* q, Partial part) {
  thread_local std::vector<float> scratch;
  thread_local std::vector<Run> runs(kChunk + 1);
  const int64_t rows = tile.count * p.group();
  scratch.resize(rows * kStride);
  float* scores = scratch.data();
  const int64_t chunk0 = (tile.first_chunk() + chunk) * kChunk, chunk1 = chunk0 + kChunk;
  // Whole blocks, so that keys meet in the same register tiles whichever query comes first.
  const int64_t key0 = std::max(chunk0, tile.first_key / p.B * p.B);
  const int64_t key1 = std::min(chunk1, tile.visible + tile.count - 1);
  const Runs of{runs.data(), find_runs(p, tile, head, key0, key1, chunk0, runs.data()),
                std::max<int64_t>(1, kAheadFloats / (p.B * p.D))};
  by_rows(rows, [&](int64_t r, auto size) {
    score_rows<size.value>(p, q + r * p.D, of, r == 0, scores + r * kStride);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t visible = tile.visible + r / p.group();
    const int64_t seen = std::clamp<int64_t>(visible - chunk0, 0, kChunk);
    const int64_t first = std::clamp<int64_t>(p.first_key(visible) - chunk0, 0, seen);
    if (p.soft_cap > 0) cap_scores(scores + r * kStride, seen, p.soft_cap);
    soften(scores + r * kStride, first, seen, part.highest + r, part.total + r);
  }
  by_rows(rows, [&](int64_t r, auto size) {
    value_rows<size.value>(p, scores + r * kStride, of, r == 0, part.values + r * p.D);
  });
}

void merge(int64_t rows, int64_t D, Partial into, Partial part) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.highest[r] == -std::numeric_limits<float>::infinity()) continue;  // the row sees none of the chunk
    const float highest = std::max(into.highest[r], part.highest[r]);
    const float keep = std::exp(into.highest[r] - highest), add = std::exp(part.highest[r] - highest);
    into.highest[r] = highest;
    into.total[r] = std::fma(into.total[r], keep, part.total[r] * add);
    float *a = into.values + r * D, *b = part.values + r * D;
    for (int64_t d = 0; d < D; ++d) a[d] = std::fma(a[d], keep, b[d] * add);
  }
}

void finish(const Problem& p, const Tile& tile, int64_t head, Partial part) {
  for (int64_t r = 0; r < tile.count * p.group(); ++r) {
    const int64_t token = tile.token + r / p.group();
    float* to = p.out + (token * p.H + head * p.group() + r % p.group()) * p.D;
    const float inverse = 1.0f / part.total[r];
    for (int64_t d = 0; d < p.D; ++d) to[d] = part.values[r * p.D + d] * inverse;
  }
}

void attend_tile(const Problem& p, const Tile& tile, int64_t head) {
  thread_local std::vector<float> scratch;
  const int64_t rows = tile.count * p.group(), floats = Partial::floats(rows, p.D);
  scratch.resize(2 * floats + rows * p.D);
  const Partial whole = Partial::at(scratch.data(), rows), part = Partial::at(scratch.data() + floats, rows);
  float* q = scratch.data() + 2 * floats;
  gather_queries(p, tile, head, q);
  attend_chunk(p, tile, head, 0, q, whole);
  for (int64_t chunk = 1; chunk < tile.chunks(); ++chunk) {
    attend_chunk(p, tile, head, chunk, q, part);
    merge(rows, p.D, whole, part);
  }
  finish(p, tile, head, whole);
}

// A few long contexts: the chunks of each go to different workers, and are merged in order afterwards.
void attend_split(ffi::ThreadPool& pool, const Problem& p, const std::vector<Tile>& tiles) {
  std::vector<int64_t> first{0}, offset{0};  // items before a tile, and floats before its partials
  for (const Tile& tile : tiles) {
    const int64_t items = tile.chunks() * p.KH, rows = tile.count * p.group();
    first.push_back(first.back() + items);
    offset.push_back(offset.back() + items * Partial::floats(rows, p.D));
  }
  std::vector<float> partials(offset.back());
  const auto place = [&](size_t i, int64_t head, int64_t chunk) {
    const int64_t rows = tiles[i].count * p.group();
    return Partial::at(&partials[offset[i] + (head * tiles[i].chunks() + chunk) * Partial::floats(rows, p.D)], rows);
  };
  parallel_for(pool, first.back(), [&](int64_t item) {
    thread_local std::vector<float> q;
    const size_t i = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
    const int64_t head = (item - first[i]) / tiles[i].chunks(), chunk = (item - first[i]) % tiles[i].chunks();
    q.resize(tiles[i].count * p.group() * p.D);
    gather_queries(p, tiles[i], head, q.data());
    attend_chunk(p, tiles[i], head, chunk, q.data(), place(i, head, chunk));
  });
  for (size_t i = 0; i < tiles.size(); ++i) {
    for (int64_t head = 0; head < p.KH; ++head) {
      for (int64_t chunk = 1; chunk < tiles[i].chunks(); ++chunk)
        merge(tiles[i].count * p.group(), p.D, place(i, head, 0), place(i, head, chunk));
      finish(p, tiles[i], head, place(i, head, 0));
    }
  }
}

void attend(ffi::ThreadPool& pool, const Problem& p) {
  const int64_t most = std::max<int64_t>(1, kTileRows / p.group());
  std::vector<Tile> tiles;
  int64_t scores = 0, covered = 0;
  for (int64_t s = 0; s < p.S; ++s) {
    const int64_t end = std::min<int64_t>(p.start[s + 1], p.T);
    for (int64_t token = p.start[s]; token < end; token += most) {
      const int64_t count = std::min(most, end - token);
      const int64_t visible = p.context[s] - (end - token) + 1, first_key = p.first_key(visible);
      tiles.push_back({s, token, count, visible, first_key});
      scores += count * p.H * (visible - first_key);
    }
    covered = std::max(covered, end);
  }
  std::fill(p.out + covered * p.H * p.D, p.out + p.T * p.H * p.D, 0.0f);
  const int64_t items = static_cast<int64_t>(tiles.size()) * p.KH;
  if (scores <= kAloneScores) {
    for (int64_t item = 0; item < items; ++item) attend_tile(p, tiles[item / p.KH], item % p.KH);
  } else if (items < 4 * pool.num_threads()) {
    attend_split(pool, p, tiles);
  } else {
    parallel_for(pool, items, [&](int64_t item) { attend_tile(p, tiles[item / p.KH], item % p.KH); });
  }
}

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

ffi::Error paged_attention(ffi::ThreadPool pool, Floats q, Floats keys, Floats values, Ints start, Ints context,
                           Ints tables, Ints first_row, int64_t num_blocks, int64_t window, float scale,
                           float soft_cap, ffi::Result<Floats> out) {
  const auto qs = q.dimensions(), ks = keys.dimensions(), ts = tables.dimensions();
  if (qs.size() != 3 || ks.size() != 4 || ts.size() != 2 || qs[2] != ks[3] || qs[1] % ks[1] != 0 ||
      start.element_count() != static_cast<size_t>(ts[0] + 1) || context.element_count() != static_cast<size_t>(ts[0]))
    return ffi::Error::InvalidArgument("paged_attention: shapes do not fit");
  attend(pool, {q.typed_data(), keys.typed_data(), values.typed_data(), start.typed_data(), context.typed_data(),
                tables.typed_data(), out->typed_data(), qs[0], qs[1], qs[2], ks[1], ks[2], ts[0], ts[1],
                first_row.typed_data()[0], num_blocks, window, scale, soft_cap});
  return ffi::Error::Success();
}

ffi::Error write_kv(ffi::ThreadPool pool, Floats, Floats, Floats k, Floats v, Ints slots, Ints first_row,
                    int64_t num_blocks, ffi::Result<Floats> keys, ffi::Result<Floats> values) {
  const auto ks = keys->dimensions(), ns = k.dimensions();
  if (ks.size() != 4 || ns.size() != 3 || ns[1] != ks[1] || ns[2] != ks[3])
    return ffi::Error::InvalidArgument("write_kv: shapes do not fit");
  const int64_t T = ns[0], KH = ks[1], B = ks[2], D = ks[3], first = first_row.typed_data()[0];
  const int64_t span = std::max<int64_t>(1, kTaskFloats / (KH * D));
  parallel_for(pool, (T + span - 1) / span, [&](int64_t item) {
    for (int64_t token = item * span; token < std::min(T, (item + 1) * span); ++token) {
      const int64_t slot = slots.typed_data()[token];
      if (slot < 0 || slot >= num_blocks * B) continue;
      for (int64_t head = 0; head < KH; ++head) {
        const int64_t from = (token * KH + head) * D, to = (((first + slot / B) * KH + head) * B + slot % B) * D;
        std::memcpy(keys->typed_data() + to, k.typed_data() + from, D * sizeof(float));
        std::memcpy(values->typed_data() + to, v.typed_data() + from, D * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxcept

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcept_paged_attention, jaxcept::paged_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxcept::Floats>()
                                  .Arg<jaxcept::Floats>()
                                  .Arg<jaxcept::Floats>()
                                  .Arg<jaxcept::Ints>()
                                  .Arg<jaxcept::Ints>()
                                  .Arg<jaxcept::Ints>()
                                  .Arg<jaxcept::Ints>()
                                  .Attr<int64_t>("num_blocks")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Ret<jaxcept::Floats>());

// The pool's parts come in and go out as the same memory: the caller declares the aliases.
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcept_write_kv, jaxcept::write_kv,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxcept::Floats>()
                                  .Arg<jaxcept::Floats>()
                                  .Arg<jaxcept::Floats>()
                                  .Arg<jaxcept::Floats>()
                                  .Arg<jaxcept::Ints>()
                                  .Arg<jaxcept::Ints>()
                                  .Attr<int64_t>("num_blocks")
                                  .Ret<jaxcept::Floats>()
                                  .Ret<jaxcept::Floats>());
