// Attention over the paged KV cache in place: nothing is gathered for decode, nothing is padded, no mask is read.
//
// A row is one of two kinds:
// - attended in place: one query token. A task is (row, KV head): its G query heads share every key that is loaded.
// - packed: the keys and values of each KV head are first laid out as the panels of matmul.h, then tiles of queries
//   are multiplied with them. The result of a query then depends on nothing but its own position and cache, neither
//   on the chunk it came in nor on its neighbours: that is what deterministic serving builds on.
//
// Scores, softmax and sums are float32. Keys and values beyond a query's last position are never used, whatever they
// hold: an earlier owner or a transfer may have left NaN there.

#include <algorithm>
#include <limits>
#include <vector>

#include "matmul.h"
#include "native.h"
#include "pool.h"

namespace baton {
namespace {

constexpr long kQueryTile = 32;  // query tokens of a task
constexpr long kAhead = 32;      // positions between those that are scored and those that are fetched
constexpr float kNever = -std::numeric_limits<float>::infinity();

long padded(long count, long to) { return (count + to - 1) / to * to; }

// Where the KV of one row and one KV head of a layer lies.
template <class T>
struct Cache {
    T* base;  // keys of slot 0 of block 0
    const int32_t* table;
    long block_stride, value_offset, block_size, head_dim;
    long next_head;  // from keys of this head to those of the head after it, 0 if it is the last

    T* key(long position) const {
        return base + table[position / block_size] * block_stride + position % block_size * head_dim;
    }
    T* value(long position) const { return key(position) + value_offset; }
};

template <class T>
Cache<T> cache_of(const BatonStep& step, const BatonRow& row, long layer, long kv_head) {
    const long run = step.block_size * step.head_dim, plane = step.kv_heads * run;
    T* base = static_cast<T*>(step.kv) + layer * 2 * plane + kv_head * run;
    return {base, step.tables + row.table, step.num_layers * 2 * plane, plane, step.block_size, step.head_dim, kv_head + 1 < step.kv_heads ? run : 0};
}

// The first token of the context that a query at `position` sees.
long first_visible(const BatonLayer& layer, long position) {
    return layer.window > 0 ? std::max<long>(0, position + 1 - layer.window) : 0;
}

// Dimension i is paired with i + D / 2 (the half-split order of the Hugging Face models).
template <class T>
void rotate(const T* from, const T* cosine, const T* sine, long head_dim, T* to) {
    const long half = head_dim / 2;
    if (half % 16 == 0) {
        for (long i = 0; i < half; i += 16) {
            f32x16 low = widen16(from + i), high = widen16(from + half + i), c = widen16(cosine + i), s = widen16(sine + i);
            narrow16(low * c - high * s, to + i);
            narrow16(high * c + low * s, to + half + i);
        }
        return;
    }
    for (long i = 0; i < half; i += 16) {
        const int count = static_cast<int>(std::min<long>(16, half - i));
        f32x16 low = widen_some(from + i, count), high = widen_some(from + half + i, count);
        f32x16 c = widen_some(cosine + i, count), s = widen_some(sine + i, count);
        narrow_some(low * c - high * s, to + i, count);
        narrow_some(high * c + low * s, to + half + i, count);
    }
}

// Rotates the queries and keys that belong to a KV head and stores its keys and values.
template <class T>
void write(const BatonStep& step, const BatonLayer& layer, const BatonRow& row, const Cache<T>& cache, long kv_head) {
    const long dim = step.head_dim, group = layer.heads / step.kv_heads;
    for (long i = 0; i < row.num_tokens; ++i) {
        const long token = row.offset + i;
        T* heads = static_cast<T*>(layer.qkv) + token * (layer.heads + 2 * step.kv_heads) * dim;
        const T *key = heads + (layer.heads + kv_head) * dim, *value = key + step.kv_heads * dim;
        if (layer.cosine) {
            const T* cosine = static_cast<const T*>(layer.cosine) + token * (dim / 2);
            const T* sine = static_cast<const T*>(layer.sine) + token * (dim / 2);
            for (long g = 0; g < group; ++g) {
                T* query = heads + (kv_head * group + g) * dim;
                rotate(query, cosine, sine, dim, query);
            }
            rotate(key, cosine, sine, dim, cache.key(row.start + i));
        } else {
            std::memcpy(cache.key(row.start + i), key, dim * sizeof(T));
        }
        std::memcpy(cache.value(row.start + i), value, dim * sizeof(T));
    }
}

inline f32x16 adjust(f32x16 scores, const BatonLayer& layer) {
    scores *= layer.scale;
    if (layer.softcap == 0.0f) return scores;
    f32x16 x = scores * (-2.0f / layer.softcap);
    x = x > 80.0f ? splat(80.0f) : x;
    return layer.softcap * (2.0f / (1.0f + exponential(x)) - 1.0f);  // softcap * tanh(scores / softcap)
}

// Scores of positions [from, to), both multiples of 16, become weights exp(s - max) in place, 0 where not in
// [begin, end). Returns the sum of the weights.
float softmax(float* scores, long from, long to, long begin, long end, const BatonLayer& layer) {
    static const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 most = splat(kNever);
    for (long i = from; i < to; i += 16) {
        f32x16 s = adjust(load<f32x16>(scores + i), layer);
        if (i < begin || i + 16 > end) {
            i32x16 position = lanes + static_cast<int32_t>(i);
            i32x16 visible = (position >= static_cast<int32_t>(begin)) & (position < static_cast<int32_t>(end));
            s = visible ? s : splat(kNever);
        }
        store(scores + i, s);
        most = maximum(most, s);
    }
    const float highest = maximum(most);
    f32x16 total = {};
    for (long i = from; i < to; i += 16) {
        f32x16 weight = exponential(load<f32x16>(scores + i) - highest);
        store(scores + i, weight);
        total += weight;
    }
    return sum(total);
}

// ---- packed rows ----

// Panels of keys [context / 64][D words][64] and of values [D / 64][context words][64] of one KV head.
template <class T>
struct Panels {
    uint32_t *keys, *values;
    long context, key_words, value_words, value_panels;

