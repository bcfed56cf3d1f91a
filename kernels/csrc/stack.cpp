// Decoder layers one after the other in a single call: what Python would do between the kernels costs as much as a small kernel.

#include "native.h"

namespace {

void multiply(const BatonStep& step, const BatonWeight& weight, const void* x, int64_t tokens, void* out) {
    baton_linear(step.pool, step.type, x, tokens, weight.packed, weight.inputs, weight.outputs, weight.bias, out);
}

void attend(const BatonStep& step, const BatonDecoderLayer& layer, int64_t index, const BatonTurn* turns, void* qkv, void* out) {
    BatonLayer at = {};
    at.layer = index, at.heads = layer.heads, at.window = layer.window, at.scale = layer.scale, at.softcap = layer.softcap;
    at.qkv = qkv, at.out = out, at.cosine = turns[layer.turn].cosine, at.sine = turns[layer.turn].sine;
    baton_attention(&step, &at);
}

}  // namespace

void baton_stack(const BatonStack* stack, const BatonStep* step, const BatonTurn* turns, const BatonBuffers* to) {
    const int64_t tokens = to->tokens, size = stack->size;
    for (int64_t index = 0; index < stack->num_layers; ++index) {
        const BatonDecoderLayer& layer = stack->layers[index];
        multiply(*step, layer.qkv, to->normed, tokens, to->qkv);
        if (layer.query_norm)
            baton_head_norms(step->pool, step->type, to->qkv, tokens, layer.heads, step->kv_heads, step->head_dim,
                             layer.query_norm, layer.key_norm, stack->eps);
        attend(*step, layer, index, turns, to->qkv, to->mixed);
        // A row of `normed` is read as the sum's second half before it is written as its norm.
        multiply(*step, layer.output, to->mixed, tokens, to->normed);
        baton_rms_norm(step->pool, step->type, to->x, size, to->normed, layer.mlp_norm, stack->eps, tokens, size, to->x, to->normed);
        baton_gated_linear(step->pool, step->type, layer.activation, to->normed, tokens, layer.gate_up.packed,
                           layer.gate_up.inputs, layer.gate_up.outputs / 2, layer.gate_up.bias, to->inner);
        multiply(*step, layer.down, to->inner, tokens, to->normed);
        baton_rms_norm(step->pool, step->type, to->x, size, to->normed, layer.next_norm, stack->eps, tokens, size, to->x, to->normed);
    }
}
