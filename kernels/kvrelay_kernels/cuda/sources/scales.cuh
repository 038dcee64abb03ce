// Scales as blocks hold them (quant/scales.py): a float16, or a byte with an exponent (e8m0) or a small float (e4m3).
// What is NaN or infinite stays visible: it comes back as NaN or infinity.
#pragma once
#include "levels.cuh"

enum class Scales { float16, e8m0, e4m3 };  // in the order of cuda/format_constants.py

template <Scales kind>
struct StoredScale {
    using type = u8;
};
template <>
struct StoredScale<Scales::float16> {
    using type = u16;
};

// A size that is not negative, as it is stored.
template <Scales kind>
DEVICE u32 encode_scale(float size) {
    const bool finite = size < infinity();
    if constexpr (kind == Scales::float16) {
        return pack<false>(size, 0) & 0xffffu;
    } else if constexpr (kind == Scales::e4m3) {
        return finite ? encode_e4m3(size) : 0x7fu;
    } else {
        // The next power of two, so that nothing is cut off; a group of zeros has the scale 1.
        const u32 exponent = __float_as_uint(size) + 0x7fffffu >> 23;
        return size == 0 ? 127u : finite ? exponent : 255u;
    }
}

template <Scales kind>
DEVICE float decode_scale(u32 stored) {
    if constexpr (kind == Scales::float16) {
        return from_half(stored);
    } else if constexpr (kind == Scales::e4m3) {
        return stored == 0x7fu ? not_a_number() : from_half(e4m3_halves(stored) & 0xffffu) * e4m3_units;
    } else {
        const float size = __uint_as_float(stored ? stored << 23 : 0x00400000u);  // 2^-127 is subnormal
        return stored == 255u ? not_a_number() : size;
    }
}
