// A step's metadata: what each kernel of it reads besides activations, weights and pages. It is put
// together once a step in one piece of page-locked memory, whose layout follows from its counts.
//
// Entries beyond a step's own (where counts were rounded up, for a recording) say that there is
// nothing to do: token -1, slot -1. Rows beyond its tokens embed token 0.
#include "kernels/cuda/cuda_internal.cuh"

// ------------------------------------------------------------------ attention

static int parts_of(int context) {
    return (context + PART - 1) / PART;
}

static int pages_of(int context) {
    return (context + PAGE_TOKENS - 1) / PAGE_TOKENS;
}

// Query heads that share a kv head.
static int group_of(const struct backend *b, const struct step *step) {
    return step->query_heads / b->shape.kv_heads;
}

// Decodes and short drafts, which see more than a part: what a request gets does not depend on its
// neighbours.
static bool is_narrow(const struct backend *b, const struct step *step,
                      const struct attention_span *span) {
    if (!cuda_attention_tiles(b, step->query_heads)) return span->token_count == 1;
    return span->token_count * group_of(b, step) <= NARROW_ROWS;
}

// Tokens of an item that is not cut.
static int wide_tokens(const struct backend *b, const struct step *step) {
    return cuda_attention_tiles(b, step->query_heads) ? WIDE_ROWS / group_of(b, step) : 1;
}

static void count_attention(const struct backend *b, const struct step *step,
                            struct step_counts *counts) {
    for (int i = 0; i < step->span_count; i++) {
        const struct attention_span *span = &step->spans[i];
        counts->kv_pages += pages_of(span->context);
        if (is_narrow(b, step, span)) {
            int parts = parts_of(span->context);
            counts->narrow_items += parts;
            if (parts == 1) continue;
            counts->merges += span->token_count;
            counts->partials += parts * span->token_count;
        } else {
            int each = wide_tokens(b, step);
            counts->wide_items += (span->token_count + each - 1) / each;
        }
    }
}

// Where fill_attention stands.
struct attention_fill {
    attention_item *narrow, *wide;
    merge_item *merges;
    int32_t partial, pages;
};

static void fill_narrow(struct attention_fill *at, const struct attention_span *span) {
    int parts = parts_of(span->context), count = span->token_count;
    for (int part = 0; part < parts; part++) {
        int first = part * PART, end = first + PART < span->context ? first + PART : span->context;
        *at->narrow++ = {span->token_first, count, span->context, at->pages, first, end,
                         parts > 1 ? at->partial + part * count : -1};
    }
    if (parts == 1) return;
    for (int t = 0; t < count; t++)
        *at->merges++ = {span->token_first + t, at->partial + t, count, parts};
    at->partial += parts * count;
}

static void fill_wide(struct attention_fill *at, const struct attention_span *span, int each) {
    for (int t = 0; t < span->token_count; t += each) {
        int count = span->token_count - t < each ? span->token_count - t : each;
        int context = span->context - span->token_count + t + count;
        *at->wide++ = {span->token_first + t, count, context, at->pages, 0, context, -1};
    }
}

static void fill_attention(const struct backend *b, const struct step *step,
                           const struct step_counts *counts, attention_item *items,
                           merge_item *merges, int32_t *pages) {
    struct attention_fill at = {items, items + counts->narrow_items, merges, 0, 0};
    attention_item *narrow_end = at.wide, *wide_end = at.wide + counts->wide_items;
    merge_item *merges_end = merges + counts->merges;
    for (int i = 0; i < step->span_count; i++) {
        const struct attention_span *span = &step->spans[i];
        if (is_narrow(b, step, span)) fill_narrow(&at, span);
        else fill_wide(&at, span, wide_tokens(b, step));
        int count = pages_of(span->context);
        memcpy(pages + at.pages, span->pages, (size_t)count * sizeof *pages);
        at.pages += count;
    }
    while (at.narrow < narrow_end) (at.narrow++)->token = -1;
    while (at.wide < wide_end) (at.wide++)->token = -1;
    while (at.merges < merges_end) (at.merges++)->token = -1;
}

