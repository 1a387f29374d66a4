// Packed checkpoints: files that this test packs by the layouts' description (packed_weights.h) are
// read back as scale * (number - zero), and what does not fit is refused by its name.
#include "server/model/packed_weights.h"

#include "base/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { IN = 64, OUT = 24, GROUP = 16, GROUPS = IN / GROUP, DATA_MAX = 1 << 16 };

// What the matrix is made of.
static int number[IN][OUT], zero[GROUPS][OUT], group_of[IN];
static float scale[GROUPS][OUT];

static uint32_t random_state = 7;
static int random_below(int limit) {
    random_state = random_state * 1664525u + 1013904223u;
    return (int)((random_state >> 8) % (uint32_t)limit);
}

static void matrix_make(int bits, bool shuffled) {
    for (int i = 0; i < IN; i++) group_of[i] = shuffled ? (i * 7 + 3) % GROUPS : i / GROUP;
    for (int g = 0; g < GROUPS; g++)
        for (int o = 0; o < OUT; o++) {
            zero[g][o] = 1 + random_below((1 << bits) - 1);
            scale[g][o] = (float)(1 + random_below(100)) / 256.0f;
        }
    for (int i = 0; i < IN; i++)
        for (int o = 0; o < OUT; o++) number[i][o] = random_below(1 << bits);
}

// ------------------------------------------------------------------ a file

struct file {
    char header[4096], data[DATA_MAX];
    size_t header_bytes, data_bytes;
};

static void *file_add(struct file *f, const char *name, const char *type, int rows, int columns,
                      size_t element_bytes) {
    size_t bytes = (size_t)rows * (size_t)(columns ? columns : 1) * element_bytes;
    char shape[40];
    snprintf(shape, sizeof shape, columns ? "[%d,%d]" : "[%d]", rows, columns);
    f->header_bytes += (size_t)snprintf(
        f->header + f->header_bytes, sizeof f->header - f->header_bytes,
        "%s\"m.%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
        f->header_bytes ? "," : "{", name, type, shape, f->data_bytes, f->data_bytes + bytes);
    void *at = f->data + f->data_bytes;
    memset(at, 0, bytes);
    f->data_bytes += bytes;
    assert_true(f->data_bytes <= DATA_MAX);
    return at;
}

static struct safetensors *file_open(struct file *f) {
    char path[] = "/tmp/lorad-packed-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    f->header[f->header_bytes++] = '}';
    uint64_t length = f->header_bytes;
    assert_int_equal(write(fd, &length, 8), 8);
    assert_int_equal(write(fd, f->header, f->header_bytes), (ssize_t)f->header_bytes);
    assert_int_equal(write(fd, f->data, f->data_bytes), (ssize_t)f->data_bytes);
    close(fd);
    struct safetensors *file = NULL;
    struct error err = {0};
    if (safetensors_open_file(path, &file, &err) != STATUS_OK) fail_msg("%s", err.text);
    unlink(path);
    return file;
}

// ------------------------------------------------------------------ packing

static void add_scales(struct file *f) {
    float *to = file_add(f, "scales", "F32", GROUPS, OUT, 4);
    memcpy(to, scale, sizeof scale);
}

// Numbers of one word are neighbours along the inputs, zeros' along the outputs.
static void add_gptq(struct file *f, int bits, int offset, bool with_index) {
    int each = 32 / bits;
    uint32_t *weight = file_add(f, "qweight", "I32", IN / each, OUT, 4);
    uint32_t *zeros = file_add(f, "qzeros", "I32", GROUPS, OUT / each, 4);
    add_scales(f);
    for (int i = 0; i < IN; i++)
        for (int o = 0; o < OUT; o++)
            weight[i / each * OUT + o] |= (uint32_t)number[i][o] << (i % each * bits);
    for (int g = 0; g < GROUPS; g++)
        for (int o = 0; o < OUT; o++)
            zeros[g * (OUT / each) + o / each] |= (uint32_t)(zero[g][o] - offset)
                                                  << (o % each * bits);
    if (!with_index) return;
    int32_t *index = file_add(f, "g_idx", "I32", IN, 0, 4);
    memcpy(index, group_of, sizeof group_of);
}

static void add_awq(struct file *f) {
    static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7}; // outputs from the lowest bits on
    uint32_t *weight = file_add(f, "qweight", "I32", IN, OUT / 8, 4);
    uint32_t *zeros = file_add(f, "qzeros", "I32", GROUPS, OUT / 8, 4);
    add_scales(f);
    for (int word = 0; word < OUT / 8; word++)
        for (int place = 0; place < 8; place++) {
            int o = 8 * word + order[place];
            for (int i = 0; i < IN; i++)
                weight[i * (OUT / 8) + word] |= (uint32_t)number[i][o] << 4 * place;
            for (int g = 0; g < GROUPS; g++)
                zeros[g * (OUT / 8) + word] |= (uint32_t)zero[g][o] << 4 * place;
        }
}

