// One vector of floats on the machine that the file is compiled for, and the few operations that the kernels need.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
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
static inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512d even = _mm512_unpacklo_pd(ab, cd), odd = _mm512_unpackhi_pd(ab, cd);
  const Vec all = _mm512_add_ps(_mm512_castpd_ps(even), _mm512_castpd_ps(odd));
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), high);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kWidth = 8;
using Vec = __m256;
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec splat(float s) { return _mm256_set1_ps(s); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
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
static inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

#endif

// to[k * rows + r] = from[r * stride + k] for four k and four r.
static inline void transpose4(const float* from, int64_t stride, float* to, int64_t rows) {
#if defined(__x86_64__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + stride);
  __m128 c = _mm_loadu_ps(from + 2 * stride), d = _mm_loadu_ps(from + 3 * stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + rows, b), _mm_storeu_ps(to + 2 * rows, c), _mm_storeu_ps(to + 3 * rows, d);
#else
  for (int k = 0; k < 4; ++k)
    for (int r = 0; r < 4; ++r) to[k * rows + r] = from[r * stride + k];
#endif
}

typedef int32_t IntVec __attribute__((vector_size(sizeof(Vec))));

// a where `where` is all ones, b where it is zero.
static inline Vec choose(IntVec where, Vec a, Vec b) { return (Vec)(((IntVec)a & where) | ((IntVec)b & ~where)); }

// b where the two do not compare.
static inline Vec larger(Vec a, Vec b) {
  const IntVec greater = a > b;
  return choose(greater, a, b);
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Taylor to x^7). A NaN
// stays one.
static inline Vec exp_of_negative(Vec x) {
  x = larger(splat(-87.0f), x);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  const Vec r = fma(n, splat(-1.42860682e-6f), fma(n, splat(-0.693145751953125f), x));
  Vec y = splat(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, splat(c));
  const IntVec power = ((IntVec)shifted - (IntVec)magic + 127) << 23;
  return y * (Vec)power;
}

// tanh x: by its powers near zero (Cephes, Moshier 1989), by e^(-2|x|) elsewhere. A NaN stays one.
static inline Vec tanh_of(Vec x) {
  const Vec size = larger(x, -x), square = x * x;
  Vec y = splat(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    y = fma(y, square, splat(c));
  const Vec near = fma(y * square, x, x), e = exp_of_negative(splat(-2.0f) * size);
  const Vec far = (splat(1.0f) - e) / (splat(1.0f) + e);
  const IntVec is_near = size < splat(0.625f), is_positive = x > splat(0.0f);
  return choose(is_near, near, choose(is_positive, far, -far));
}

}  // namespace jaxcept
