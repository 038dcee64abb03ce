// 16-bit elements eight at a time, as floats; what a row kernel computes in.
#pragma once
#include "primitives.cuh"

constexpr bool bfloat = BFLOAT;  // elements are bfloat16, otherwise float16

DEVICE void widen(float& low, float& high, u32 pair) {
    low = bfloat ? low_bfloat(pair) : low_half(pair);
    high = bfloat ? high_bfloat(pair) : high_half(pair);
}
DEVICE void widen(float (&x)[4], uint2 v) {
    widen(x[0], x[1], v.x);
    widen(x[2], x[3], v.y);
}
DEVICE void widen(float (&x)[8], uint4 v) {
    widen(x[0], x[1], v.x);
    widen(x[2], x[3], v.y);
    widen(x[4], x[5], v.z);
    widen(x[6], x[7], v.w);
}
DEVICE uint2 narrow(const float (&x)[4]) { return {pack<bfloat>(x[0], x[1]), pack<bfloat>(x[2], x[3])}; }
DEVICE uint4 narrow(const float (&x)[8]) {
    return {pack<bfloat>(x[0], x[1]), pack<bfloat>(x[2], x[3]), pack<bfloat>(x[4], x[5]), pack<bfloat>(x[6], x[7])};
}
DEVICE float multiply_exactly(float a, float b) { return __fmul_rn(a, b); }  // never contracted with a sum