    Panels(uint32_t* at, long num_tokens, long head_dim)
        : context(padded(num_tokens, kPanel)),
          key_words(padded(head_dim, kPerWord<T>) / kPerWord<T>),
          value_words(context / kPerWord<T>),
          value_panels(padded(head_dim, kPanel) / kPanel) {
        keys = at;
        values = at + context * key_words;
    }

    long words() const { return context * key_words + value_panels * kPanel * value_words; }
};

// The word of two (bfloat16) or one (float) values that stand after each other in the context.
inline uint32_t pair(const float* a, const float*, long d) {
    uint32_t word;
    std::memcpy(&word, a + d, sizeof word);
    return word;
}
inline uint32_t pair(const BFloat16* a, const BFloat16* b, long d) {
    return (a ? a[d].bits : 0u) | (b ? static_cast<uint32_t>(b[d].bits) << 16 : 0u);
}

template <class T>
void pack_panels(const Cache<T>& cache, long num_tokens, long from, const Panels<T>& to) {
    const long dim = cache.head_dim;
    for (long position = from; position < to.context; ++position) {
        uint32_t* keys = to.keys + position / kPanel * to.key_words * kPanel + position % kPanel;
        const T* key = position < num_tokens ? cache.key(position) : nullptr;
        for (long w = 0; w < to.key_words; ++w) {
            uint32_t word = 0;
            if (key) std::memcpy(&word, key + w * kPerWord<T>, sizeof word);
            keys[w * kPanel] = word;
        }
    }
    for (long w = from / kPerWord<T>; w < to.value_words; ++w) {
        const long position = w * kPerWord<T>;
        const T* a = position < num_tokens ? cache.value(position) : nullptr;
        const T* b = kPerWord<T> == 2 && position + 1 < num_tokens ? cache.value(position + 1) : nullptr;
        for (long panel = 0; panel < to.value_panels; ++panel) {
            uint32_t* values = to.values + (panel * to.value_words + w) * kPanel;
            const long width = std::min<long>(kPanel, dim - panel * kPanel);
            if (a && (b || kPerWord<T> == 1))
                for (long d = 0; d < width; ++d) values[d] = pair(a, b, panel * kPanel + d);
            else if (a)
                for (long d = 0; d < width; ++d) values[d] = pair(a, static_cast<const T*>(nullptr), panel * kPanel + d);
            else
                std::fill(values, values + width, 0u);
            std::fill(values + width, values + kPanel, 0u);
        }
    }
}

// Attention of up to kMaxRows (query, head) pairs of one KV head. `queries` [rows, padded D]; visible[i] is the
// number of positions up to and with the query's own.
template <class T>
void attend_tile(const BatonStep& step, const BatonLayer& layer, const Panels<T>& panels, int rows, const T* queries,
                 long query_stride, const long* visible, T* const* out, std::vector<float>& buffer) {
    const long end = padded(*std::max_element(visible, visible + rows), kPanel);
    const long begin = first_visible(layer, *std::min_element(visible, visible + rows) - 1) / kPanel * kPanel;
    const long stride = end;
    buffer.resize(2 * kMaxRows * stride);
    float* scores = buffer.data();
    T* weights = reinterpret_cast<T*>(scores + kMaxRows * stride);
    for (long p = begin; p < end; p += kPanel)
        multiply_tile<T>(rows, panels.keys + p * panels.key_words, reinterpret_cast<const uint32_t*>(queries),
                         query_stride / kPerWord<T>, panels.key_words, scores + p, stride, false);
    float totals[kMaxRows];
    for (int i = 0; i < rows; ++i) {
        totals[i] = softmax(scores + i * stride, begin, end, first_visible(layer, visible[i] - 1), visible[i], layer);
        for (long p = begin; p < end; p += 16) narrow16(load<f32x16>(scores + i * stride + p), weights + i * stride + p);
    }
    for (long panel = 0; panel < panels.value_panels; ++panel) {
        float mixed[kMaxRows][kPanel];
        const long skipped = begin / kPerWord<T>;
        multiply_tile<T>(rows, panels.values + (panel * panels.value_words + skipped) * kPanel,
                         reinterpret_cast<const uint32_t*>(weights) + skipped, stride / kPerWord<T>,
                         end / kPerWord<T> - skipped, mixed[0], kPanel, false);
        const long width = std::min<long>(kPanel, step.head_dim - panel * kPanel);
        for (int i = 0; i < rows; ++i)
            for (long d = 0; d < width; d += 16) {
                f32x16 y = load<f32x16>(mixed[i] + d) / totals[i];
                T* to = out[i] + panel * kPanel + d;
                if (width - d >= 16) narrow16(y, to);
                else narrow_some(y, to, static_cast<int>(width - d));
            }
    }
}

template <class T>
void attend_packed(const BatonStep& step, const BatonLayer& layer, const BatonRow& row, long kv_head, long first_query) {
    const long dim = step.head_dim, group = layer.heads / step.kv_heads;
    Panels<T> panels(nullptr, row.start + row.num_tokens, dim);
    panels = Panels<T>(step.scratch + row.packed + kv_head * panels.words(), row.start + row.num_tokens, dim);
    const long num_pairs = std::min(kQueryTile, row.num_tokens - first_query) * group;
    const long width = padded(dim, kPerWord<T>);
    static thread_local std::vector<float> buffer;
    std::vector<T> queries(kMaxRows * width);
    for (long pair = 0; pair < num_pairs; pair += kMaxRows) {
        const int rows = static_cast<int>(std::min<long>(kMaxRows, num_pairs - pair));
        long visible[kMaxRows];
        T* out[kMaxRows];
        for (int i = 0; i < rows; ++i) {
            const long query = first_query + (pair + i) / group, head = kv_head * group + (pair + i) % group;
            const long token = row.offset + query;
            const T* from = static_cast<const T*>(layer.qkv) + (token * (layer.heads + 2 * step.kv_heads) + head) * dim;
            std::memcpy(queries.data() + i * width, from, dim * sizeof(T));
            out[i] = static_cast<T*>(layer.out) + (token * layer.heads + head) * dim;
            visible[i] = row.start + query + 1;
        }
        attend_tile(step, layer, panels, rows, queries.data(), width, visible, out, buffer);
    }
}

// ---- rows attended in place ----

inline u32x16 load_words(const void* from, long count) {
    if (count >= 16) return load<u32x16>(static_cast<const uint32_t*>(from));
    if (count <= 0) return u32x16{};
#ifdef BATON_AVX512
    return (u32x16)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), from);
#else
    u32x16 words = {};
    std::memcpy(&words, from, count * sizeof(uint32_t));
    return words;
#endif
}

