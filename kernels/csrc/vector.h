// Sixteen float32 lanes, and the two element types that kernels read: float and bfloat16.
//
// Written with the compiler's vector types, so that it is correct on every machine; the instructions that matter
// (AVX512-BF16 dot products) are named where the machine has them. Never built with -ffast-math: sums keep their
// order, which is what makes results independent of the batch.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define BATON_AVX512 1
#include <immintrin.h>
#endif
#if defined(BATON_AVX512) && defined(__AVX512BF16__)
#define BATON_AVX512_BF16 1
#endif

namespace baton {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};

inline f32x16 splat(float x) { return f32x16{} + x; }
inline u32x16 splat(uint32_t x) { return u32x16{} + x; }

template <class Vector, class Element>
inline Vector load(const Element* from) {
    Vector out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

template <class Vector, class Element>
inline void store(Element* to, Vector x) {
    std::memcpy(to, &x, sizeof x);
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline f32x16 widen16(const float* from) { return load<f32x16>(from); }
inline f32x16 widen16(const BFloat16* from) {
    return (f32x16)(__builtin_convertvector(load<u16x16>(from), u32x16) << 16);
}

// To nearest, ties to even. The bits of a NaN would overflow into the sign, so NaN is set apart.
inline u16x16 narrow_bits(f32x16 x) {
    u32x16 bits = (u32x16)x;
#ifdef BATON_AVX512_BF16
    (void)bits;
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    return (u16x16)half;
#else
    u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    u32x16 quiet = (bits >> 16) | 0x40u;
    u32x16 is_nan = (u32x16)((bits & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), u16x16);
#endif
}

inline void narrow16(f32x16 x, float* to) { store(to, x); }
inline void narrow16(f32x16 x, BFloat16* to) { store(to, narrow_bits(x)); }

// The first `count` < 16 elements; the others read as 0 and are not written.
template <class T>
inline f32x16 widen_some(const T* from, int count) {
    T some[16] = {};
    std::memcpy(some, from, count * sizeof(T));
    return widen16(some);
}

template <class T>
inline void narrow_some(f32x16 x, T* to, int count) {
    T some[16];
    narrow16(x, some);
    std::memcpy(to, some, count * sizeof(T));
}

// x as T can hold it.
template <class T>
inline f32x16 rounded(f32x16 x) {
    T some[16];
    narrow16(x, some);
    return widen16(some);
}

inline float sum(f32x16 x) {
    float lanes[16];
    store(lanes, x);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

inline f32x16 maximum(f32x16 a, f32x16 b) { return a > b ? a : b; }

inline float maximum(f32x16 x) {
    float most = x[0];
    for (int i = 1; i < 16; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// exp(x) for x <= 88, relative error below 2e-7; exactly 0 below -87.3 (and for -inf), NaN for NaN.
// 2^n * p(r) with x = n ln 2 + r, |r| <= ln 2 / 2, ln 2 split in two (Cody and Waite 1980); p is the Taylor series.
inline f32x16 exponential(f32x16 x) {
    const f32x16 low = splat(-87.3f);
    f32x16 clamped = x < low ? low : x;
    f32x16 shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    f32x16 n = shifted - 12582912.0f;
    f32x16 r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 p = splat(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    i32x16 exponent = (i32x16)shifted << 23;  // the low bits of `shifted` are n
    f32x16 result = (f32x16)((i32x16)p + exponent);
    return x < low ? f32x16{} : result;
}

// A weight word is 32 bits: one float, or two bfloat16 that stand one after the other along the inner dimension.
template <class T>
constexpr int kPerWord = 4 / sizeof(T);

template <class T>
inline void multiply_add(f32x16& total, u32x16 a, u32x16 b);

template <>
inline void multiply_add<float>(f32x16& total, u32x16 a, u32x16 b) {
    total += (f32x16)a * (f32x16)b;
}

template <>
inline void multiply_add<BFloat16>(f32x16& total, u32x16 a, u32x16 b) {
#ifdef BATON_AVX512_BF16
    total = (f32x16)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
    total += (f32x16)(a << 16) * (f32x16)(b << 16);
    total += (f32x16)(a & 0xffff0000u) * (f32x16)(b & 0xffff0000u);
#endif
}

}  // namespace baton
