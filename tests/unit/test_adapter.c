// Adapter folders: each line of the list of bad folders is an entry here, made in a temporary
// folder; each must be refused with a message that names what is wrong, and leak nothing. Good ones
// are checked against images computed here from the elements that were written and PEFT's formula.
#include "adapter_folder.h"

#include "base/memory.h"

#include <dirent.h>
#include <fcntl.h>
#include <malloc.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[] = "/tmp/lorad-adapter-XXXXXX";

static int make_folder(void **state) {
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    remove_tree(folder);
    return 0;
}

static void empty_folder(void) {
    remove_tree(folder);
    assert_int_equal(mkdir(folder, 0700), 0);
}

static int open_files(void) {
    int count = 0;
    DIR *dir = opendir("/proc/self/fd");
    assert_non_null(dir);
    while (readdir(dir)) count++;
    closedir(dir);
    return count;
}

static size_t heap_bytes(void) {
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    return 0; // the sanitizers' allocators; leaks are theirs to find
#else
    return mallinfo2().uordblks;
#endif
}

static void expect_refusal(const char *what, const struct lora_geometry *geometry,
                           const char *path, enum status wanted, const char *says) {
    enum { WARM_UP = 20, ROUNDS = 1000, SMALLEST_LEAK = 16 };
    int files = open_files();
    size_t heap = 0;
    for (int i = 0; i < WARM_UP + ROUNDS; i++) {
        if (i == WARM_UP) heap = heap_bytes();
        struct adapter *adapter = (struct adapter *)1;
        struct error err = {0};
        enum status status = adapter_load(geometry, "x", -1, path, &adapter, &err);
        if (status != wanted || err.status != wanted || !strstr(err.text, says))
            fail_msg("%s: %s \"%s\"; expected %s \"%s\"", what, status_name(status), err.text,
                     status_name(wanted), says);
        assert_null(adapter);
        if (strstr(err.text, folder + 5)) fail_msg("%s: shows the folder: %s", what, err.text);
    }
    if (heap_bytes() >= heap + (size_t)ROUNDS * SMALLEST_LEAK)
        fail_msg("%s: leaks %zu bytes in %d loads", what, heap_bytes() - heap, ROUNDS);
    if (open_files() != files) fail_msg("%s: leaves a file open", what);
}

// ---- bad configurations beside good weights ----------------------------------------------------

#define RANK_PATTERN(text) ",\"rank_pattern\":" text
#define ALPHA_PATTERN(text) ",\"alpha_pattern\":" text