static void expect_matrix(struct safetensors *file, const struct packing *packing) {
    static float read[OUT * IN];
    struct error err = {0};
    assert_true(packed_has(file, "m.weight"));
    if (packed_check(file, packing, "m.weight", OUT, IN, &err) != STATUS_OK ||
        packed_read(file, packing, "m.weight", OUT, IN, read, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i < IN; i++) {
            int g = group_of[i];
            float expected = scale[g][o] * (float)(number[i][o] - zero[g][o]);
            if (read[o * IN + i] != expected)
                fail_msg("[%d, %d] is %g, expected %g", o, i, (double)read[o * IN + i],
                         (double)expected);
        }
    safetensors_close(file);
}

static void reads_what_was_packed(void **state) {
    (void)state;
    static const struct {
        struct packing packing;
        bool index;
    } cases[] = {{{PACKING_GPTQ, 4, GROUP, 1}, false}, {{PACKING_GPTQ, 4, GROUP, 1}, true},
                 {{PACKING_GPTQ, 4, GROUP, 0}, true},  {{PACKING_GPTQ, 8, GROUP, 1}, false},
                 {{PACKING_AWQ, 4, GROUP, 0}, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        static struct file f;
        f = (struct file){0};
        const struct packing *packing = &cases[i].packing;
        matrix_make(packing->bits, cases[i].index);
        if (packing->method == PACKING_AWQ) add_awq(&f);
        else add_gptq(&f, packing->bits, packing->zero_offset, cases[i].index);
        memset(file_add(&f, "bias", "F32", OUT, 0, 4), 0, OUT * 4);
        expect_matrix(file_open(&f), packing);
    }
}

static void expect_refused(struct file *f, const struct packing *packing, const char *wanted) {
    static float read[OUT * IN];
    struct error err = {0};
    struct safetensors *file = file_open(f);
    enum status status = packed_check(file, packing, "m.weight", OUT, IN, &err);
    if (status == STATUS_OK)
        status = packed_read(file, packing, "m.weight", OUT, IN, read, &err);
    if (status == STATUS_OK || !strstr(err.text, wanted))
        fail_msg("\"%s\"; expected \"%s\"", err.text, wanted);
    safetensors_close(file);
}

static void refuses_what_does_not_fit(void **state) {
    (void)state;
    static struct file f;
    const struct packing gptq = {PACKING_GPTQ, 4, GROUP, 1}, awq = {PACKING_AWQ, 4, GROUP, 0};
    matrix_make(4, true);

    f = (struct file){0};
    add_gptq(&f, 4, 1, false);
    expect_refused(&f, &(struct packing){0}, "quantization_config");
    f = (struct file){0};
    add_gptq(&f, 4, 1, false);
    expect_refused(&f, &awq, "m.qweight must have shape [64, 3]");
    f = (struct file){0};
    add_gptq(&f, 4, 1, false);
    expect_refused(&f, &(struct packing){PACKING_GPTQ, 4, 32, 1}, "m.qzeros must have shape [2, 3]");
    f = (struct file){0};
    file_add(&f, "qweight", "I32", IN / 8, OUT, 4);
    expect_refused(&f, &gptq, "m.qzeros is missing");
    f = (struct file){0};
    file_add(&f, "qweight", "F32", IN / 8, OUT, 4);
    expect_refused(&f, &gptq, "m.qweight has type F32");
    for (int wrong = -1; wrong <= GROUPS; wrong += GROUPS + 1) {
        f = (struct file){0};
        add_gptq(&f, 4, 1, false);
        int32_t *index = file_add(&f, "g_idx", "I32", IN, 0, 4);
        index[5] = wrong;
        expect_refused(&f, &gptq, "g_idx[5]");
    }
    f = (struct file){0};
    add_gptq(&f, 4, 1, false);
    float *bias = file_add(&f, "bias", "F32", OUT, 0, 4);
    bias[3] = 0.5f;
    expect_refused(&f, &gptq, "bias");
    assert_true(packed_part("m.qzeros", "m.weight") && !packed_part("m.qzero", "m.weight"));
    assert_false(packed_part("m.weight", "m.weight"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_what_was_packed),
        cmocka_unit_test(refuses_what_does_not_fit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
