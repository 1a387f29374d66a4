// LoRA's inner kernels, included by cpu_kernels_body.h: dot products of A's rows with x, and updates
// of y by B's panels. Both are read where they lie, from end to end, so nothing is transposed on the
// way; while one piece is multiplied the next is asked for.
//
// A dot product is VECTOR_WIDTH sums over every VECTOR_WIDTH-th word, added up at the end in one
// order; an update runs over ascending ranks. Neither depends on how many tokens go together.

enum { DOT_SUMS = DOT_ROWS * DOT_TOKENS_MAX };
enum { UPDATE_VECTORS = 4 }; // of columns, at a time
// Where B is asked for: elsewhere more can be in flight to the second level, on Zen to the first.
enum { B_LOCALITY = KERNELS_BF16 ? 3 : 2 };

#if VECTOR_WIDTH == 16
enum { DOT_TOKENS = 4, UPDATE_TOKENS = 4 }; // 16 accumulators of 32 registers
#else
enum { DOT_TOKENS = 2, UPDATE_TOKENS = 2 };
#endif

// acc += words of A times words of x: f32, or pairs of bf16.
INLINE vf dot_words(vf acc, vu a, vu x, bool bf16) {
    if (!bf16) return acc + (vf)a * (vf)x;
#if KERNELS_BF16
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)x);
#else
    acc += (vf)(a << 16) * (vf)(x << 16);
    return acc + (vf)(a & 0xffff0000u) * (vf)(x & 0xffff0000u);
#endif
}

// `bytes` (less than a vector) at p, filled up with zeros.
INLINE vu load_bytes(const char *p, size_t bytes) {
    vu v = {0};
    memcpy(&v, p, bytes);
    return v;
}

// sums[i] = total of acc[i]'s elements, as vf_sum() has it. count is a multiple of VECTOR_WIDTH.
INLINE void add_lanes(float *sums, const vf *acc, const int count) {
    for (int at = 0; at < count; at += VECTOR_WIDTH) {
        vu m[VECTOR_WIDTH];
        memcpy(m, acc + at, sizeof m);
        vu_transpose(m, VECTOR_WIDTH);
#pragma GCC unroll 4
        for (int step = VECTOR_WIDTH / 2; step > 0; step /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < step; i++) m[i] = (vu)((vf)m[i] + (vf)m[i + step]);
        vf_store(sums + at, (vf)m[0]);
    }
}

// T rows of x.
INLINE void dot_body(const struct cpu_dot *d, const int T, const bool bf16) {
    enum { VECTOR_BYTES = VECTOR_WIDTH * 4 };
    const int N = DOT_ROWS * T;
    vf acc[DOT_SUMS];
    const char *a[DOT_ROWS], *x[DOT_TOKENS_MAX];
    for (int i = 0; i < DOT_ROWS; i++) a[i] = d->a[i];
    const char *ask = d->a_next[0], *ask_end = ask + d->bytes;
    int ask_row = 0;
    for (int t = 0; t < T; t++) // where there are fewer one is computed again
        x[t] = (const char *)d->x + (size_t)(t < d->tokens ? t : d->tokens - 1) * d->x_stride;
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) acc[i] = d->first ? vf_set(0.0f) : vf_load(d->partial[i]);
    size_t at = 0;
    for (; at + VECTOR_BYTES <= d->bytes; at += VECTOR_BYTES) {
        vu row[DOT_ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < DOT_ROWS; i++) {
            row[i] = load_bytes(a[i] + at, VECTOR_BYTES);
            if (VECTOR_BYTES == 64 || at % 64 == 0) {
                __builtin_prefetch(ask);
                ask += 64;
                if (ask >= ask_end && ask_row < DOT_ROWS - 1) {
                    ask = d->a_next[++ask_row];
                    ask_end = ask + d->bytes;
                }
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            vu column = load_bytes(x[t] + at, VECTOR_BYTES);
#pragma GCC unroll 4
            for (int i = 0; i < DOT_ROWS; i++)
                acc[t * DOT_ROWS + i] = dot_words(acc[t * DOT_ROWS + i], row[i], column, bf16);
        }
    }
    size_t left = d->bytes - at;
    for (int t = 0; left > 0 && t < T; t++)
        for (int i = 0; i < DOT_ROWS; i++)
            acc[t * DOT_ROWS + i] = dot_words(acc[t * DOT_ROWS + i], load_bytes(a[i] + at, left),
                                              load_bytes(x[t] + at, left), bf16);
    if (!d->last) {
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) vf_store(d->partial[i], acc[i]);
        return;
    }
    float sums[DOT_SUMS];
    if (N % VECTOR_WIDTH == 0) add_lanes(sums, acc, N);
    else
        for (int i = 0; i < N; i++) sums[i] = vf_sum(acc[i]);
    for (int t = 0; t < d->tokens; t++)
        for (int i = 0; i < d->rows; i++)
            d->v[(size_t)t * d->v_stride + i] = sums[t * DOT_ROWS + i];
}