static const struct bad_config {
    const char *what, *without, *with;
    enum status status;
    const char *says;
} bad_configs[] = {
    {"r missing", "r", "", STATUS_INVALID, "r must be an integer of at least 1"},
    {"r 0", "r", ",\"r\":0", STATUS_INVALID, "r must be an integer of at least 1"},
    {"r -1", "r", ",\"r\":-1", STATUS_INVALID, "r must be an integer of at least 1"},
    {"r 1.5", "r", ",\"r\":1.5", STATUS_INVALID, "r must be an integer of at least 1"},
    {"r text", "r", ",\"r\":\"2\"", STATUS_INVALID, "r must be an integer of at least 1"},
    {"r true", "r", ",\"r\":true", STATUS_INVALID, "r must be an integer of at least 1"},
    {"r 2^31", "r", ",\"r\":2147483648", STATUS_INVALID, "r is 2147483648; the largest rank"},
    {"r over the limit", "r", ",\"r\":9", STATUS_INVALID, "r is 9; the largest rank served is 8"},
    {"r twice", NULL, ",\"r\":4", STATUS_INVALID, "not valid JSON"},
    {"r 2^64", "r", ",\"r\":18446744073709551616", STATUS_INVALID, "not valid JSON"},
    {"r against A's rows", "r", ",\"r\":4", STATUS_INVALID, "lora_A.weight is [2, 8]; it must be"},
    {"rank_pattern 9", NULL, RANK_PATTERN("{\"q_proj\":9}"), STATUS_INVALID,
     "rank_pattern[\"q_proj\"] is 9; the largest rank"},
    {"rank_pattern 0", NULL, RANK_PATTERN("{\"q_proj\":0}"), STATUS_INVALID,
     "rank_pattern[\"q_proj\"] must be an integer"},
    {"rank_pattern list", NULL, RANK_PATTERN("[4]"), STATUS_INVALID,
     "rank_pattern must be an object"},
    {"rank_pattern regex", NULL, RANK_PATTERN("{\".*q_proj\":2}"), STATUS_UNSUPPORTED,
     "rank_pattern has the key \".*q_proj\""},
    {"rank_pattern against A's rows", NULL, RANK_PATTERN("{\"q_proj\":4}"), STATUS_INVALID,
     "q_proj.lora_A.weight is [2, 8]; it must be [4, 8]"},
    {"alpha missing", "lora_alpha", "", STATUS_INVALID, "lora_alpha must be a number above 0"},
    {"alpha NaN", "lora_alpha", ",\"lora_alpha\":NaN", STATUS_INVALID, "not valid JSON"},
    {"alpha 1e999", "lora_alpha", ",\"lora_alpha\":1e999", STATUS_INVALID, "not valid JSON"},
    {"alpha text", "lora_alpha", ",\"lora_alpha\":\"NaN\"", STATUS_INVALID,
     "lora_alpha must be a number above 0"},
    {"alpha negative", "lora_alpha", ",\"lora_alpha\":-4", STATUS_INVALID,
     "lora_alpha must be a number above 0"},
    {"alpha_pattern negative", NULL, ALPHA_PATTERN("{\"q_proj\":-1}"), STATUS_INVALID,
     "alpha_pattern[\"q_proj\"] must be a number above 0"},
    {"alpha_pattern unknown", NULL, ALPHA_PATTERN("{\"fc1\":1}"), STATUS_UNSUPPORTED,
     "alpha_pattern has the key \"fc1\""},
    {"no target_modules", "target_modules", "", STATUS_INVALID, "target_modules is missing"},
    {"target_modules []", "target_modules", ",\"target_modules\":[]", STATUS_INVALID,
     "target_modules is missing or empty"},
    {"target_modules [1]", "target_modules", ",\"target_modules\":[1]", STATUS_INVALID,
     "target_modules[0] must be a string"},
    {"target_modules regex", "target_modules", ",\"target_modules\":\".*proj\"",
     STATUS_UNSUPPORTED, "target_modules must be a list"},
    {"unknown module", "target_modules", ",\"target_modules\":[\"q_proj\",\"lm_head\"]",
     STATUS_UNSUPPORTED, "target_modules names \"lm_head\""},
    {"part of a name", "target_modules", ",\"target_modules\":[\"proj\"]", STATUS_UNSUPPORTED,
     "target_modules names \"proj\""},
    {"module of layer 2 of 2", "target_modules",
     ",\"target_modules\":[\"layers.2.self_attn.q_proj\"]", STATUS_UNSUPPORTED, "in 2 layers"},
    {"exclude_modules regex", NULL, ",\"exclude_modules\":\"q.*\"", STATUS_UNSUPPORTED,
     "exclude_modules must be a list"},
    {"excluded, but there", NULL, ",\"exclude_modules\":[\"v_proj\"]", STATUS_INVALID,
     "unexpected tensor base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"},
    {"layer -1", NULL, ",\"layers_to_transform\":[-1]", STATUS_INVALID, "layers_to_transform"},
    {"layer 2 of 2", NULL, ",\"layers_to_transform\":[0,2]", STATUS_INVALID,
     "layers_to_transform must hold layer numbers from 0 to 1"},
    {"layer text", NULL, ",\"layers_to_transform\":\"0\"", STATUS_INVALID, "layers_to_transform"},
    {"layer not wanted, but there", NULL, ",\"layers_to_transform\":[0]", STATUS_INVALID,
     "unexpected tensor base_model.model.model.layers.1"},
    {"no layer wanted", NULL, ",\"layers_to_transform\":[]", STATUS_INVALID, "unexpected tensor"},
    {"peft_type missing", "peft_type", "", STATUS_UNSUPPORTED, "peft_type is missing"},
    {"peft_type LOHA", "peft_type", ",\"peft_type\":\"LOHA\"", STATUS_UNSUPPORTED,
     "peft_type is LOHA"},
    {"bias all", NULL, ",\"bias\":\"all\"", STATUS_UNSUPPORTED, "bias is all"},
    {"bias lora_only", NULL, ",\"bias\":\"lora_only\"", STATUS_UNSUPPORTED, "bias is lora_only"},
    {"DoRA", NULL, ",\"use_dora\":true", STATUS_UNSUPPORTED, "use_dora: DoRA"},
    {"modules_to_save", NULL, ",\"modules_to_save\":[\"lm_head\"]", STATUS_UNSUPPORTED,
     "modules_to_save"},
    {"fan_in_fan_out", NULL, ",\"fan_in_fan_out\":true", STATUS_UNSUPPORTED, "fan_in_fan_out"},
    {"lora_bias", NULL, ",\"lora_bias\":true", STATUS_UNSUPPORTED, "lora_bias"},
    {"trained tokens", NULL, ",\"trainable_token_indices\":[1]", STATUS_UNSUPPORTED,
     "trainable_token_indices"},
    {"replicated layers", NULL, ",\"layer_replication\":[[0,1]]", STATUS_UNSUPPORTED,
     "layer_replication"},
    {"bare parameters", NULL, ",\"target_parameters\":[\"w\"]", STATUS_UNSUPPORTED,
     "target_parameters"},
    {"aLoRA without a list", NULL, ",\"alora_invocation_tokens\":\"x\"", STATUS_INVALID,
     "alora_invocation_tokens"},
    {"aLoRA with no id", NULL, ",\"alora_invocation_tokens\":[5,-1]", STATUS_INVALID,
     "alora_invocation_tokens[1]"},
    {"unknown setting", NULL, ",\"use_future\":true", STATUS_UNSUPPORTED, "use_future"},
    {"PiSSA changes the base", NULL, ",\"init_lora_weights\":\"pissa\"", STATUS_UNSUPPORTED,
     "init_lora_weights is pissa"},
    {"use_rslora text", NULL, ",\"use_rslora\":\"yes\"", STATUS_INVALID, "use_rslora must be true"},
};

