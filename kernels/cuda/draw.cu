// Tokens drawn on the device by the rule of kernels/draw.h, so that a step ends with a few ids instead of
// rows of logits.
//
// DESIGN. A block has a row. It finds the peak; then each question (top_k, top_p, the draw itself) goes
// down a place's bits, most significant first: all tokens whose place begins with the bits found so
// far are counted into 256 bins by their next bits, in shared memory; a scan over the bins tells
// which one holds the threshold. Seven passes a question over a row that lies in the caches. Sums are
// integers: their order does not matter, and the result is the host's.
#include "kernels/cuda/cuda_internal.cuh"

enum { THREADS = 512, WARPS = THREADS / WARP };

// One row as its block sees it.
struct draw_row {
    const float *logits;
    int vocabulary;
    float peak, inverse_temperature, min_p;
};

// What a block keeps in shared memory. Index 0: tokens, 1: their mass.
struct draw_shared {
    shared<uint64_t> bins[2];   // [DRAW_BINS]
    shared<uint64_t> scan[2];   // [DRAW_BINS]
    shared<uint64_t> before[2]; // [1] before the bin that was found
    shared<uint64_t> found;     // [1] the bin
    shared<float> warps;        // [2][WARPS]
};

enum { SHARED_BYTES = (4 * DRAW_BINS + 3) * 8 + 2 * WARPS * 4 };

__device__ static inline draw_shared shared_carve() {
    shared<uint64_t> at = dynamic_shared<uint64_t>();
    draw_shared s;
    for (int i = 0; i < 2; i++) {
        s.bins[i] = at + i * DRAW_BINS;
        s.scan[i] = at + (2 + i) * DRAW_BINS;
        s.before[i] = at + 4 * DRAW_BINS + i;
    }
    s.found = at + 4 * DRAW_BINS + 2;
    s.warps = shared_as<float>(at + 4 * DRAW_BINS + 3);
    return s;
}

// The largest logit and the lowest id that has it, by all threads; NaN counts as -inf. An id is exact
// in a float.
__device__ static inline void row_peak(const draw_row &row, const draw_shared &s, float *peak,
                                       int32_t *id) {
    float best = -INFINITY, at = 0.0f;
    for (int i = threadIdx.x; i < row.vocabulary; i += THREADS)
        if (row.logits[i] > best) {
            best = row.logits[i];
            at = (float)i;
        }
    for (int bits = WARP / 2; bits > 0; bits /= 2) {
        float other = warp_exchange(best, bits), other_at = warp_exchange(at, bits);
        if (other > best || (other == best && other_at < at)) {
            best = other;
            at = other_at;
        }
    }
    if (threadIdx.x % WARP == 0) {
        s.warps[threadIdx.x / WARP] = best;
        s.warps[WARPS + threadIdx.x / WARP] = at;
    }
    __syncthreads();
    best = s.warps[0];
    at = s.warps[WARPS];
    for (int w = 1; w < WARPS; w++) {
        float other = s.warps[w], other_at = s.warps[WARPS + w];
        if (other > best || (other == best && other_at < at)) {
            best = other;
            at = other_at;
        }
    }
    *peak = best;
    *id = best > -INFINITY ? (int32_t)at : 0;
}

// The bins of all tokens whose places, without their last `above` bits, are `place`: by the bits above
// the last `shift`.
__device__ static inline void bins_fill(const draw_row &row, const draw_shared &s, uint64_t place,
                                        int above, int shift) {
    for (int i = threadIdx.x; i < DRAW_BINS; i += THREADS) s.bins[0][i] = s.bins[1][i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < row.vocabulary; i += THREADS) {
        int32_t depth = draw_depth(row.logits[i], row.peak, row.inverse_temperature);
        uint64_t at = draw_place(depth, i);
        if (depth < 0 || at >> above != place) continue;
        uint64_t mass = draw_mass(draw_weight(depth, row.min_p));
        unsigned bin = (unsigned)(at >> shift) & ((1u << (above - shift)) - 1);
        if (mass == 0) continue;
        shared_add(s.bins[0] + bin, (uint64_t)1);
        shared_add(s.bins[1] + bin, mass);
    }
    __syncthreads();
}

