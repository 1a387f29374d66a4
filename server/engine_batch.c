// What the planned sequences become for the model: flat arrays of one step's tokens, and over them
// the spans of attention, the segments of adapters and the rows whose logits are wanted. Engine
// thread only. Everything that the device will trust is asserted here, on this side of the door.
//
// Running sequences stand in the order of their adapters (engine_step.c), so tokens of one adapter
// at one weight are one segment. Mixing requests lie in one segment of each of their adapters;
// neighbours that share an adapter share its segment.
#include "server/engine_internal.h"

#include "base/verify.h"

struct builder {
    struct engine *engine;
    struct engine_batch *batch;
    int tokens, drafts, spans, segments, rows;
    int open[REQUEST_ADAPTERS_MAX], open_count; // segments that the sequence before is part of
};

static void add_tokens(struct builder *builder, struct sequence *sequence) {
    const struct engine *engine = builder->engine;
    struct engine_batch *batch = builder->batch;
    const struct sched_item *item = &sequence->item;
    int count = item->planned + item->drafts, end = item->tokens_cached + count;
    VERIFY_OP(end - item->drafts, <=, item->tokens_total);
    VERIFY_OP(builder->tokens + count, <=, engine->options.step_tokens_max);
    sequence->token_first = builder->tokens;
    builder->drafts += item->drafts;
    for (int position = item->tokens_cached; position < end; position++) {
        VERIFY_OP(position / PAGE_TOKENS, <, sequence->page_count);
        int32_t page = sequence->pages[position / PAGE_TOKENS];
        VERIFY_OP(engine->page_tags[page], ==, page_tag_kv(sequence));
        int at = builder->tokens++;
        batch->ids[at] = sequence->tokens[position];
        batch->positions[at] = position;
        batch->slots[at] = page * PAGE_TOKENS + position % PAGE_TOKENS;
    }
    batch->spans[builder->spans++] =
        (struct attention_span){.token_first = sequence->token_first,
                                .token_count = count,
                                .context = end,
                                .pages = sequence->pages};
}

// The open segment behind `after` that goes on with this adapter and weight, or a new one: a token's
// adapters are summed up in the order of their segments, which must be the request's own.
static int segment_for(struct builder *builder, const struct adapter *adapter, float weight,
                       int token_first, int after) {
    struct lora_segment *segments = builder->batch->segments;
    for (int i = 0; i < builder->open_count; i++) {
        const struct lora_segment *open = &segments[builder->open[i]];
        if (builder->open[i] > after && open->pages == adapter->pages && open->weight == weight &&
            open->token_first + open->token_count == token_first)
            return builder->open[i];
    }
    VERIFY_OP(builder->segments, <,
              builder->engine->options.sequences_max * REQUEST_ADAPTERS_MAX);
    struct lora_segment *segment = &segments[builder->segments];
    *segment = (struct lora_segment){
        .token_first = token_first, .weight = weight, .pages = adapter->pages,
        .page_count = adapter->page_count};
    for (int module = 0; module < LORA_MODULES; module++) {
        segment->rank[module] = adapter->rank[module];
        segment->a_offset[module] = adapter->a_offset[module];
        segment->b_offset[module] = adapter->b_offset[module];
    }
    return builder->segments++;
}

// The generation that the request began with, still resident, in pages that are still its own.
static void assert_adapter(const struct builder *builder, const struct sequence *sequence, int i) {
    const struct adapter *adapter = sequence->item.adapters[i];
    VERIFY_OP(adapter->generation, ==, sequence->generations[i]);
    VERIFY(atomic_load(&adapter->resident));
    VERIFY_OP(adapter->running, >, 0);
    for (int page = 0; page < adapter->page_count; page++)
        VERIFY_OP(builder->engine->page_tags[adapter->pages[page]], ==,
                  page_tag_adapter(sequence->generations[i]));
}