static void refuses_bad_configs(void **state) {
    empty_folder();
    struct test_weights w = usual_weights();
    write_weights(folder, &w);
    for (size_t i = 0; i < sizeof bad_configs / sizeof *bad_configs; i++) {
        write_config(folder, bad_configs[i].without, bad_configs[i].with);
        expect_refusal(bad_configs[i].what, &small_geometry, folder, bad_configs[i].status,
                       bad_configs[i].says);
    }
}

// ---- bad weights beside a good configuration ---------------------------------------------------

static void rename_tensor(struct test_tensor *tensor, const char *from, const char *to) {
    char *at = strstr(tensor->name, from), rest[160];
    assert_non_null(at);
    snprintf(rest, sizeof rest, "%s", at + strlen(from));
    snprintf(at, sizeof tensor->name - (size_t)(at - tensor->name), "%s%s", to, rest);
}
static void no_b(struct test_weights *w) { w->count--; }
static void no_a(struct test_weights *w) {
    w->tensors[w->count - 2] = w->tensors[w->count - 1];
    w->count--;
}
static void no_layer_1(struct test_weights *w) { w->count -= 4; }
static void nothing(struct test_weights *w) { w->count = 0; }
static void a_rows(struct test_weights *w) { w->tensors[0].shape[0] = 3; }
static void b_columns(struct test_weights *w) { w->tensors[1].shape[1] = 1; }
static void a_input(struct test_weights *w) { w->tensors[0].shape[1] = 16; }
static void b_output(struct test_weights *w) { w->tensors[1].shape[0] = 12; }
static void a_transposed(struct test_weights *w) {
    w->tensors[0].shape[0] = 8, w->tensors[0].shape[1] = 2;
}
static void a_flat(struct test_weights *w) {
    w->tensors[0].dims = 1, w->tensors[0].shape[0] = 16;
}
static void a_cubic(struct test_weights *w) { w->tensors[0].dims = 3; }
static void layer_2(struct test_weights *w) {
    rename_tensor(&w->tensors[0], "layers.0.", "layers.2.");
}
static void layer_huge(struct test_weights *w) {
    rename_tensor(&w->tensors[0], "layers.0.", "layers.10000000000.");
}
static void layer_wraps(struct test_weights *w) {
    rename_tensor(&w->tensors[0], "layers.0.", "layers.18446744073709551616.");
}
static void layer_padded(struct test_weights *w) {
    rename_tensor(&w->tensors[0], "layers.0.", "layers.00.");
}
static void layer_negative(struct test_weights *w) {
    rename_tensor(&w->tensors[0], "layers.0.", "layers.-0.");
}
static void surplus_bias(struct test_weights *w) {
    add_tensor(w, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "F32", 8, 1);
}
static void surplus_dora(struct test_weights *w) {
    add_tensor(w, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "F32",
               8, 1);
}
static void surplus_head(struct test_weights *w) {
    add_tensor(w, "base_model.model.lm_head.weight", "F32", 8, 8);
}
static void surplus_module(struct test_weights *w) { add_pair(w, 0, LORA_K, 2, "F32"); }
static void same_matrix(struct test_weights *w) {
    add_tensor(w, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "F32",
               2, 8);
}
static void unmatched_names(struct test_weights *w) {
    for (int i = 0; i < w->count; i++)
        rename_tensor(&w->tensors[i], "base_model.model.model.layers", "transformer.h");
}
static void almost_module(struct test_weights *w) {
    rename_tensor(&w->tensors[0], "self_attn.q_proj", "self_attn.q_proj2");
}
static void type_i8(struct test_weights *w) { w->tensors[0].dtype = "I8"; }
static void type_f64(struct test_weights *w) { w->tensors[3].dtype = "F64"; }
static void nan_in_a(struct test_weights *w) {
    w->tensors[0].special_at = 15, w->tensors[0].special = NAN;
}
static void infinity_in_b(struct test_weights *w) {
    w->tensors[5].special_at = 0, w->tensors[5].special = -INFINITY;
}
static void infinite_once_scaled(struct test_weights *w) {
    w->tensors[1].special_at = 3, w->tensors[1].special = 3e38f;
}