static __attribute__((noinline)) void dot_f32_one(const struct cpu_dot *d) {
    dot_body(d, 1, false);
}
static __attribute__((noinline)) void dot_f32_many(const struct cpu_dot *d) {
    dot_body(d, DOT_TOKENS, false);
}
static __attribute__((noinline)) void dot_bf16_one(const struct cpu_dot *d) {
    dot_body(d, 1, true);
}
static __attribute__((noinline)) void dot_bf16_many(const struct cpu_dot *d) {
    dot_body(d, DOT_TOKENS, true);
}

static void dot(const struct cpu_dot *d, bool bf16) {
    if (bf16) (d->tokens == 1 ? dot_bf16_one : dot_bf16_many)(d);
    else (d->tokens == 1 ? dot_f32_one : dot_f32_many)(d);
}

// ------------------------------------------------------------------ updates

INLINE vf update_load(const char *b, bool bf16) {
    if (bf16) return vf_from_bf16((const uint16_t *)(const void *)b);
    return vf_load((const float *)(const void *)b);
}

// y[T tokens, C vectors from `column` on] += weight v B. With `count`, less than a vector: only so
// many columns.
INLINE void update_block(const struct cpu_update *u, int column, int count, const int T,
                         const int C, const bool bf16) {
    const size_t bytes = bf16 ? 2 : 4, row_bytes = (size_t)u->columns * bytes;
    const char *b = u->b + (size_t)column * bytes, *next = u->b_next + (size_t)column * bytes;
    vf acc[UPDATE_TOKENS * UPDATE_VECTORS];
    const float *v[UPDATE_TOKENS];
    for (int t = 0; t < T; t++)
        v[t] = u->v + (size_t)(t < u->tokens ? t : u->tokens - 1) * u->v_stride;
#pragma GCC unroll 16
    for (int i = 0; i < T * C; i++) acc[i] = vf_set(0.0f);
    for (int r = 0; r < u->rank; r++, b += row_bytes, next += row_bytes) {
        vf row[UPDATE_VECTORS];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            char part[VECTOR_WIDTH * 4] = {0};
            if (count > 0) memcpy(part, b, (size_t)count * bytes);
            row[c] = update_load(count > 0 ? part : b + (size_t)(c * VECTOR_WIDTH) * bytes, bf16);
        }
#pragma GCC unroll 4
        for (size_t line = 0; line < (size_t)(C * VECTOR_WIDTH) * bytes; line += 64)
            __builtin_prefetch(next + line, 0, B_LOCALITY);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) acc[t * C + c] += vf_set(v[t][r]) * row[c];
    }
    for (int t = 0; t < T && t < u->tokens; t++) {
        float *y = u->y + (size_t)t * u->y_stride + column;
#pragma GCC unroll 4
        for (int c = 0; c < C; c++, y += VECTOR_WIDTH) {
            vf sum = vf_set(u->weight) * acc[t * C + c];
            if (count == 0) vf_store(y, vf_load(y) + sum);
            else vf_store_part(y, vf_load_part(y, count) + sum, count);
        }
    }
}

INLINE void update_body(const struct cpu_update *u, const int T, const bool bf16) {
    int column = 0;
    for (; column + UPDATE_VECTORS * VECTOR_WIDTH <= u->columns;
         column += UPDATE_VECTORS * VECTOR_WIDTH)
        update_block(u, column, 0, T, UPDATE_VECTORS, bf16);
    for (; column + VECTOR_WIDTH <= u->columns; column += VECTOR_WIDTH)
        update_block(u, column, 0, T, 1, bf16);
    if (column < u->columns) update_block(u, column, u->columns - column, T, 1, bf16);
}

static __attribute__((noinline)) void update_f32_one(const struct cpu_update *u) {
    update_body(u, 1, false);
}
static __attribute__((noinline)) void update_f32_many(const struct cpu_update *u) {
    update_body(u, UPDATE_TOKENS, false);
}
static __attribute__((noinline)) void update_bf16_one(const struct cpu_update *u) {
    update_body(u, 1, true);
}
static __attribute__((noinline)) void update_bf16_many(const struct cpu_update *u) {
    update_body(u, UPDATE_TOKENS, true);
}

static void update(const struct cpu_update *u, bool bf16) {
    if (bf16) (u->tokens == 1 ? update_bf16_one : update_bf16_many)(u);
    else (u->tokens == 1 ? update_f32_one : update_f32_many)(u);
}
