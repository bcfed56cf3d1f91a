// Linear layers over packed weights.

#include <algorithm>

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

template <class T>
void linear(Pool& pool, const T* x, long tokens, const uint32_t* packed, long inputs, long outputs, const T* bias, T* out) {
    const long words = inputs / kPerWord<T>, panels = num_panels(outputs);
    const long tiles = (tokens + kMaxRows - 1) / kMaxRows;
    // Few and contiguous runs of panels where weights are streamed, single panels where the work is long.
    const long runs = tokens > 64 ? panels : std::min<long>(panels, 4L * pool.num_threads());
    pool.run(runs, [&](long run) {
        for (long panel = panels * run / runs; panel < panels * (run + 1) / runs; ++panel) {
            const long first = panel * kPanel, width = std::min<long>(kPanel, outputs - first);
            for (long tile = 0; tile < tiles; ++tile) {
                const long begin = tokens * tile / tiles, rows = tokens * (tile + 1) / tiles - begin;
                float sums[kMaxRows][kPanel];
                multiply_tile<T>(static_cast<int>(rows), packed + panel * words * kPanel,
                                 reinterpret_cast<const uint32_t*>(x + begin * inputs), words, words, sums[0], kPanel, false);
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
            }
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
    if (type)
        return linear(*pool, static_cast<const BFloat16*>(x), tokens, packed, inputs, outputs, static_cast<const BFloat16*>(bias),
                      static_cast<BFloat16*>(out));
    linear(*pool, static_cast<const float*>(x), tokens, packed, inputs, outputs, static_cast<const float*>(bias),
           static_cast<float*>(out));
}