#define BATON_SHUFFLE __builtin_shufflevector

// Sums of the lanes of four vectors, four partial sums each: lane 4k + i holds part k of vector i.
inline f32x16 sum_quad(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
    f32x16 ab = BATON_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                BATON_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    f32x16 cd = BATON_SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                BATON_SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    return BATON_SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           BATON_SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// The sums of sixteen vectors, four quads of them, in order.
inline f32x16 sum_quads(const f32x16* quads) {
    f32x16 low = BATON_SHUFFLE(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 BATON_SHUFFLE(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    f32x16 high = BATON_SHUFFLE(quads[2], quads[3], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  BATON_SHUFFLE(quads[2], quads[3], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    return BATON_SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           BATON_SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// Two bfloat16 rows of values as words of pairs. Halves of each 128 bits: `unpair` puts the sums back in order.
inline void interleave(u32x16 a, u32x16 b, u32x16& low, u32x16& high) {
    typedef uint16_t u16x32 __attribute__((vector_size(64)));
    low = (u32x16)BATON_SHUFFLE((u16x32)a, (u16x32)b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49,
                                18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
    high = (u32x16)BATON_SHUFFLE((u16x32)a, (u16x32)b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21,
                                 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
}

inline void unpair(f32x16& low, f32x16& high) {
    f32x16 first = BATON_SHUFFLE(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    f32x16 second = BATON_SHUFFLE(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    low = first;
    high = second;
}

// Steps through the slots of a row's blocks without dividing.
template <class T>
struct Walk {
    const Cache<T>& cache;
    long block, slot;
    const T* at;

    Walk(const Cache<T>& c, long position) : cache(c), block(position / c.block_size), slot(position % c.block_size), at(c.key(position)) {}

    const T* next() {
        const T* here = at;
        at += cache.head_dim;
        if (++slot == cache.block_size) {
            slot = 0;
            ++block;
            at = nullptr;
        }
        return here;
    }
    void enter() {
        if (!at) at = cache.base + cache.table[block] * cache.block_stride;
    }
};

// Asks for the cache lines of a few positions, long before they are used. The hardware's own prefetching ends at each page
// of 4 KiB, which is about what one KV head keeps of a block: without this, decode waits for memory 3/4 of its time.
// Inlined by force: gcc takes a function that only prefetches for one without effect and drops its calls.
template <class T>
__attribute__((always_inline)) inline void prefetch(const Cache<T>& cache, long position, long count, long end, long offset) {
    const long last = std::min(position + count, end);
    while (position < last) {
        const long together = std::min(last - position, cache.block_size - position % cache.block_size);
        const char* at = reinterpret_cast<const char*>(cache.key(position) + offset);
        for (long byte = 0; byte < together * cache.head_dim * static_cast<long>(sizeof(T)); byte += 64) __builtin_prefetch(at + byte, 0, 2);
        position += together;
    }
}

// Adds weights [G][stride] times the values of [begin, end) to sums [G][vectors of the head], in float32.
template <int G, int V>
void mix(const Cache<float>& cache, const float* weights, long stride, long begin, long end, f32x16 (&sums)[G][V]) {
    Walk<float> walk(cache, begin);
    for (long position = begin; position < end; ++position) {
        if (cache.next_head) prefetch(cache, position, 1, end, cache.next_head);
        walk.enter();
        const float* value = walk.next() + cache.value_offset;
        for (int v = 0; v < V; ++v) {
            f32x16 x = (f32x16)load_words(value + 16 * v, cache.head_dim - 16 * v);
            for (int g = 0; g < G; ++g) sums[g][v] += weights[g * stride + position] * x;
        }
    }
}

template <int G, int V>
void mix(const Cache<BFloat16>& cache, const float* weights, long stride, long begin, long end, f32x16 (&sums)[G][2 * V]) {
    Walk<BFloat16> walk(cache, begin);
    for (long position = begin; position < end; position += 2) {
        if (cache.next_head) prefetch(cache, position, 2, end, cache.next_head);
        walk.enter();
        const BFloat16* a = walk.next() + cache.value_offset;
        const bool both = position + 1 < end;
        const BFloat16* b = a;
        if (both) {
            walk.enter();
            b = walk.next() + cache.value_offset;
        }
        u32x16 word[G];
        for (int g = 0; g < G; ++g) {
            f32x16 two = {};
            two[0] = weights[g * stride + position];
            two[1] = both ? weights[g * stride + position + 1] : 0.0f;
            uint32_t bits;
            u16x16 narrow = narrow_bits(two);
            std::memcpy(&bits, &narrow, sizeof bits);
            word[g] = splat(bits);
        }
        for (int v = 0; v < V; ++v) {
            const long left = cache.head_dim / 2 - 16 * v;
            u32x16 x = load_words(a + 32 * v, left), y = both ? load_words(b + 32 * v, left) : u32x16{}, low, high;
            interleave(x, y, low, high);
            for (int g = 0; g < G; ++g) {
                multiply_add<BFloat16>(sums[g][2 * v], low, word[g]);
                multiply_add<BFloat16>(sums[g][2 * v + 1], high, word[g]);
            }
        }
    }
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) unpair(sums[g][2 * v], sums[g][2 * v + 1]);
}

// G query heads that share a KV head, V vectors of words per head: scores, softmax, values.
template <class T, int G, int V>
void attend_heads(const BatonLayer& layer, const Cache<T>& cache, long begin, long end, const T* query, T* out, std::vector<float>& buffer) {
    const long dim = cache.head_dim, words = dim / kPerWord<T>;
    const long from = begin / 16 * 16, to = padded(end, 16), stride = to;
    buffer.resize(G * stride);
    float* scores = buffer.data();
    u32x16 queries[G][V];
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) queries[g][v] = load_words(query + g * dim + v * 16 * kPerWord<T>, words - 16 * v);
    Walk<T> walk(cache, from);
    for (long position = from; position < to; position += 16) {
        f32x16 quads[G][4];
        for (int q = 0; q < 4; ++q) {
            prefetch(cache, position + 4 * q + kAhead, 4, end, 0);
            prefetch(cache, position + 4 * q, 4, end, cache.value_offset);
            f32x16 dots[G][4] = {};
            for (int i = 0; i < 4; ++i) {
                if (position + 4 * q + i >= end) continue;  // its block may not exist
                walk.enter();
                const T* key = walk.next();
                for (int v = 0; v < V; ++v) {
                    u32x16 x = load_words(key + v * 16 * kPerWord<T>, words - 16 * v);
                    for (int g = 0; g < G; ++g) multiply_add<T>(dots[g][i], x, queries[g][v]);
                }
            }
            for (int g = 0; g < G; ++g) quads[g][q] = sum_quad(dots[g][0], dots[g][1], dots[g][2], dots[g][3]);
        }
        for (int g = 0; g < G; ++g) store(scores + g * stride + position, sum_quads(quads[g]));
    }
    float totals[G];
    for (int g = 0; g < G; ++g) totals[g] = softmax(scores + g * stride, from, to, begin, end, layer);
    f32x16 sums[G][V * kPerWord<T>] = {};
    mix<G, V>(cache, scores, stride, begin, end, sums);
    for (int g = 0; g < G; ++g)
        for (long d = 0; d < dim; d += 16) {
            f32x16 y = sums[g][d / 16] / totals[g];
            if (dim - d >= 16) narrow16(y, out + g * dim + d);
            else narrow_some(y, out + g * dim + d, static_cast<int>(dim - d));
        }
}

template <class T, int V>
void attend_group(const BatonLayer& layer, const Cache<T>& cache, long begin, long end, long group, const T* query, T* out) {
    static thread_local std::vector<float> buffer;
    constexpr int kMost = std::max(1, std::min(4, 24 / (V * kPerWord<T>)));  // sums of so many heads stay in registers
    const long dim = cache.head_dim;
    for (long g = 0; g < group;) {
        const long left = group - g;
        if constexpr (kMost >= 4) {
            if (left >= 4) { attend_heads<T, 4, V>(layer, cache, begin, end, query + g * dim, out + g * dim, buffer); g += 4; continue; }
        }
        if constexpr (kMost >= 3) {
            if (left >= 3) { attend_heads<T, 3, V>(layer, cache, begin, end, query + g * dim, out + g * dim, buffer); g += 3; continue; }
        }
        if constexpr (kMost >= 2) {
            if (left >= 2) { attend_heads<T, 2, V>(layer, cache, begin, end, query + g * dim, out + g * dim, buffer); g += 2; continue; }
        }
        attend_heads<T, 1, V>(layer, cache, begin, end, query + g * dim, out + g * dim, buffer);
        ++g;
    }
}

template <class T>
void attend_in_place(const BatonStep& step, const BatonLayer& layer, const BatonRow& row, const Cache<T>& cache, long kv_head) {
    const long dim = step.head_dim, group = layer.heads / step.kv_heads, end = row.start + 1;
    const T* query = static_cast<const T*>(layer.qkv) + (row.offset * (layer.heads + 2 * step.kv_heads) + kv_head * group) * dim;
    T* out = static_cast<T*>(layer.out) + (row.offset * layer.heads + kv_head * group) * dim;
    const long begin = first_visible(layer, row.start), vectors = padded(dim / kPerWord<T>, 16) / 16;
    switch (vectors) {
        case 1: return attend_group<T, 1>(layer, cache, begin, end, group, query, out);
        case 2: return attend_group<T, 2>(layer, cache, begin, end, group, query, out);
        case 3: case 4: return attend_group<T, 4>(layer, cache, begin, end, group, query, out);
        case 5: case 6: case 7: case 8: return attend_group<T, 8>(layer, cache, begin, end, group, query, out);
        default: return attend_group<T, 16>(layer, cache, begin, end, group, query, out);
    }
}

template <class T>
void attention(const BatonStep& step, const BatonLayer& layer) {
    const auto attend = [&](const BatonRow& row, long kv_head) {
        const Cache<T> cache = cache_of<T>(step, row, layer.layer, kv_head);
        write(step, layer, row, cache, kv_head);
        if (row.packed < 0) return attend_in_place(step, layer, row, cache, kv_head);
        const long context = row.start + row.num_tokens;
        Panels<T> panels(nullptr, context, step.head_dim);
        panels = Panels<T>(step.scratch + row.packed + kv_head * panels.words(), context, step.head_dim);
        pack_panels(cache, context, first_visible(layer, row.start) / kPanel * kPanel, panels);
    };
    if (step.num_rows >= 4L * step.pool->num_threads())
        // The heads of a row stay together: while one is worked on, the keys of the next are fetched.
        step.pool->run(step.num_rows, [&](long row) {
            for (long head = 0; head < step.kv_heads; ++head) attend(step.rows[row], head);
        });
    else
        step.pool->run(step.num_rows * step.kv_heads,
                       [&](long task) { attend(step.rows[task / step.kv_heads], task % step.kv_heads); });
    struct Tile {
        long row, kv_head, first_query;
    };
    std::vector<Tile> tiles;
    for (long r = 0; r < step.num_rows; ++r)
        if (step.rows[r].packed >= 0)
            // The last queries see most: they go first, so that the threads end together.
            for (long first = (step.rows[r].num_tokens - 1) / kQueryTile * kQueryTile; first >= 0; first -= kQueryTile)
                for (long head = 0; head < step.kv_heads; ++head) tiles.push_back({r, head, first});
    step.pool->run(static_cast<long>(tiles.size()), [&](long i) {
        attend_packed<T>(step, layer, step.rows[tiles[i].row], tiles[i].kv_head, tiles[i].first_query);
    });
}

}  // namespace
}  // namespace baton

using namespace baton;

int64_t baton_packed_row_words(int32_t type, int64_t context, int64_t kv_heads, int64_t head_dim) {
    return kv_heads * (type ? Panels<BFloat16>(nullptr, context, head_dim).words() : Panels<float>(nullptr, context, head_dim).words());
}

void baton_attention(const BatonStep* step, const BatonLayer* layer) {
    if (step->type) return attention<BFloat16>(*step, *layer);
    attention<float>(*step, *layer);
}
