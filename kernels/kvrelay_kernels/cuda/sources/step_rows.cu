// What the host tells of a decode step's rows, carried as this kernel's own parameters -> the arrays that the step's
// kernels read.
//
// It runs ahead of a step's graph, not in it: so the graph's kernels may read what it writes before their own wait.
#include "primitives.cuh"

constexpr int block_tokens = 64;

// As `StepRows` in cuda/step_rows.py packs it. A token below 0 is the newest one at the place: ids have ~place then.
struct Row { int token, position, place; };
struct Told { Row rows[ROWS]; };

// Rows `first` and on, one a thread; tables: [rows, width]. A row at position -1 is nobody's: no slot and no keys.
extern "C" __global__ void __launch_bounds__(ROWS)
step_rows(const __grid_constant__ Told told, int first, int rows, const int* tables, int width, int answer, int* ids,
          int* positions, int* slots, int* lengths, int* places, int* answers) {
    const int row = first + threadIdx.x;
    if (row == 0) *answers = answer;
    if (row >= rows) return;
    const auto [token, told_position, place] = told.rows[threadIdx.x];
    const int position = max(told_position, 0);
    ids[row] = token < 0 ? ~place : token;
    positions[row] = position, lengths[row] = told_position + 1, places[row] = place;
    slots[row] = told_position < 0 ? -1 : tables[row * width + position / block_tokens] * block_tokens + position % block_tokens;
}