static const struct bad_weights {
    const char *what;
    void (*edit)(struct test_weights *w);
    enum status status;
    const char *says;
} bad_weights[] = {
    {"A without B", no_b, STATUS_INVALID, "lora_B of model.layers.1.self_attn.v_proj is missing"},
    {"B without A", no_a, STATUS_INVALID, "lora_A of model.layers.1.self_attn.v_proj is missing"},
    {"no layer 1", no_layer_1, STATUS_INVALID, "model.layers.1.self_attn.q_proj is missing"},
    {"no tensor", nothing, STATUS_INVALID, "holds no tensor"},
    {"r != rows of A", a_rows, STATUS_INVALID, "lora_A.weight is [3, 8]; it must be [2, 8]"},
    {"A and B disagree", b_columns, STATUS_INVALID, "lora_B.weight is [8, 1]; it must be [8, 2]"},
    {"in != the model's", a_input, STATUS_INVALID, "lora_A.weight is [2, 16]; it must be [2, 8]"},
    {"out != the model's", b_output, STATUS_INVALID, "lora_B.weight is [12, 2]; it must be [8, 2]"},
    {"A transposed", a_transposed, STATUS_INVALID, "lora_A.weight is [8, 2]; it must be [2, 8]"},
    {"A of one dimension", a_flat, STATUS_INVALID, "has 1 dimensions; it must have 2"},
    {"A of three dimensions", a_cubic, STATUS_INVALID, "has 3 dimensions; it must have 2"},
    {"layer >= n", layer_2, STATUS_INVALID, "the model has layers 0 to 1"},
    {"layer 10^10", layer_huge, STATUS_INVALID, "the model has layers 0 to 1"},
    {"layer 2^64", layer_wraps, STATUS_INVALID, "the model has layers 0 to 1"},
    {"layer 00", layer_padded, STATUS_INVALID, "the model has layers 0 to 1"},
    {"layer -0", layer_negative, STATUS_INVALID, "the model has layers 0 to 1"},
    {"a bias", surplus_bias, STATUS_INVALID, "lora_B.bias (biases are not supported)"},
    {"DoRA's vector", surplus_dora, STATUS_INVALID, "lora_magnitude_vector (DoRA"},
    {"a whole head", surplus_head, STATUS_INVALID, "unexpected tensor base_model.model.lm_head"},
    {"a module not targeted", surplus_module, STATUS_INVALID, "does not target its module"},
    {"one matrix twice", same_matrix, STATUS_INVALID, "one and the same matrix"},
    {"no tensor that matches", unmatched_names, STATUS_INVALID, "unexpected tensor transformer.h"},
    {"a name with a tail", almost_module, STATUS_INVALID, "self_attn.q_proj2.lora_A.weight"},
    {"I8", type_i8, STATUS_UNSUPPORTED, "q_proj.lora_A.weight has type I8"},
    {"F64", type_f64, STATUS_UNSUPPORTED, "v_proj.lora_B.weight has type F64"},
    {"NaN", nan_in_a, STATUS_INVALID, "layers.0.self_attn.q_proj.lora_A.weight holds a value"},
    {"Inf", infinity_in_b, STATUS_INVALID, "layers.1.self_attn.q_proj.lora_B.weight holds a value"},
    {"too large once scaled", infinite_once_scaled, STATUS_INVALID, "too large once scaled"},
};

static void refuses_bad_weights(void **state) {
    empty_folder();
    write_config(folder, NULL, "");
    for (size_t i = 0; i < sizeof bad_weights / sizeof *bad_weights; i++) {
        struct test_weights w = usual_weights();
        bad_weights[i].edit(&w);
        write_weights(folder, &w);
        expect_refusal(bad_weights[i].what, &small_geometry, folder, bad_weights[i].status,
                       bad_weights[i].says);
    }
}

// ---- bad files ---------------------------------------------------------------------------------

static void refuses_bad_files(void **state) {
    char path[300];
    struct test_weights w = usual_weights();
    expect_refusal("no folder", &small_geometry, "/tmp/lorad-there-is-no-such-folder",
                   STATUS_NOT_FOUND, "there is no such adapter folder");
    empty_folder();
    write_weights(folder, &w);
    expect_refusal("no config", &small_geometry, folder, STATUS_INVALID,
                   "adapter_config.json: there is no such file");
    static const struct {
        const char *what, *text, *says;
    } texts[] = {
        {"empty config", "", "not valid JSON"},
        {"config not JSON", "r: 8", "not valid JSON"},
        {"config a list", "[]", "must be a JSON object"},
        {"config cut", "{\"r\":8", "not valid JSON"},
        {"config with a tail", "{}{}", "not valid JSON"},
        {"config not UTF-8", "{\"r\":\"\xff\"}", "not valid JSON"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        write_text(folder, "adapter_config.json", texts[i].text);
        expect_refusal(texts[i].what, &small_geometry, folder, STATUS_INVALID, texts[i].says);
    }
    char *spaces = mem_alloc((2 << 20) + 1);
    memset(spaces, ' ', 2 << 20);
    memcpy(spaces, "{}", 2);
    spaces[2 << 20] = 0;
    write_text(folder, "adapter_config.json", spaces);
    expect_refusal("config of 2 MiB", &small_geometry, folder, STATUS_INVALID, "larger than");
    memset(spaces, '[', 4000);
    spaces[4000] = 0;
    write_text(folder, "adapter_config.json", spaces);
    expect_refusal("config nested 4000 deep", &small_geometry, folder, STATUS_INVALID,
                   "not valid JSON");
    free(spaces);

    snprintf(path, sizeof path, "%s/adapter_config.json", folder);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkfifo(path, 0600), 0);
    expect_refusal("config a FIFO", &small_geometry, folder, STATUS_INVALID, "not a regular file");
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0700), 0);
    expect_refusal("config a folder", &small_geometry, folder, STATUS_INVALID,
                   "not a regular file");
    assert_int_equal(rmdir(path), 0);

    write_config(folder, NULL, "");
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    assert_int_equal(truncate(path, 200), 0);
    expect_refusal("weights cut", &small_geometry, folder, STATUS_INVALID,
                   "adapter_model.safetensors");
    assert_int_equal(unlink(path), 0);
    expect_refusal("no weights", &small_geometry, folder, STATUS_INVALID,
                   "adapter_model.safetensors: there is no such file");
}

