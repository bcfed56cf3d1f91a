// The one inner loop of all matrix products: a few rows of x times a panel of 64 packed columns.
//
// A packed matrix holds panels of 64 outputs; a panel is [inner words][64] words of 32 bits (see vector.h), so one
// word of x is broadcast against four full vectors. Every output is summed over the inner dimension from first
// to last in its own lane: it does not depend on how many rows are multiplied together.

#pragma once

#include "vector.h"

namespace baton {

constexpr int kPanel = 64;   // outputs of a panel
constexpr int kMaxRows = 6;  // 6 x 4 sums, 4 words of weights and a word of x fill the 32 registers of AVX-512
constexpr int kFetchAhead = 20;  // words of x, each 256 bytes of weights

// out[i * out_stride + 0..63] (+)= sum over words of x[i * x_stride + w] * panel[w * 64 + 0..63]
// Streamed: the panel is read this once and fits no cache, so it is fetched ahead and past the larger caches.
template <class T, int Rows, bool Streamed = false>
inline void multiply_rows(const uint32_t* panel, const uint32_t* x, long x_stride, long words, float* out, long out_stride, bool add) {
    f32x16 total[Rows][4];
    for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < 4; ++j) total[i][j] = add ? load<f32x16>(out + i * out_stride + 16 * j) : f32x16{};
    for (long w = 0; w < words; ++w, panel += kPanel) {
        u32x16 a[4];
        for (int j = 0; j < 4; ++j) {
            if constexpr (Streamed) __builtin_prefetch(panel + kFetchAhead * kPanel + 16 * j, 0, 0);
            a[j] = load<u32x16>(panel + 16 * j);
        }
        for (int i = 0; i < Rows; ++i) {
            u32x16 b = splat(x[i * x_stride + w]);
            for (int j = 0; j < 4; ++j) multiply_add<T>(total[i][j], a[j], b);
        }
    }
    for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < 4; ++j) store(out + i * out_stride + 16 * j, total[i][j]);
}

template <class T>
inline void multiply_tile(int rows, const uint32_t* panel, const uint32_t* x, long x_stride, long words, float* out, long out_stride, bool add) {
    switch (rows) {
        case 1: return multiply_rows<T, 1>(panel, x, x_stride, words, out, out_stride, add);
        case 2: return multiply_rows<T, 2>(panel, x, x_stride, words, out, out_stride, add);
        case 3: return multiply_rows<T, 3>(panel, x, x_stride, words, out, out_stride, add);
        case 4: return multiply_rows<T, 4>(panel, x, x_stride, words, out, out_stride, add);
        case 5: return multiply_rows<T, 5>(panel, x, x_stride, words, out, out_stride, add);
        default: return multiply_rows<T, 6>(panel, x, x_stride, words, out, out_stride, add);
    }
}

}  // namespace baton
