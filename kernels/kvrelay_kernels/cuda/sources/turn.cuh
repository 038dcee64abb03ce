// Rings of places in shared memory, which some threads fill and others empty.
#pragma once
#include "primitives.cuh"

// A place in a ring and how often it came round.
template <int size>
struct Turn {
    int at = 0;
    u32 phase = 0;
    DEVICE void next() {
        if (++at == size) at = 0, phase ^= 1;
    }
};