static void never_opens_a_pickle(void **state) {
    empty_folder();
    write_config(folder, NULL, "");
    write_text(folder, "adapter_model.bin", "\x80\x02.");
    char path[300], events[256];
    snprintf(path, sizeof path, "%s/adapter_model.bin", folder);
    int watch = inotify_init1(IN_NONBLOCK);
    assert_true(watch >= 0);
    assert_true(inotify_add_watch(watch, path, IN_OPEN | IN_ACCESS) >= 0);
    expect_refusal("pickle", &small_geometry, folder, STATUS_UNSUPPORTED,
                   "adapter_model.bin is a pickle");
    assert_int_equal(read(watch, events, sizeof events), -1); // no event: nobody opened it
    int fd = open(path, O_RDONLY);
    assert_true(fd >= 0);
    assert_true(read(watch, events, sizeof events) > 0); // the watch does see an open
    close(fd);
    close(watch);
}

static void refuses_what_the_pool_cannot_hold(void **state) {
    empty_folder();
    struct test_weights w = usual_weights();
    write_config(folder, NULL, "");
    write_weights(folder, &w);
    // One layer's image: A and B of q, 16 + 16 elements; of v, 16 + 8. 56 elements of 4 bytes.
    struct lora_geometry geometry = small_geometry;
    geometry.page_elems = 8;
    geometry.pool_pages = 6;
    expect_refusal("larger than the pool", &geometry, folder, STATUS_TOO_LARGE, "needs 7 pages");
    expect_refusal("a dummy larger than the pool", &geometry, "dummy:rank=8", STATUS_TOO_LARGE,
                   "pages of the pool, which has 6");
    geometry.pool_pages = 7;
    struct adapter *adapter = NULL;
    assert_int_equal(adapter_load(&geometry, "x", -1, folder, &adapter, NULL), STATUS_OK);
    assert_int_equal(adapter->page_count, 7);
    assert_int_equal(adapter->layer_elems, 56);
    adapter_unref(adapter);
}

// ---- good folders ------------------------------------------------------------------------------

// What a good case's adapter is, independently of the loader: rank and scale by layer and module.
struct wanted {
    int rank[2][LORA_MODULES];
    double scale[2][LORA_MODULES];
};

static void want(struct wanted *wanted, int layer, int module, int rank, double scale) {
    wanted->rank[layer][module] = rank;
    wanted->scale[layer][module] = scale;
}

// The nearest bf16, halves to even, by trying both neighbours.
static uint16_t nearest_bf16(double value) {
    float below = (float)value, above = below;
    uint32_t bits;
    memcpy(&bits, &below, 4);
    uint16_t low = (uint16_t)(bits >> 16), high = (uint16_t)(low + 1); // away from zero
    uint32_t low_bits = (uint32_t)low << 16, high_bits = (uint32_t)high << 16;
    memcpy(&below, &low_bits, 4);
    memcpy(&above, &high_bits, 4);
    double to_low = fabs(value - (double)below), to_high = fabs((double)above - value);
    if (to_low == to_high) return low % 2 == 0 ? low : high;
    return to_low < to_high ? low : high;
}

static void expect_element(const char *what, const struct adapter *adapter, enum dtype dtype,
                           size_t at, double value) {
    if (dtype == DTYPE_F32) {
        double actual = (double)((const float *)adapter->image)[at];
        // one rounding of the scale and one of the product
        if (!(fabs(actual - value) <= fabs(value) * 0x1p-23))
            fail_msg("%s: element %zu is %.9g, expected %.9g", what, at, actual, value);
    } else {
        uint16_t actual = ((const uint16_t *)adapter->image)[at];
        if (actual != nearest_bf16(value) && !(value == 0 && (actual & 0x7fff) == 0))
            fail_msg("%s: element %zu is 0x%04x, expected 0x%04x", what, at, actual,
                     nearest_bf16(value));
    }
}

