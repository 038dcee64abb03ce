// What a gate makes of a sum before it is multiplied with the one of `up`.
#pragma once
#include "primitives.cuh"

constexpr bool gated = GATED != 0, gelu = GATED == 2;  // tanh form; otherwise SiLU

constexpr float log2_e = 1.4426950408889634f;
DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-log2_e * x)); }
// 0.5 * (1 + tanh(u)) = sigmoid(2 u)
DEVICE float activate(float x) {
    if constexpr (gelu) return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    return x * sigmoid(x);
}