// Sums of bins up to each, itself included (Hillis and Steele).
__device__ static inline void bins_scan(const draw_shared &s) {
    int i = threadIdx.x;
    for (int kind = 0; kind < 2; kind++)
        if (i < DRAW_BINS) s.scan[kind][i] = s.bins[kind][i];
    __syncthreads();
    for (int step = 1; step < DRAW_BINS; step *= 2) {
        uint64_t more[2] = {0, 0};
        for (int kind = 0; kind < 2; kind++)
            if (i < DRAW_BINS && i >= step) more[kind] = s.scan[kind][i - step];
        __syncthreads();
        for (int kind = 0; kind < 2; kind++)
            if (i < DRAW_BINS) s.scan[kind][i] += more[kind];
        __syncthreads();
    }
}

// The first place at which the sum of counts (kind 0) or masses (1), itself included, exceeds the
// threshold; *mass: that of all places up to it.
__device__ static inline uint64_t place_find(const draw_row &row, const draw_shared &s, int kind,
                                             uint64_t threshold, uint64_t *mass) {
    uint64_t place = 0, before[2] = {0, 0};
    int above = DRAW_FIRST_SHIFT + 8;
    while (above > 0) {
        int shift = above == DRAW_FIRST_SHIFT + 8 ? DRAW_FIRST_SHIFT : draw_next_shift(above);
        bins_fill(row, s, place, above, shift);
        bins_scan(s);
        int i = threadIdx.x;
        if (i < DRAW_BINS) {
            uint64_t end = before[kind] + s.scan[kind][i];
            uint64_t begin = end - s.bins[kind][i];
            if (begin <= threshold && threshold < end) { // one bin at most
                s.found[0] = (uint64_t)i;
                for (int k = 0; k < 2; k++)
                    s.before[k][0] = before[k] + s.scan[k][i] - s.bins[k][i];
            }
        }
        __syncthreads();
        place = place << (above - shift) | s.found[0];
        for (int k = 0; k < 2; k++) before[k] = s.before[k][0];
        *mass = before[1] + s.bins[1][s.found[0]];
        __syncthreads(); // before the next pass overwrites them
        above = shift;
    }
    return place;
}

// Sums of all tokens that can be drawn.
__device__ static inline void row_totals(const draw_row &row, const draw_shared &s,
                                         uint64_t totals[2]) {
    bins_fill(row, s, 0, DRAW_FIRST_SHIFT + 8, DRAW_FIRST_SHIFT);
    bins_scan(s);
    for (int kind = 0; kind < 2; kind++) totals[kind] = s.scan[kind][DRAW_BINS - 1];
    __syncthreads();
}

// Grid (rows).
__global__ void __launch_bounds__(THREADS)
    draw_kernel(int32_t *ids, const float *logits, const struct draw *draws, int vocabulary) {
    const struct draw *draw = &draws[blockIdx.x];
    if (draw->kind == DRAW_NONE) return;
    draw_shared s = shared_carve();
    draw_row row = {logits + (size_t)blockIdx.x * (size_t)vocabulary, vocabulary, 0.0f,
                    draw->inverse_temperature, draw->min_p};
    int32_t token;
    row_peak(row, s, &row.peak, &token);
    if (draw->kind == DRAW_RANDOM && isfinite(row.peak)) {
        uint64_t totals[2], total;
        row_totals(row, s, totals);
        total = totals[1];
        if (draw->top_k > 0 && (uint64_t)draw->top_k < totals[0])
            place_find(row, s, 0, (uint64_t)draw->top_k - 1, &total);
        if (draw->top_p < 1) {
            uint64_t reaches = draw_threshold(total, (double)draw->top_p);
            place_find(row, s, 1, reaches > 0 ? reaches - 1 : 0, &total);
        }
        uint64_t place = place_find(row, s, 1, draw_threshold(total, draw->uniform), &total);
        token = (int32_t)(place & ((1u << DRAW_ID_BITS) - 1));
    }
    if (threadIdx.x == 0) ids[blockIdx.x] = token;
}

void cuda_draw(struct backend *b, int32_t *ids, const void *logits, const struct draw *draws,
               int count, int vocabulary) {
    if (count == 0) return;
    VERIFY_OP(vocabulary, <=, 1 << DRAW_ID_BITS);
    struct step wanted = {};
    wanted.draws = draws;
    wanted.logit_count = count;
    CUDA_LAUNCH(draw_kernel, dim3((unsigned)count), dim3(THREADS), SHARED_BYTES, b->stream, ids,
                (const float *)logits, cuda_step(b, &wanted)->draws, vocabulary);
}
