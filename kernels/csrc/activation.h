// What a gated layer does to its gates.

#pragma once

#include "vector.h"

namespace baton {

// x * sigmoid(y)
inline f32x16 times_sigmoid(f32x16 x, f32x16 y) { return x / (1.0f + exponential(y < -80.0f ? splat(80.0f) : -y)); }

inline f32x16 silu(f32x16 x) { return times_sigmoid(x, x); }

// gelu(x) = x / 2 * (1 + tanh(y)) = x * sigmoid(2y), y = sqrt(2 / pi) * (x + 0.044715 x^3) (Hendrycks and Gimpel 2016)
inline f32x16 gelu(f32x16 x) { return times_sigmoid(x, 1.59576912160573f * (x + 0.044715f * x * x * x)); }

// `activation` 0 is silu, 1 is gelu.
inline f32x16 activate(int activation, f32x16 x) { return activation ? gelu(x) : silu(x); }

}  // namespace baton