// Recomputes the whole image: adapter.h's layout, the elements written, scale folded into B.
static void expect_image(const char *what, const struct adapter *adapter,
                         const struct lora_geometry *g, const struct wanted *wanted) {
    size_t step = g->dtype == DTYPE_F32 ? 4 : 8, at = 0; // elements in 16 bytes
    for (int layer = 0; layer < g->layers; layer++)
        for (int m = 0; m < LORA_MODULES; m++) {
            int rank = wanted->rank[0][m] > wanted->rank[1][m] ? wanted->rank[0][m]
                                                               : wanted->rank[1][m];
            int own = wanted->rank[layer][m];
            assert_int_equal(adapter->rank[m], rank);
            for (int matrix = 'A'; matrix <= 'B'; matrix++) {
                int rows = rank, columns = matrix == 'A' ? g->in[m] : g->out[m];
                int64_t offset = matrix == 'A' ? adapter->a_offset[m] : adapter->b_offset[m];
                assert_int_equal((size_t)layer * adapter->layer_elems + (size_t)offset, at);
                char name[160];
                snprintf(name, sizeof name, "base_model.model.model.layers.%d.%s.lora_%c.weight",
                         layer, module_names[m], matrix);
                for (int i = 0; i < rows * columns; i++) {
                    int row = i / columns, column = i % columns, index = i;
                    if (matrix == 'B') { // stored [out, r]; in memory panels of [r, LORA_PANEL]
                        int first = i / (LORA_PANEL * rank) * LORA_PANEL, place = i - first * rank;
                        int width = columns - first < LORA_PANEL ? columns - first : LORA_PANEL;
                        row = place / width;
                        column = first + place % width;
                        index = column * own + row;
                    }
                    bool real = row < own;
                    double scale = matrix == 'A' ? 1 : wanted->scale[layer][m];
                    double value = real ? (double)element(name, index) * scale : 0;
                    expect_element(what, adapter, g->dtype, at + (size_t)i, value);
                }
                for (at += (size_t)rows * (size_t)columns; at % step != 0; at++)
                    expect_element(what, adapter, g->dtype, at, 0); // padding
            }
        }
    assert_int_equal(adapter->layer_elems * (size_t)g->layers, at);
    assert_int_equal(adapter->image_bytes, at * dtype_bytes(g->dtype));
    size_t pages = (adapter->layer_elems + g->page_elems - 1) / g->page_elems;
    assert_int_equal(adapter->page_count, pages);
}

static void good_usual(struct test_weights *w, struct wanted *wanted) {
    for (int layer = 0; layer < 2; layer++)
        for (int i = 0; i < 2; i++) {
            int module = i ? LORA_V : LORA_Q;
            add_pair(w, layer, module, 2, "F32");
            want(wanted, layer, module, 2, 2.0);
        }
}
static void good_rslora(struct test_weights *w, struct wanted *wanted) {
    good_usual(w, wanted);
    for (int layer = 0; layer < 2; layer++)
        wanted->scale[layer][LORA_Q] = wanted->scale[layer][LORA_V] = 4.0 / sqrt(2.0);
}
static void good_all_modules(struct test_weights *w, struct wanted *wanted) {
    for (int i = 0; i < 2 * LORA_MODULES; i++) {
        add_pair(w, i / LORA_MODULES, i % LORA_MODULES, 2, "F32");
        want(wanted, i / LORA_MODULES, i % LORA_MODULES, 2, 2.0);
    }
}
static void good_mixed_types(struct test_weights *w, struct wanted *wanted) {
    good_usual(w, wanted);
    for (int i = 0; i < w->count; i++)
        w->tensors[i].dtype = i % 3 == 0 ? "F16" : i % 3 == 1 ? "BF16" : "F32";
}
// r 2, alpha 4; o_proj rank 3; down_proj of layer 1 rank 5; alpha 6 for every o_proj.
static void good_patterns(struct test_weights *w, struct wanted *wanted) {
    for (int layer = 0; layer < 2; layer++) {
        add_pair(w, layer, LORA_O, 3, "F32");
        want(wanted, layer, LORA_O, 3, 6.0 / 3);
        add_pair(w, layer, LORA_DOWN, layer ? 5 : 2, "F32");
        want(wanted, layer, LORA_DOWN, layer ? 5 : 2, 4.0 / (layer ? 5 : 2));
    }
}
static void good_first_pattern_wins(struct test_weights *w, struct wanted *wanted) {
    for (int layer = 0; layer < 2; layer++) {
        add_pair(w, layer, LORA_Q, layer ? 1 : 4, "F32");
        want(wanted, layer, LORA_Q, layer ? 1 : 4, 4.0 / (layer ? 1 : 4));
    }
}
static void good_one_layer(struct test_weights *w, struct wanted *wanted) {
    add_pair(w, 1, LORA_Q, 2, "F32");
    want(wanted, 1, LORA_Q, 2, 2.0);
}
static void good_one_module_of_one_layer(struct test_weights *w, struct wanted *wanted) {
    add_pair(w, 0, LORA_UP, 2, "F32");
    want(wanted, 0, LORA_UP, 2, 2.0);
}
static void good_rank_max(struct test_weights *w, struct wanted *wanted) {
    for (int layer = 0; layer < 2; layer++) {
        add_pair(w, layer, LORA_GATE, 8, "F32");
        want(wanted, layer, LORA_GATE, 8, 1.5 / 8);
    }
}

#define TARGETS(text) "\"target_modules\":" text

