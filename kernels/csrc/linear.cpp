// Linear layers over packed weights.

#include <algorithm>

#include "activation.h"
#include "matmul.h"
#include "native.h"
#include "pool.h"

namespace baton {
namespace {

long num_panels(long outputs) { return (outputs + kPanel - 1) / kPanel; }

template <class T>
void pack(const T* weight, long outputs, long inputs, uint32_t* packed) {
    const long words = inputs / kPerWord<T>;
    for (long panel = 0; panel < num_panels(outputs); ++panel) {
        uint32_t* to = packed + panel * words * kPanel;
        for (long j = 0; j < kPanel; ++j) {
            const long row = panel * kPanel + j;
            const T* from = weight + row * inputs;
            for (long w = 0; w < words; ++w) {
                uint32_t word = 0;
                if (row < outputs) std::memcpy(&word, from + w * kPerWord<T>, sizeof word);
                to[w * kPanel + j] = word;
            }
        }
    }
}

template <class T>
void unpack_rows(const uint32_t* packed, long inputs, const int64_t* index, long count, T* out) {
    const long words = inputs / kPerWord<T>;
    for (long i = 0; i < count; ++i) {
        const uint32_t* from = packed + index[i] / kPanel * words * kPanel + index[i] % kPanel;
        for (long w = 0; w < words; ++w) std::memcpy(out + i * inputs + w * kPerWord<T>, from + w * kPanel, sizeof(uint32_t));
    }
}

// Calls run(panel, begin, rows) for every panel and every tile of rows of x.
template <class Run>
void over_tiles(Pool& pool, long panels, long tokens, const Run& run) {
    const long tiles = (tokens + kMaxRows - 1) / kMaxRows;
    // Few and contiguous runs of panels where weights are streamed, single panels where the work is long.
    const long runs = tokens > 64 ? panels : std::min<long>(panels, 4L * pool.num_threads());
    pool.run(runs, [&](long at) {
        for (long panel = panels * at / runs; panel < panels * (at + 1) / runs; ++panel)
            for (long tile = 0; tile < tiles; ++tile) {
                const long begin = tokens * tile / tiles;
                run(panel, begin, tokens * (tile + 1) / tiles - begin);
            }
    });
}

// A weight and what it is multiplied with.
template <class T>
struct Product {
    const T* x;
    const uint32_t* packed;
    long inputs;
    bool streamed;  // see Pool

    // sums[i][j] = row begin + i of x times output j of the panel
    void multiply(long panel, long begin, long rows, float (*sums)[kPanel]) const {
        const long words = inputs / kPerWord<T>;
        const uint32_t* from = packed + panel * words * kPanel;
        const uint32_t* by = reinterpret_cast<const uint32_t*>(x + begin * inputs);
        if (rows == 1 && streamed) return multiply_rows<T, 1, true>(from, by, words, words, sums[0], kPanel, false);
        multiply_tile<T>(static_cast<int>(rows), from, by, words, words, sums[0], kPanel, false);
    }
};

template <class T>
void linear(Pool& pool, const Product<T>& product, long tokens, long outputs, const T* bias, T* out) {
    over_tiles(pool, num_panels(outputs), tokens, [&](long panel, long begin, long rows) {
        const long first = panel * kPanel, width = std::min<long>(kPanel, outputs - first);
        float sums[kMaxRows][kPanel];
        product.multiply(panel, begin, rows, sums);
        for (long i = 0; i < rows; ++i) {
            T* to = out + (begin + i) * outputs + first;
            for (long j = 0; j < width; j += 16) {
                const int count = static_cast<int>(std::min<long>(16, width - j));
                f32x16 y = load<f32x16>(sums[i] + j);
                if (count == 16) {
                    if (bias) y += widen16(bias + first + j);
                    narrow16(y, to + j);
                } else {
                    if (bias) y += widen_some(bias + first + j, count);
                    narrow_some(y, to + j, count);
                }
            }
        }
    });
}

// Gates are the first `inner` outputs, a multiple of kPanel. Rounded where the two steps alone would round.
template <class T>
void gated_linear(Pool& pool, const Product<T>& product, int activation, long tokens, long inner, const T* bias, T* out) {
    over_tiles(pool, inner / kPanel, tokens, [&](long panel, long begin, long rows) {
        const long first = panel * kPanel;
        float gates[kMaxRows][kPanel], values[kMaxRows][kPanel];
        product.multiply(panel, begin, rows, gates);
        product.multiply(panel + inner / kPanel, begin, rows, values);
        for (long i = 0; i < rows; ++i)
            for (long j = 0; j < kPanel; j += 16) {
                f32x16 gate = load<f32x16>(gates[i] + j), value = load<f32x16>(values[i] + j);
                if (bias) gate += widen16(bias + first + j), value += widen16(bias + inner + first + j);
                narrow16(activate(activation, rounded<T>(gate)) * rounded<T>(value), out + (begin + i) * inner + first + j);
            }
    });
}

}  // namespace
}  // namespace baton

using namespace baton;

int32_t baton_features() {
#if defined(BATON_AVX512_BF16)
    return 2;
#elif defined(BATON_AVX512)
    return 1;
#else
    return 0;
#endif
}

BatonPool* baton_pool_create(int32_t num_threads) { return new BatonPool(num_threads); }
void baton_pool_destroy(BatonPool* pool) { delete pool; }
void baton_pool_stream(BatonPool* pool) { pool->streamed = true; }

int64_t baton_packed_words(int32_t type, int64_t outputs, int64_t inputs) {
    const int64_t per_word = type ? kPerWord<BFloat16> : kPerWord<float>;
    return inputs % per_word ? 0 : num_panels(outputs) * kPanel * (inputs / per_word);
}

void baton_pack(int32_t type, const void* weight, int64_t outputs, int64_t inputs, uint32_t* packed) {
    if (type) return pack(static_cast<const BFloat16*>(weight), outputs, inputs, packed);
    pack(static_cast<const float*>(weight), outputs, inputs, packed);
}

void baton_unpack_rows(int32_t type, const uint32_t* packed, int64_t inputs, const int64_t* index, int64_t count, void* out) {
    if (type) return unpack_rows(packed, inputs, index, count, static_cast<BFloat16*>(out));
    unpack_rows(packed, inputs, index, count, static_cast<float*>(out));
}

void baton_linear(BatonPool* pool, int32_t type, const void* x, int64_t tokens, const uint32_t* packed, int64_t inputs,
                  int64_t outputs, const void* bias, void* out) {
    if (type) {
        using T = BFloat16;
        return linear<T>(*pool, {static_cast<const T*>(x), packed, inputs, pool->streamed}, tokens, outputs, static_cast<const T*>(bias), static_cast<T*>(out));
    }
    using T = float;
    linear<T>(*pool, {static_cast<const T*>(x), packed, inputs, pool->streamed}, tokens, outputs, static_cast<const T*>(bias), static_cast<T*>(out));
}

void baton_gated_linear(BatonPool* pool, int32_t type, int32_t activation, const void* x, int64_t tokens, const uint32_t* packed,
                        int64_t inputs, int64_t inner, const void* bias, void* out) {
    if (type) {
        using T = BFloat16;
        return gated_linear<T>(*pool, {static_cast<const T*>(x), packed, inputs, pool->streamed}, activation, tokens, inner,
                               static_cast<const T*>(bias), static_cast<T*>(out));
    }
    using T = float;
    gated_linear<T>(*pool, {static_cast<const T*>(x), packed, inputs, pool->streamed}, activation, tokens, inner, static_cast<const T*>(bias),
                    static_cast<T*>(out));
}
