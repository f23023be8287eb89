// One vector of floats on the machine that the file is compiled for, and the few operations that the kernels need.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace jaxcept {

#if defined(__AVX512F__)

constexpr int kWidth = 16;
using Vec = __m512;
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec splat(float s) { return _mm512_set1_ps(s); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kWidth = 8;
using Vec = __m256;
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec splat(float s) { return _mm256_set1_ps(s); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#else  // Four lanes through the compiler's vector type: NEON, SSE2, and whatever else it lowers them to.

constexpr int kWidth = 4;
typedef float Vec __attribute__((vector_size(16)));
static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
static inline Vec splat(float s) { return Vec{s, s, s, s}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // the build allows contraction
static inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

#endif

}  // namespace jaxcept