// ------------------------------------------------------------------ LoRA

static int rank_of(const struct lora_segment *segment) {
    int most = 0;
    for (int m = 0; m < LORA_MODULES; m++)
        if (segment->token_count > 0 && segment->rank[m] > most) most = segment->rank[m];
    return most;
}

// Tokens of an item at most: one where every segment is a decode.
static int lora_tile(const struct step *step) {
    enum { TILE = 16 };
    for (int s = 0; s < step->segment_count; s++)
        if (step->segments[s].token_count > 1) return TILE;
    return 1;
}

static void count_lora(const struct step *step, struct step_counts *counts) {
    int tile = counts->lora_tile = lora_tile(step);
    for (int s = 0; s < step->segment_count; s++) {
        const struct lora_segment *segment = &step->segments[s];
        int rank = rank_of(segment), row = segment->v_first + segment->token_count;
        if (rank == 0) continue;
        if (rank > counts->rank_max) counts->rank_max = rank;
        for (int m = 0; m < LORA_MODULES; m++)
            counts->lora_modules |= (segment->rank[m] > 0) << m;
        if (row > counts->v_rows) counts->v_rows = row;
        counts->lora_items += (segment->token_count + tile - 1) / tile;
        counts->lora_pages += segment->page_count;
    }
}

static bool overlap(const struct lora_segment *a, const struct lora_segment *b) {
    return a->token_first < b->token_first + b->token_count &&
           b->token_first < a->token_first + a->token_count;
}

// How many segments before s must be done first, one after another. `end`: where those before end.
static int segment_wave(const struct step *step, const uint8_t *waves, int s, int end) {
    int wave = 0;
    if (step->segments[s].token_first >= end) return 0;
    for (int before = 0; before < s; before++)
        if (rank_of(&step->segments[before]) > 0 &&
            overlap(&step->segments[before], &step->segments[s]) && waves[before] >= wave)
            wave = waves[before] + 1;
    return wave;
}

// The item of the segment's first tokens.
static lora_item item_of(const struct lora_segment *segment, int pages) {
    lora_item to = {segment->token_first, segment->token_count, segment->v_first, pages,
                    segment->weight, {}};
    for (int m = 0; m < LORA_MODULES; m++) {
        VERIFY_OP(segment->rank[m], <=, LORA_RANK_MAX);
        VERIFY_OP(segment->b_offset[m], <, INT32_MAX);
        to.module[m] = {segment->rank[m], (uint32_t)segment->a_offset[m],
                        (uint32_t)segment->b_offset[m]};
    }
    return to;
}

static void fill_lora(struct device_step *plan, lora_item *items, int32_t *pages) {
    const struct step *step = &plan->source;
    int count = step->segment_count, used = 0, end = 0, made = 0, tile = plan->counts.lora_tile;
    uint8_t *waves = (uint8_t *)mem_zalloc((size_t)count + 1, 1);
    plan->waves = 0;
    for (int s = 0; s < count; s++) {
        const struct lora_segment *segment = &step->segments[s];
        int segment_end = segment->token_first + segment->token_count;
        if (rank_of(segment) == 0) continue;
        waves[s] = (uint8_t)segment_wave(step, waves, s, end);
        VERIFY_OP(waves[s], <, WAVES_MAX);
        if (waves[s] >= plan->waves) plan->waves = waves[s] + 1;
        if (segment_end > end) end = segment_end;
    }
    for (int wave = 0; wave < plan->waves; wave++) {
        plan->wave_first[wave] = made;
        for (int s = 0; s < count; s++) {
            const struct lora_segment *segment = &step->segments[s];
            if (waves[s] != wave || rank_of(segment) == 0) continue;
            lora_item item = item_of(segment, used);
            for (int left = segment->token_count; left > 0; left -= tile) {
                item.count = left < tile ? left : tile;
                items[made++] = item;
                item.token += tile;
                item.v_row += tile;
            }
            memcpy(pages + used, segment->pages, (size_t)segment->page_count * sizeof *pages);
            used += segment->page_count;
        }
    }
    for (; made < plan->counts.lora_items; made++) items[made].token = -1;
    plan->wave_first[plan->waves] = made;
    free(waves);
}