// Each adapter's segment begins where it does: an activated one's may be behind the first token, or
// not in this step at all.
static void add_segments(struct builder *builder, struct sequence *sequence) {
    const struct sched_item *item = &sequence->item;
    int open[REQUEST_ADAPTERS_MAX], count = 0, last = -1;
    int tokens = item->planned + item->drafts, first = item->tokens_cached;
    for (int i = 0; i < item->adapter_count; i++) {
        VERIFY_OP(item->adapters[i]->generation, ==, sequence->generations[i]);
        int skipped = sequence->active_from[i] > first ? sequence->active_from[i] - first : 0;
        if (skipped >= tokens) continue;
        int known = builder->segments;
        last = segment_for(builder, item->adapters[i], sequence->request->adapter_weights[i],
                           sequence->token_first + skipped, last);
        if (last == known) assert_adapter(builder, sequence, i);
        builder->batch->segments[last].token_count += tokens - skipped;
        open[count++] = last;
    }
    for (int i = 0; i < count; i++) builder->open[i] = open[i];
    builder->open_count = count;
}

static void add_rows(struct builder *builder, struct sequence *sequence) {
    const struct sched_item *item = &sequence->item;
    bool finishes = item->tokens_cached + item->planned == item->tokens_total;
    sequence->row_first = builder->rows;
    sequence->row_count = item->rows_all ? item->planned : finishes + item->drafts;
    VERIFY_OP(builder->rows + sequence->row_count, <=, builder->engine->options.sequences_max);
    int last = sequence->token_first + item->planned + item->drafts;
    for (int i = 0; i < sequence->row_count; i++) {
        int ahead = i - (sequence->row_count - 1 - item->drafts);
        struct draw *draw = &builder->batch->draws[builder->rows];
        *draw = (struct draw){.kind = DRAW_NONE};
        if (builder->engine->ops->draw && !item->rows_all)
            *draw = engine_draw_of(builder->engine, sequence, ahead);
        builder->batch->logit_rows[builder->rows++] = last - sequence->row_count + i;
    }
}

// The image's end is the end of its last module's B.
static uint64_t segment_bytes(const struct engine *engine, const struct lora_segment *segment) {
    const struct lora_geometry *geometry = &engine->geometry;
    int64_t elems = segment->b_offset[LORA_DOWN] +
                    (int64_t)segment->rank[LORA_DOWN] * geometry->out[LORA_DOWN];
    return (uint64_t)elems * (uint64_t)geometry->layers * dtype_bytes(geometry->dtype);
}

static void count_adapters(const struct engine *engine, struct engine_batch *batch, int count) {
    const struct lora_segment *segments = batch->segments;
    batch->adapters = 0;
    batch->adapter_bytes = 0;
    for (int i = 0; i < count; i++) {
        int before = i - 1;
        while (before >= 0 && segments[before].pages != segments[i].pages) before--;
        if (before >= 0) continue;
        batch->adapters++;
        batch->adapter_bytes += segment_bytes(engine, &segments[i]);
    }
}

void engine_batch_build(struct engine *engine) {
    struct engine_batch *batch = &engine->batch;
    struct builder builder = {.engine = engine, .batch = batch};
    for (int i = 0; i < engine->running_count; i++) {
        struct sequence *sequence = sequence_of(engine->running[i]);
        if (sequence->item.planned == 0) continue;
        add_tokens(&builder, sequence);
        add_segments(&builder, sequence);
        add_rows(&builder, sequence);
    }
    int v_first = 0;
    for (int i = 0; i < builder.segments; i++) {
        batch->segments[i].v_first = v_first;
        v_first += batch->segments[i].token_count;
    }
    VERIFY_OP(v_first, <=, builder.tokens * REQUEST_ADAPTERS_MAX);
    batch->drafts = builder.drafts;
    count_adapters(engine, batch, builder.segments);
    batch->step = (struct step){.token_count = builder.tokens,
                                .query_heads = engine->config.query_heads,
                                .ids = batch->ids,
                                .positions = batch->positions,
                                .slots = batch->slots,
                                .spans = batch->spans,
                                .span_count = builder.spans,
                                .segments = batch->segments,
                                .segment_count = builder.segments,
                                .logit_rows = batch->logit_rows,
                                .logit_count = builder.rows,
                                .draws = engine->ops->draw ? batch->draws : NULL,
                                .repeats = true};
}