static const struct good_folder {
    const char *what, *without, *with;
    void (*make)(struct test_weights *w, struct wanted *wanted);
} good_folders[] = {
    {"usual", NULL, "", good_usual},
    {"rsLoRA", NULL, ",\"use_rslora\":true", good_rslora},
    {"settings that are off", NULL,
     ",\"use_dora\":false,\"modules_to_save\":null,\"bias\":\"none\",\"fan_in_fan_out\":false,"
     "\"loftq_config\":{},\"init_lora_weights\":true,\"lora_dropout\":0.1,\"rank_pattern\":{},"
     "\"future\":null,\"megatron_core\":\"megatron.core\",\"task_type\":\"CAUSAL_LM\"", good_usual},
    {"all-linear", "target_modules", "," TARGETS("\"all-linear\""), good_all_modules},
    {"all by name", "target_modules",
     "," TARGETS("[\"q_proj\",\"k_proj\",\"v_proj\",\"o_proj\",\"gate_proj\",\"up_proj\","
                 "\"mlp.down_proj\"]"), good_all_modules},
    {"F16, BF16 and F32", NULL, "", good_mixed_types},
    {"rank_pattern and alpha_pattern", "target_modules",
     "," TARGETS("[\"o_proj\",\"down_proj\"]")
     RANK_PATTERN("{\"o_proj\":3,\"layers.1.mlp.down_proj\":5}") ALPHA_PATTERN("{\"o_proj\":6}"),
     good_patterns},
    {"the first pattern wins", "target_modules",
     "," TARGETS("[\"q_proj\"]")
     RANK_PATTERN("{\"model.layers.1.self_attn.q_proj\":1,\"q_proj\":4}"), good_first_pattern_wins},
    {"layers_to_transform", "target_modules",
     "," TARGETS("[\"q_proj\"]") ",\"layers_to_transform\":[1]", good_one_layer},
    {"layers_to_transform as a number", "target_modules",
     "," TARGETS("[\"q_proj\"]") ",\"layers_to_transform\":1", good_one_layer},
    {"exclude_modules", "target_modules",
     "," TARGETS("[\"q_proj\",\"v_proj\"]")
     ",\"exclude_modules\":[\"v_proj\",\"layers.0.self_attn.q_proj\"]", good_one_layer},
    {"one module of one layer", "target_modules",
     "," TARGETS("[\"model.layers.0.mlp.up_proj\"]"), good_one_module_of_one_layer},
    {"the largest rank", "target_modules",
     "," TARGETS("[\"gate_proj\"]") RANK_PATTERN("{\"gate_proj\":8}")
     ALPHA_PATTERN("{\"gate_proj\":1.5}"), good_rank_max},
};

static void loads_good_folders(void **state) {
    empty_folder();
    for (size_t i = 0; i < sizeof good_folders / sizeof *good_folders; i++) {
        const struct good_folder *good = &good_folders[i];
        struct test_weights w = {.count = 0};
        struct wanted wanted = {0};
        good->make(&w, &wanted);
        write_config(folder, good->without, good->with);
        write_weights(folder, &w);
        for (int dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++) {
            struct lora_geometry geometry = small_geometry;
            geometry.dtype = (enum dtype)dtype;
            struct adapter *adapter = NULL;
            struct error err = {0};
            if (adapter_load(&geometry, "good", -1, folder, &adapter, &err) != STATUS_OK)
                fail_msg("%s: refused: %s", good->what, err.text);
            expect_image(good->what, adapter, &geometry, &wanted);
            assert_string_equal(adapter->name, "good");
            assert_string_equal(adapter->path, folder);
            adapter_unref(adapter);
        }
    }
}

static struct adapter *load(const struct lora_geometry *geometry, const char *name,
                            const char *path) {
    struct adapter *adapter = NULL;
    struct error err = {0};
    if (adapter_load(geometry, name, -1, path, &adapter, &err) != STATUS_OK)
        fail_msg("%s: %s", path, err.text);
    return adapter;
}

// Identity is content: not the name, not the generation.
static void identity_is_content(void **state) {
    empty_folder();
    struct test_weights w = usual_weights();
    write_config(folder, NULL, "");
    write_weights(folder, &w);
    struct adapter *first = load(&small_geometry, "one", folder);
    struct adapter *again = load(&small_geometry, "two", folder);
    assert_int_equal(strlen(first->digest), 64);
    assert_string_equal(first->digest, again->digest);
    assert_true(again->generation > first->generation);
    w.tensors[7].special_at = 7, w.tensors[7].special = 9.0f; // one element of the last tensor
    write_weights(folder, &w);
    struct adapter *changed = load(&small_geometry, "one", folder);
    assert_string_not_equal(first->digest, changed->digest);
    assert_ptr_equal(adapter_ref(first), first);
    adapter_unref(first);
    assert_string_equal(first->name, "one"); // one reference is left
    adapter_unref(first);
    adapter_unref(again);
    adapter_unref(changed);
    adapter_unref(NULL);
}

