// The plain C interface of the native kernels: what kernels/native.py calls. No type of torch or Python passes here.
//
// Every pointer is to memory that the caller owns. `type` is 0 for float32 and 1 for bfloat16 and holds for all
// tensors of a call unless said otherwise. T tokens, E hidden size, H query heads, K KV heads, D head dimension.

#pragma once

#include <cstdint>

extern "C" {

struct BatonPool;

// What the library was built for: 0 plain code, 1 AVX-512, 2 AVX-512 with bfloat16 dot products.
int32_t baton_features();

BatonPool* baton_pool_create(int32_t num_threads);
void baton_pool_destroy(BatonPool* pool);
// From now on the weights that this pool multiplies with are too large, all together, to stay in a cache between two steps.
void baton_pool_stream(BatonPool* pool);

// Words of 32 bits that the packed form of a weight [outputs, inputs] takes; 0 when it cannot be packed.
int64_t baton_packed_words(int32_t type, int64_t outputs, int64_t inputs);
void baton_pack(int32_t type, const void* weight, int64_t outputs, int64_t inputs, uint32_t* packed);
// out[i] = row index[i] of the weight that was packed.
void baton_unpack_rows(int32_t type, const uint32_t* packed, int64_t inputs, const int64_t* index, int64_t count, void* out);
// out [T, outputs] = x [T, inputs] times the weight, plus bias [outputs] unless it is null.
void baton_linear(BatonPool* pool, int32_t type, const void* x, int64_t tokens, const uint32_t* packed, int64_t inputs,
                  int64_t outputs, const void* bias, void* out);
// The same for a weight [2F, inputs] whose first half makes gates: out [T, F] = activation(gates) * the others, each
// rounded to the type first. F must be a multiple of 64; activation 0 is silu, 1 is gelu (tanh).
void baton_gated_linear(BatonPool* pool, int32_t type, int32_t activation, const void* x, int64_t tokens, const uint32_t* packed,
                        int64_t inputs, int64_t inner, const void* bias, void* out);

// total = x + delta (where delta is not null), out = total / rms(total) * weight; x, delta, total, out [T, E].
// `x_stride` is the number of elements from one row of x to the next.
void baton_rms_norm(BatonPool* pool, int32_t type, const void* x, int64_t x_stride, const void* delta, const void* weight,
                    float eps, int64_t tokens, int64_t size, void* total, void* out);
// Norms each query head and each key head of qkv [T, H + 2K, D] alone, in place; query_norm, key_norm [D].
void baton_head_norms(BatonPool* pool, int32_t type, void* qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                      const void* query_norm, const void* key_norm, float eps);
// out [T, F] = activation(first half of the row) * second half; gate_up [T, 2F].
void baton_gated(BatonPool* pool, int32_t type, int32_t activation, const void* gate_up, int64_t tokens, int64_t inner, void* out);

// One row of a step. `packed` is -1 for a row that is attended in place, or where in `scratch` its keys and values go.
struct BatonRow {
    int64_t offset, num_tokens, start, table, packed;
};

struct BatonStep {
    BatonPool* pool;
    void* kv;  // [N, L, 2, K, S, D]
    const BatonRow* rows;
    const int32_t* tables;  // block tables one after the other; BatonRow.table is where a row's begins
    uint32_t* scratch;
    int64_t num_rows, num_layers, kv_heads, block_size, head_dim;
    int32_t type;
};

struct BatonLayer {
    int64_t layer, heads;
    void* qkv;                   // [T, H + 2K, D]; queries are rotated in place
    const void *cosine, *sine;  // [T, D / 2], or null
    void* out;                   // [T, H * D]
    int64_t window;              // 0 for none
    float scale, softcap;        // softcap 0 for none
};

// Words of scratch that a packed row takes whose cache holds `context` tokens after the step.
int64_t baton_packed_row_words(int32_t type, int64_t context, int64_t kv_heads, int64_t head_dim);
void baton_attention(const BatonStep* step, const BatonLayer* layer);

// A packed linear.
struct BatonWeight {
    const uint32_t* packed;
    const void* bias;  // null for none
    int64_t inputs, outputs;
};

// Attention and a gated MLP, each behind a norm. `turn` is which of the step's rotary tables it uses.
struct BatonDecoderLayer {
    BatonWeight qkv, output, gate_up, down;  // gate_up: outputs / 2 must be a multiple of 64
    const void *query_norm, *key_norm;       // [D], or null
    const void *mlp_norm, *next_norm;        // [E]: before the MLP, and before what follows this layer
    int64_t heads, window;
    float scale, softcap;
    int32_t turn, activation;
};

// Layers 0 .. num_layers - 1 of a model.
struct BatonStack {
    const BatonDecoderLayer* layers;
    int64_t num_layers, size;
    float eps;
};

struct BatonTurn {
    const void *cosine, *sine;  // [T, D / 2], or null
};

// x [T, E] and its norm by the first layer's attention norm come in; the last layer's x and its norm by `next_norm` come out.
struct BatonBuffers {
    void *x, *normed;          // [T, E]
    void *qkv, *mixed, *inner;  // [T, H + 2K, D], [T, H * D], [T, F], for the largest of the layers
    int64_t tokens;
};

void baton_stack(const BatonStack* stack, const BatonStep* step, const BatonTurn* turns, const BatonBuffers* to);

// tokens[i] = the lowest index of the largest of logits[i], [count, vocabulary]; 0 where there is none but NaN.
void baton_argmax(BatonPool* pool, int32_t type, const void* logits, int64_t count, int64_t vocabulary, int64_t* tokens);

// How one row of logits becomes a token; see kernels/batch.py, `DrawSpec`.
struct BatonDraw {
    int64_t seed, sequence_index, output_index, top_k;
    float temperature, top_p, min_p;
};

// tokens[i] is drawn from logits[i], float32 [count, vocabulary]; a token at -inf is impossible.
void baton_draw(BatonPool* pool, const float* logits, int64_t count, int64_t vocabulary, const BatonDraw* how, int64_t* tokens);
}
