// Norms and gated activations: one pass over the rows, float32 inside.

#include <algorithm>

#include "activation.h"
#include "native.h"
#include "pool.h"
#include "vector.h"

namespace baton {
namespace {

constexpr long kGrain = 1 << 14;  // elements of a task: smaller ones cost more to share than to do

// Calls run(begin, end) over ranges of rows.
template <class Run>
void share_rows(Pool& pool, long rows, long row_size, const Run& run) {
    const long tasks = std::clamp<long>(rows * row_size / kGrain, 1, std::min<long>(rows, 4L * pool.num_threads()));
    pool.run(tasks, [&](long task) { run(rows * task / tasks, rows * (task + 1) / tasks); });
}

template <class T>
f32x16 widen_at(const T* from, long left) {
    return left >= 16 ? widen16(from) : widen_some(from, static_cast<int>(left));
}

template <class T>
void narrow_at(f32x16 x, T* to, long left) {
    if (left >= 16) return narrow16(x, to);
    narrow_some(x, to, static_cast<int>(left));
}

template <class T>
void rms_norm(Pool& pool, const T* x, long x_stride, const T* delta, const T* weight, float eps, long tokens, long size, T* total, T* out) {
    share_rows(pool, tokens, size, [&](long begin, long end) {
        for (long t = begin; t < end; ++t) {
            const T* from = x + t * x_stride;
            f32x16 squares = {};
            for (long i = 0; i < size; i += 16) {
                f32x16 value = widen_at(from + i, size - i);
                if (delta) {
                    narrow_at(value + widen_at(delta + t * size + i, size - i), total + t * size + i, size - i);
                    value = widen_at(total + t * size + i, size - i);
                }
                squares += value * value;
            }
            if (delta) from = total + t * size;
            const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
            for (long i = 0; i < size; i += 16)
                narrow_at(widen_at(from + i, size - i) * inverse * widen_at(weight + i, size - i), out + t * size + i, size - i);
        }
    });
}

template <class T>
void head_norms(Pool& pool, T* qkv, long tokens, long heads, long kv_heads, long head_dim, const T* query_norm, const T* key_norm, float eps) {
    const long row = (heads + 2 * kv_heads) * head_dim;
    share_rows(pool, tokens, row, [&](long begin, long end) {
        for (long t = begin; t < end; ++t)
            for (long head = 0; head < heads + kv_heads; ++head) {
                T* at = qkv + t * row + head * head_dim;
                const T* weight = head < heads ? query_norm : key_norm;
                f32x16 squares = {};
                for (long i = 0; i < head_dim; i += 16) {
                    f32x16 value = widen_at(at + i, head_dim - i);
                    squares += value * value;
                }
                const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(head_dim) + eps);
                for (long i = 0; i < head_dim; i += 16)
                    narrow_at(widen_at(at + i, head_dim - i) * inverse * widen_at(weight + i, head_dim - i), at + i, head_dim - i);
            }
    });
}

template <class T>
void gated(Pool& pool, int activation, const T* gate_up, long tokens, long inner, T* out) {
    share_rows(pool, tokens, 2 * inner, [&](long begin, long end) {
        for (long t = begin; t < end; ++t) {
            const T *gate = gate_up + t * 2 * inner, *up = gate + inner;
            for (long i = 0; i < inner; i += 16) {
                f32x16 g = activate(activation, widen_at(gate + i, inner - i));
                narrow_at(g * widen_at(up + i, inner - i), out + t * inner + i, inner - i);
            }
        }
    });
}

}  // namespace
}  // namespace baton

using namespace baton;

void baton_rms_norm(BatonPool* pool, int32_t type, const void* x, int64_t x_stride, const void* delta, const void* weight,
                    float eps, int64_t tokens, int64_t size, void* total, void* out) {
    if (type) {
        using T = BFloat16;
        return rms_norm(*pool, static_cast<const T*>(x), x_stride, static_cast<const T*>(delta), static_cast<const T*>(weight),
                        eps, tokens, size, static_cast<T*>(total), static_cast<T*>(out));
    }
    using T = float;
    rms_norm(*pool, static_cast<const T*>(x), x_stride, static_cast<const T*>(delta), static_cast<const T*>(weight), eps,
             tokens, size, static_cast<T*>(total), static_cast<T*>(out));
}

void baton_head_norms(BatonPool* pool, int32_t type, void* qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                      const void* query_norm, const void* key_norm, float eps) {
    if (type) {
        using T = BFloat16;
        return head_norms(*pool, static_cast<T*>(qkv), tokens, heads, kv_heads, head_dim, static_cast<const T*>(query_norm),
                          static_cast<const T*>(key_norm), eps);
    }
    using T = float;
    head_norms(*pool, static_cast<T*>(qkv), tokens, heads, kv_heads, head_dim, static_cast<const T*>(query_norm),
               static_cast<const T*>(key_norm), eps);
}

void baton_gated(BatonPool* pool, int32_t type, int32_t activation, const void* gate_up, int64_t tokens, int64_t inner, void* out) {
    if (type) return gated(*pool, activation, static_cast<const BFloat16*>(gate_up), tokens, inner, static_cast<BFloat16*>(out));
    gated(*pool, activation, static_cast<const float*>(gate_up), tokens, inner, static_cast<float*>(out));
}