// Catches: bytes served under the digest of others; an image laid out for other ranks; a file that
// was touched but holds the same refused.
static void read_again_is_the_same_or_refused(void **state) {
    empty_folder();
    struct test_weights w = usual_weights();
    write_config(folder, NULL, "");
    write_weights(folder, &w);
    struct adapter *adapter = NULL;
    struct error err = {0};
    assert_int_equal(adapter_open(&small_geometry, "x", -1, folder, &adapter, &err), STATUS_OK);
    assert_false(atomic_load(&adapter->digest_known));
    assert_null(adapter->image);
    void *image = mem_alloc(adapter->image_bytes), *first = mem_alloc(adapter->image_bytes);
    assert_int_equal(adapter_read(&small_geometry, adapter, first, NULL, &err), STATUS_OK);
    assert_false(atomic_load(&adapter->digest_known)); // so what changes cannot be told the same
    write_weights(folder, &w);
    assert_int_equal(adapter_read(&small_geometry, adapter, image, NULL, &err), STATUS_INVALID);
    adapter->stamped = false;
    assert_int_equal(adapter_read(&small_geometry, adapter, first, NULL, &err), STATUS_OK);
    adapter_digest(adapter, first, NULL);
    struct adapter *whole = load(&small_geometry, "y", folder);
    assert_string_equal(adapter->digest, whole->digest);
    assert_memory_equal(first, whole->image, adapter->image_bytes);
    write_weights(folder, &w); // another file with the same bytes
    memset(image, 7, adapter->image_bytes);
    assert_int_equal(adapter_read(&small_geometry, adapter, image, NULL, &err), STATUS_OK);
    assert_memory_equal(image, first, adapter->image_bytes);
    w.tensors[7].special_at = 7, w.tensors[7].special = 9.0f;
    write_weights(folder, &w);
    assert_int_equal(adapter_read(&small_geometry, adapter, image, NULL, &err), STATUS_INVALID);
    assert_non_null(strstr(err.text, "not those that were registered"));
    adapter->rank[LORA_Q]++; // as if it had been opened with another rank
    assert_int_equal(adapter_read(&small_geometry, adapter, image, NULL, &err), STATUS_INVALID);
    adapter->rank[LORA_Q]--;
    free(image);
    free(first);
    adapter_unref(adapter);
    adapter_unref(whole);
}

// ---- dummy adapters ----------------------------------------------------------------------------

static void dummy_sources(void **state) {
    struct lora_geometry g = small_geometry;
    struct adapter *a = load(&g, "a", "dummy:rank=4,seed=7,modules=all");
    struct adapter *same = load(&g, "b", "dummy:seed=7,rank=4");
    struct adapter *other = load(&g, "c", "dummy:rank=4,seed=8");
    struct adapter *attention = load(&g, "d", "dummy:rank=4,seed=7,modules=qkvo");
    g.dtype = DTYPE_BF16;
    struct adapter *rounded = load(&g, "e", "dummy:rank=4,seed=7");
    assert_string_equal(a->digest, same->digest);
    assert_string_not_equal(a->digest, other->digest);
    for (int m = 0; m < LORA_MODULES; m++) {
        assert_int_equal(a->rank[m], 4);
        assert_int_equal(attention->rank[m], m <= LORA_O ? 4 : 0);
        // Every row of A and of B does something, and nothing is large: the text stays text.
        for (int i = 0; i < 4 * g.in[m]; i++) {
            float value = ((float *)a->image)[a->a_offset[m] + i];
            assert_true(value != 0 && fabsf(value) <= 1);
            assert_int_equal(((uint16_t *)rounded->image)[rounded->a_offset[m] + i],
                             nearest_bf16((double)value));
        }
        for (int i = 0; i < 4 * g.out[m]; i++)
            assert_true(fabsf(((float *)a->image)[a->b_offset[m] + i]) <= 1);
    }
    size_t layer_bytes = a->layer_elems * 4;
    assert_memory_not_equal(a->image, (char *)a->image + layer_bytes, layer_bytes);
    adapter_unref(a), adapter_unref(same), adapter_unref(other);
    adapter_unref(attention), adapter_unref(rounded);
    struct adapter *plain = load(&(struct lora_geometry){.layers = 1, .in = {4, 4, 4, 4, 4, 4, 4},
                                     .out = {4, 4, 4, 4, 4, 4, 4}, .rank_max = 64,
                                     .page_elems = 64, .pool_pages = 99}, "f", "dummy:");
    assert_int_equal(plain->rank[LORA_Q], 16); // the default
    adapter_unref(plain);
}

static void refuses_bad_dummies(void **state) {
    static const char *const sources[] = {
        "dummy:rank=0", "dummy:rank=9", "dummy:rank=-1", "dummy:rank=4x", "dummy:rank=",
        "dummy:rank", "dummy:rank=99999999999999999999", "dummy:seed=-1", "dummy:seed=x",
        "dummy:seed=99999999999999999999", "dummy:modules=none", "dummy:rank=4,,seed=1",
        "dummy:colour=red", "dummy: rank=4",
    };
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++)
        expect_refusal(sources[i], &small_geometry, sources[i], STATUS_INVALID,
                       "write dummy:rank=1..8,seed=NUMBER,modules=all|qkvo");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_bad_configs),
        cmocka_unit_test(refuses_bad_weights),
        cmocka_unit_test(refuses_bad_files),
        cmocka_unit_test(never_opens_a_pickle),
        cmocka_unit_test(refuses_what_the_pool_cannot_hold),
        cmocka_unit_test(loads_good_folders),
        cmocka_unit_test(identity_is_content),
        cmocka_unit_test(read_again_is_the_same_or_refused),
        cmocka_unit_test(dummy_sources),
        cmocka_unit_test(refuses_bad_dummies),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