// ------------------------------------------------------------------ the whole

struct step_counts cuda_step_count(const struct backend *b, const struct step *step) {
    struct step_counts counts = {};
    counts.tokens = step->token_count;
    counts.logits = step->logit_count;
    counts.draws = step->draws != NULL;
    if (step->span_count > 0) count_attention(b, step, &counts);
    count_lora(step, &counts);
    return counts;
}

// Takes the next `count` entries of the block: their place on the host, and on the device.
struct carver {
    char *host, *device;
    size_t used;
};

template <typename T> static T *carve(struct carver *at, int count, const T **on_device) {
    T *host = (T *)(at->host + at->used);
    *on_device = (const T *)(at->device + at->used);
    at->used = (at->used + (size_t)count * sizeof(T) + 15) / 16 * 16;
    return host;
}

// The block's parts, in their order; with host NULL it only measures.
struct step_parts {
    int32_t *ids, *positions, *slots, *logit_rows, *kv_pages, *lora_pages;
    struct draw *draws;
    attention_item *items;
    merge_item *merges;
    lora_item *lora_items;
};

static size_t carve_parts(const struct step_counts *n, void *host, void *device,
                          struct device_step *to, struct step_parts *parts) {
    struct carver at = {(char *)host, (char *)device, 0};
    parts->ids = carve(&at, n->tokens, &to->ids);
    parts->positions = carve(&at, n->tokens, &to->positions);
    parts->slots = carve(&at, n->tokens, &to->slots);
    parts->logit_rows = carve(&at, n->logits, &to->logit_rows);
    parts->draws = carve(&at, n->logits, &to->draws);
    parts->items = carve(&at, n->narrow_items + n->wide_items, &to->items);
    parts->merges = carve(&at, n->merges, &to->merges);
    parts->kv_pages = carve(&at, n->kv_pages, &to->kv_pages);
    parts->lora_items = carve(&at, n->lora_items, &to->lora_items);
    parts->lora_pages = carve(&at, n->lora_pages, &to->lora_pages);
    return at.used;
}

size_t cuda_step_bytes(const struct step_counts *counts) {
    struct device_step unused;
    struct step_parts parts;
    return carve_parts(counts, NULL, NULL, &unused, &parts);
}

// An array of the step with `surplus` entries behind; none where the step has not got it.
static void fill_array(int32_t *to, const int32_t *from, int count, int room, int32_t surplus) {
    if (from) memcpy(to, from, (size_t)count * sizeof *to);
    for (int i = from ? count : room; i < room; i++) to[i] = surplus;
}

void cuda_step_fill(const struct backend *b, struct device_step *plan, void *host, void *device) {
    const struct step *step = &plan->source;
    const struct step_counts *n = &plan->counts;
    struct step_parts parts;
    carve_parts(n, host, device, plan, &parts);
    fill_array(parts.ids, step->ids, step->token_count, n->tokens, 0);
    fill_array(parts.positions, step->positions, step->token_count, n->tokens, 0);
    fill_array(parts.slots, step->slots, step->token_count, n->tokens, -1);
    fill_array(parts.logit_rows, step->logit_rows, step->logit_count, n->logits, 0);
    for (int i = 0; i < n->logits; i++) parts.draws[i].kind = DRAW_NONE;
    if (step->draws)
        memcpy(parts.draws, step->draws, (size_t)step->logit_count * sizeof *parts.draws);
    if (step->span_count > 0)
        fill_attention(b, step, n, parts.items, parts.merges, parts.kv_pages);
    fill_lora(plan, parts.lora_items, parts.lora_pages);
}
