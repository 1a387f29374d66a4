// Weights of bf16 in 12 bits, without loss: a quarter less to read where reading is what a step costs.
//
// DESIGN. Trained weights lie around zero, and most share few exponents: the high byte of a bf16 (sign
// and seven bits of the exponent) takes 16 values for all but a few numbers in ten thousand, while
// the low byte (an exponent bit and the mantissa) is noise. That exponents carry under 3 of their 8
// bits is what DFloat11 (Zhang et al., 2504.11651) compresses by Huffman codes; here each panel has
// a table of its 16 most frequent high bytes and 4 bits a number, which a byte shuffle turns back
// several times as fast as memory delivers them. Numbers whose high byte is not in the table are
// kept beside, whole, and put in their place as the others are expanded: whatever is multiplied is, to
// the bit, what was loaded. A matrix with too many of those stays as it is.
#include "kernels/cpu/cpu_compact.h"

#include "base/memory.h"

#include <stdatomic.h>
#include <stdlib.h>

enum {
    NUMBERS = 2 * PANEL,   // in a word of a panel
    SAMPLES = 64,          // groups of words of a panel that are counted for its table
    EXCEPTION_SHARE = 64,  // at most one number in so many
    ROWS_BESIDE_MAX = 8,   // with more, registers hold the sums of one panel and its words
};

struct compact {
    const struct cpu_kernels *kernels;
    int words;
    uint8_t *codes; // pieces (cpu_internal.h) of groups of COMPACT_WORDS, each COMPACT_BYTES
    int panel_count;
    struct compact_panel *panels;
    _Atomic int64_t exceptions;
};

bool cpu_compact_can(int out, int in) {
    return out % PANEL == 0 && in % (2 * COMPACT_WORDS) == 0;
}

static size_t code_bytes(const struct compact *c) {
    return (size_t)c->panel_count * (size_t)(c->words / COMPACT_WORDS) * COMPACT_BYTES;
}

struct compact *cpu_compact_create(const struct cpu_kernels *kernels, int panels, int words) {
    struct compact *c = mem_zalloc(1, sizeof *c);
    c->kernels = kernels;
    c->words = words;
    c->panel_count = panels;
    c->panels = mem_zalloc((size_t)panels, sizeof *c->panels);
    c->codes = cpu_memory(code_bytes(c));
    if (c->codes) return c;
    cpu_compact_destroy(c);
    return NULL;
}

void cpu_compact_destroy(struct compact *c) {
    if (!c) return;
    for (int i = 0; i < c->panel_count; i++) free(c->panels[i].exceptions);
    free(c->panels);
    free(c->codes);
    free(c);
}

// ------------------------------------------------------------------ as weights are loaded

static void choose_table(uint8_t table[COMPACT_CODES], const uint32_t *words, int count) {
    uint32_t seen[256] = {0};
    int step = max_int(1, count / COMPACT_WORDS / SAMPLES) * COMPACT_WORDS;
    for (int at = 0; at + COMPACT_WORDS <= count; at += step)
        for (int i = 0; i < COMPACT_WORDS * PANEL; i++) {
            uint32_t pair = words[at * PANEL + i];
            seen[pair >> 8 & 0xff]++;
            seen[pair >> 24]++;
        }
    for (int i = 0; i < COMPACT_CODES; i++) {
        int most = 0;
        for (int high = 1; high < 256; high++)
            if (seen[high] > seen[most]) most = high;
        table[i] = (uint8_t)most;
        seen[most] = 0;
    }
}

static void keep_exception(struct compact_panel *panel, int *count, uint32_t at, uint32_t bits) {
    if ((*count & (*count - 1)) == 0)
        panel->exceptions =
            mem_realloc(panel->exceptions, (size_t)(*count ? 2 * *count : 1) * sizeof *panel->exceptions);
    panel->exceptions[(*count)++] = (struct compact_exception){at, (uint16_t)bits};
}

// The 128 bits of `missing` are bytes of the two pairs of words that compact_encode made of a group.
static void keep_missing(struct compact_panel *panel, int *count, const uint64_t missing[2],
                         const uint32_t *words, int group) {
    for (int i = 0; i < 2; i++)
        for (uint64_t left = missing[i]; left; left &= left - 1) {
            int byte = __builtin_ctzll(left), word = 2 * i + byte % 16 / 8;
            int half = byte / 16 * 8 + byte % 8;
            keep_exception(panel, count, (uint32_t)((group * COMPACT_WORDS + word) * NUMBERS + half),
                           words[word * PANEL + half / 2] >> half % 2 * 16);
        }
}

static uint8_t *codes_at(const struct compact *c, int panel, int first, int count) {
    return c->codes + piece_words(c->panel_count, panel, first, count) / COMPACT_WORDS * COMPACT_BYTES;
}

static uint8_t *group_codes(const struct compact *c, int panel, int group) {
    int word = group * COMPACT_WORDS, first = word / PIECE_WORDS * PIECE_WORDS;
    return codes_at(c, panel, first, min_int(PIECE_WORDS, c->words - first)) +
           (size_t)((word - first) / COMPACT_WORDS) * COMPACT_BYTES;
}

void cpu_compact_pack(struct compact *c, int index, const uint32_t *words) {
    struct compact_panel *panel = &c->panels[index];
    choose_table(panel->table, words, c->words);
    int count = 0;
    for (int group = 0; group < c->words / COMPACT_WORDS; group++) {
        const uint32_t *from = words + group * COMPACT_WORDS * PANEL;
        uint64_t missing[2];
        c->kernels->compact_encode(group_codes(c, index, group), missing, from, panel->table);
        keep_missing(panel, &count, missing, from, group);
    }
    atomic_fetch_add(&c->exceptions, count);
    keep_exception(panel, &count, UINT32_MAX, 0);
}

bool cpu_compact_fits(const struct compact *c) {
    int64_t numbers = (int64_t)c->panel_count * c->words * NUMBERS;
    return atomic_load(&c->exceptions) <= numbers / EXCEPTION_SHARE;
}

size_t cpu_compact_bytes(const struct compact *c) {
    size_t exceptions = (size_t)(atomic_load(&c->exceptions) + c->panel_count);
    return code_bytes(c) + (size_t)c->panel_count * sizeof *c->panels +
           exceptions * sizeof(struct compact_exception);
}

// ------------------------------------------------------------------ in a step

const char *cpu_compact_codes(const struct compact *c, int panel, int first, int count) {
    return (const char *)codes_at(c, panel, first, count);
}

void cpu_compact_multiply(const struct compact *c, struct cpu_tile *tile, int panel, int first,
                          uint32_t *expanded, size_t expanded_stride) {
    struct cpu_compact_tile compact = {
        .tile = tile,
        .code_stride = (size_t)(tile->k / COMPACT_WORDS) * COMPACT_BYTES,
        .first = (uint32_t)first,
        .expanded_stride = expanded_stride,
    };
    // The tile is not copied: reading whole what was just written in parts waits for all stores
    // before it, those of sums that miss the caches among them.
    int panels = tile->panels, at_once = tile->rows > ROWS_BESIDE_MAX ? 1 : panels;
    tile->panels = at_once;
    for (int i = 0; i < panels; i += at_once) {
        compact.codes = codes_at(c, panel + i, first, tile->k);
        compact.panels = &c->panels[panel + i];
        compact.expanded = expanded ? expanded + (size_t)i * expanded_stride : NULL;
        c->kernels->tile_compact(&compact);
        tile->y += at_once * PANEL;
        if (tile->from) tile->from += at_once * PANEL;
    }
}
