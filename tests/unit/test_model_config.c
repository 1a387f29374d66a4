// config.json and generation_config.json: one wrong field at a time, each refused with the field's
// name; and the readings of good ones, in the spellings of transformers 4 and 5.
#include "base/memory.h"
#include "server/model/config.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/lorad-config-XXXXXX";

static int make_folder(void **state) {
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

static void write_text(const char *name, const char *text, size_t bytes) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

// The fields of a small Llama; `changes` holds more "name":value pairs, which replace these, and
// "name":absent to leave one out.
static const char *const usual[][2] = {
    {"architectures", "[\"LlamaForCausalLM\"]"}, {"hidden_size", "64"},
    {"num_hidden_layers", "2"},                  {"num_attention_heads", "4"},
    {"num_key_value_heads", "2"},                {"intermediate_size", "96"},
    {"vocab_size", "256"},                       {"max_position_embeddings", "512"},
    {"rms_norm_eps", "1e-05"},                   {"rope_theta", "10000.0"},
    {"eos_token_id", "2"},                       {"bos_token_id", "1"},
};

static void write_config(const char *changes) {
    char text[4096] = "{\"model_type\":\"x\"", key[64];
    for (size_t i = 0; i < sizeof usual / sizeof *usual; i++) {
        snprintf(key, sizeof key, "\"%s\":", usual[i][0]);
        if (strstr(changes, key)) continue;
        size_t at = strlen(text);
        snprintf(text + at, sizeof text - at, ",%s%s", key, usual[i][1]);
    }
    size_t at = strlen(text), absent = strlen("absent");
    size_t length = strlen(changes);
    if (length && (length < absent || strcmp(changes + length - absent, "absent") != 0))
        snprintf(text + at, sizeof text - at, ",%s", changes);
    strcat(text, "}");
    write_text("config.json", text, strlen(text));
}

static void expect_refusal(const char *what, enum status wanted, const char *says) {
    struct model_config config;
    struct error err = {0};
    enum status status = model_config_load(folder, &config, &err);
    if (status != wanted || !strstr(err.text, says))
        fail_msg("%s: %s \"%s\"; expected %s \"%s\"", what, status_name(status), err.text,
                 status_name(wanted), says);
}

static const struct bad {
    const char *changes; // also the case's name
    enum status status;
    const char *says;
} bad_configs[] = {
    {"\"architectures\":absent", STATUS_INVALID, "\"architectures\" must be"},
    {"\"architectures\":[]", STATUS_INVALID, "\"architectures\" must be"},
    {"\"architectures\":[\"GPT2LMHeadModel\"]", STATUS_UNSUPPORTED, "GPT2LMHeadModel is not"},
    {"\"architectures\":[\"Qwen2ForCausalLM\"]", STATUS_UNSUPPORTED, "Qwen2ForCausalLM is not"},
    {"\"architectures\":\"LlamaForCausalLM\"", STATUS_INVALID, "\"architectures\" must be"},
    {"\"num_attention_heads\":0", STATUS_INVALID, "\"num_attention_heads\" must be an integer"},
    {"\"num_attention_heads\":-4", STATUS_INVALID, "\"num_attention_heads\" must be an integer"},
    {"\"num_attention_heads\":4.5", STATUS_INVALID, "\"num_attention_heads\" must be an integer"},
    {"\"num_attention_heads\":absent", STATUS_INVALID, "\"num_attention_heads\" is missing"},
    {"\"num_attention_heads\":6", STATUS_INVALID, "(6) must divide \"hidden_size\" (64)"},
    {"\"num_key_value_heads\":0", STATUS_INVALID, "\"num_key_value_heads\" must be an integer"},
    {"\"num_key_value_heads\":3", STATUS_INVALID, "\"num_key_value_heads\" (3) must divide"},
    {"\"num_key_value_heads\":8", STATUS_INVALID, "\"num_key_value_heads\" (8) must divide"},
    {"\"head_dim\":0", STATUS_INVALID, "\"head_dim\""},
    {"\"head_dim\":7", STATUS_INVALID, "must be even"},
    {"\"head_dim\":258", STATUS_INVALID, "from 2 to 256"},
    {"\"head_dim\":-16", STATUS_INVALID, "\"head_dim\""},
    {"\"hidden_size\":0", STATUS_INVALID, "\"hidden_size\" must be an integer"},
    {"\"hidden_size\":\"64\"", STATUS_INVALID, "\"hidden_size\" must be an integer"},
    {"\"hidden_size\":9223372036854775807", STATUS_INVALID, "\"hidden_size\" must be an integer"},
    {"\"hidden_size\":18446744073709551616", STATUS_INVALID, "not JSON"},
    {"\"num_hidden_layers\":0", STATUS_INVALID, "\"num_hidden_layers\" must be an integer"},
    {"\"num_hidden_layers\":1000000000", STATUS_INVALID, "\"num_hidden_layers\" must be an"},
    {"\"num_hidden_layers\":true", STATUS_INVALID, "\"num_hidden_layers\" must be an integer"},
    {"\"intermediate_size\":0", STATUS_INVALID, "\"intermediate_size\" must be an integer"},
    {"\"vocab_size\":0", STATUS_INVALID, "\"vocab_size\" must be an integer"},
    {"\"vocab_size\":absent", STATUS_INVALID, "\"vocab_size\" is missing"},
    {"\"max_position_embeddings\":0", STATUS_INVALID, "\"max_position_embeddings\" must be"},
    {"\"rope_theta\":0", STATUS_INVALID, "\"rope_theta\" must be a finite number above 0"},
    {"\"rope_theta\":-1", STATUS_INVALID, "\"rope_theta\" must be a finite number above 0"},
    {"\"rope_theta\":NaN", STATUS_INVALID, "not JSON"},
    {"\"rope_theta\":1e999", STATUS_INVALID, "not JSON"},
    {"\"rope_theta\":\"10000\"", STATUS_INVALID, "\"rope_theta\" must be a finite number"},
    {"\"rms_norm_eps\":0", STATUS_INVALID, "\"rms_norm_eps\" must be a finite number above 0"},
    {"\"rms_norm_eps\":2", STATUS_INVALID, "\"rms_norm_eps\" must be at most 1"},
    {"\"eos_token_id\":256", STATUS_INVALID, "\"eos_token_id\" must be a token id from 0 to 255"},
    {"\"eos_token_id\":-1", STATUS_INVALID, "\"eos_token_id\" must be a token id from 0 to 255"},
    {"\"eos_token_id\":[2,300]", STATUS_INVALID, "\"eos_token_id\" must be a token id"},
    {"\"eos_token_id\":\"</s>\"", STATUS_INVALID, "\"eos_token_id\" must be a token id"},
    {"\"eos_token_id\":[1,2,3,4,5,6,7,8,9]", STATUS_INVALID, "has 9 ids; at most 8"},
    {"\"bos_token_id\":256", STATUS_INVALID, "\"bos_token_id\" must be a token id"},
    {"\"tie_word_embeddings\":1", STATUS_INVALID, "\"tie_word_embeddings\" must be true or false"},
    {"\"attention_bias\":true", STATUS_UNSUPPORTED, "\"attention_bias\" is true"},
    {"\"mlp_bias\":true", STATUS_UNSUPPORTED, "\"mlp_bias\" is true"},
    {"\"hidden_act\":\"gelu\"", STATUS_UNSUPPORTED, "\"hidden_act\" must be \"silu\""},
    {"\"quantization_config\":{\"bits\":4}", STATUS_UNSUPPORTED, "\"quant_method\""},
    {"\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"bits\":4}", STATUS_UNSUPPORTED,
     "\"quant_method\""},
    {"\"quantization_config\":{\"quant_method\":\"gptq\"}", STATUS_INVALID, "\"bits\" is missing"},
    {"\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":3}", STATUS_INVALID, "\"bits\""},
    {"\"quantization_config\":{\"quant_method\":\"awq\",\"bits\":8}", STATUS_UNSUPPORTED, "AWQ of 4"},
    {"\"quantization_config\":{\"quant_method\":\"awq\",\"bits\":4,\"version\":\"gemv\"}",
     STATUS_UNSUPPORTED, "version gemm"},
    {"\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":0}",
     STATUS_UNSUPPORTED, "GPTQ of 4"},
    {"\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"checkpoint_format\":"
     "\"marlin\"}", STATUS_UNSUPPORTED, "GPTQ of 4"},
    {"\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"dynamic\":{\"x\":{}}}",
     STATUS_UNSUPPORTED, "one setting"},
    {"\"partial_rotary_factor\":0.5", STATUS_UNSUPPORTED, "\"partial_rotary_factor\" must be 1"},
    {"\"rope_parameters\":{\"rope_theta\":1e4,\"partial_rotary_factor\":0.5}", STATUS_UNSUPPORTED,
     "\"partial_rotary_factor\" must be 1"},
    {"\"torch_dtype\":\"float8\"", STATUS_UNSUPPORTED, "\"torch_dtype\" must be"},
    {"\"rope_scaling\":\"linear\"", STATUS_INVALID, "\"rope_scaling\" must be an object"},
    {"\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4}", STATUS_UNSUPPORTED, "not \"yarn\""},
    {"\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":4}", STATUS_UNSUPPORTED,
     "not \"dynamic\""},
    {"\"rope_scaling\":{\"rope_type\":\"longrope\"}", STATUS_UNSUPPORTED, "not \"longrope\""},
    {"\"rope_scaling\":{\"rope_type\":\"linear\"}", STATUS_INVALID, "\"factor\" is missing"},
    {"\"rope_scaling\":{\"factor\":4.0}", STATUS_INVALID, "\"rope_type\" is missing"},
    {"\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":0}", STATUS_INVALID, "\"factor\""},
    {"\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":0.5}", STATUS_INVALID,
     "\"factor\" must be at least 1"},
    {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
     "\"high_freq_factor\":4,\"original_max_position_embeddings\":64}", STATUS_INVALID,
     "\"high_freq_factor\" must be above \"low_freq_factor\""},
    {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,"
     "\"high_freq_factor\":4}", STATUS_INVALID, "\"original_max_position_embeddings\" is missing"},
    {"\"rope_parameters\":{\"rope_theta\":0}", STATUS_INVALID, "\"rope_theta\" must be a finite"},
    {"\"architectures\":[\"MistralForCausalLM\"],\"sliding_window\":128", STATUS_UNSUPPORTED,
     "\"sliding_window\" must be null"},
    {"\"architectures\":[\"MistralForCausalLM\"],\"max_position_embeddings\":32768",
     STATUS_UNSUPPORTED, "\"sliding_window\" must be null"},
    {"\"hidden_size\":64,\"hidden_size\":32", STATUS_INVALID, "not JSON"},
};

static void refuses_bad_configs(void **state) {
    for (size_t i = 0; i < sizeof bad_configs / sizeof *bad_configs; i++) {
        write_config(bad_configs[i].changes);
        expect_refusal(bad_configs[i].changes, bad_configs[i].status, bad_configs[i].says);
    }
}

static void refuses_bad_files(void **state) {
    char path[128];
    snprintf(path, sizeof path, "%s/config.json", folder);
    unlink(path);
    expect_refusal("no config", STATUS_NOT_FOUND, "config.json");
    static const char *const texts[] = {"", "{", "{}{}", "nul", "{\"a\":\"\xff\"}"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        write_text("config.json", texts[i], strlen(texts[i]));
        expect_refusal(texts[i], STATUS_INVALID, "config.json: not JSON");
    }
    write_text("config.json", "[]", 2);
    expect_refusal("a list", STATUS_INVALID, "config.json: must be a JSON object");
    char *huge = mem_zalloc(2, 1 << 20);
    write_text("config.json", huge, 2 << 20);
    expect_refusal("2 MiB", STATUS_TOO_LARGE, "config.json");
    free(huge);
    unlink(path);
    assert_int_equal(mkdir(path, 0700), 0);
    expect_refusal("a folder", STATUS_INVALID, "config.json is not a regular file");
    assert_int_equal(rmdir(path), 0);
}

static struct model_config load(const char *changes) {
    struct model_config config;
    struct error err = {0};
    write_config(changes);
    if (model_config_load(folder, &config, &err) != STATUS_OK)
        fail_msg("%s: %s", changes, err.text);
    return config;
}

static void reads_good_configs(void **state) {
    struct model_config c = load("");
    assert_int_equal(c.layers, 2);
    assert_int_equal(c.hidden, 64);
    assert_int_equal(c.query_heads, 4);
    assert_int_equal(c.kv_heads, 2);
    assert_int_equal(c.head_size, 16);
    assert_int_equal(c.ffn, 96);
    assert_int_equal(c.vocabulary, 256);
    assert_int_equal(c.context_max, 512);
    assert_true(fabsf(c.norm_epsilon - 1e-5f) < 1e-11f);
    assert_true(c.rope_theta > 9999.9 && c.rope_theta < 10000.1);
    assert_int_equal(c.rope_scaling, ROPE_DEFAULT);
    assert_false(c.tied_embeddings);
    assert_int_equal(c.stored_dtype, DTYPE_BF16); // nothing said
    assert_int_equal(c.eos_count, 1);
    assert_int_equal(c.eos_ids[0], 2);
    assert_int_equal(c.bos_id, 1);

    assert_int_equal(load("\"num_key_value_heads\":absent").kv_heads, 4); // LlamaConfig: as queries
    assert_int_equal(load("\"num_key_value_heads\":null").kv_heads, 4);
    assert_int_equal(load("\"head_dim\":null").head_size, 16);
    assert_int_equal(load("\"head_dim\":24").head_size, 24);
    assert_int_equal(load("\"num_attention_heads\":6,\"head_dim\":10").head_size, 10);
    assert_true(load("\"tie_word_embeddings\":true").tied_embeddings);
    assert_int_equal(load("\"bos_token_id\":null").bos_id, -1);
    assert_int_equal(load("\"eos_token_id\":null").eos_count, 0);
    assert_int_equal(load("\"torch_dtype\":\"float16\"").stored_dtype, DTYPE_F16);
    assert_int_equal(load("\"dtype\":\"float32\"").stored_dtype, DTYPE_F32);
    assert_true(load("\"rope_theta\":absent").rope_theta > 9999.9);
    c = load("\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":500000.0}");
    assert_true(c.rope_theta > 499999 && c.rope_theta < 500001);
    c = load("\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}"); // the oldest spelling
    assert_int_equal(c.rope_scaling, ROPE_LINEAR);
    assert_true(c.rope_factor > 1.99 && c.rope_factor < 2.01);
    c = load("\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
             "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}");
    assert_int_equal(c.rope_scaling, ROPE_LLAMA3);
    assert_int_equal(c.rope_original_context, 8192);
    c = load("\"architectures\":[\"MistralForCausalLM\"],\"sliding_window\":null");
    assert_int_equal(c.kv_heads, 2);
    load("\"architectures\":[\"MistralForCausalLM\"],\"sliding_window\":512"); // masks nothing
    c = load("\"eos_token_id\":[5,6]");
    assert_int_equal(c.eos_count, 2);
    assert_int_equal(c.eos_ids[1], 6);
    load("\"a_field_of_another_program\":{\"x\":[1]}");
}

static void generation_config_overrides_eos(void **state) {
    const char *text = "{\"eos_token_id\":[7,8,9],\"temperature\":0.6}";
    write_text("generation_config.json", text, strlen(text));
    struct model_config c = load("");
    assert_int_equal(c.eos_count, 3);
    assert_int_equal(c.eos_ids[0], 7);
    text = "{\"temperature\":0.6}";
    write_text("generation_config.json", text, strlen(text));
    c = load("");
    assert_int_equal(c.eos_count, 1);
    assert_int_equal(c.eos_ids[0], 2);
    static const struct {
        const char *text, *says;
    } bad[] = {
        {"{\"eos_token_id\":256}", "generation_config.json: \"eos_token_id\" must be a token id"},
        {"{\"eos_token_id\":\"x\"}", "generation_config.json: \"eos_token_id\" must be a token id"},
        {"[1]", "generation_config.json: must be a JSON object"},
        {"{", "generation_config.json: not JSON"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_text("generation_config.json", bad[i].text, strlen(bad[i].text));
        expect_refusal(bad[i].text, STATUS_INVALID, bad[i].says);
    }
    char path[128];
    snprintf(path, sizeof path, "%s/generation_config.json", folder);
    assert_int_equal(unlink(path), 0);
}

// What transformers wrote itself (tests/reference/make_tiny_models.py).
static void reads_what_transformers_writes(void **state) {
    struct model_config c;
    struct error err = {0};
    const char *models = LORAD_SOURCE_DIR "/tests/fixtures/models";
    static const char *const names[] = {"mha", "gqa_tied", "llama3_rope", "linear_rope",
                                        "wide_head", "mistral", "bf16_stored", "f16_stored"};
    struct model_config all[8];
    for (int i = 0; i < 8; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", models, names[i]);
        if (model_config_load(path, &all[i], &err) != STATUS_OK)
            fail_msg("%s: %s", names[i], err.text);
        assert_int_equal(all[i].eos_count, 2); // generation_config.json: [2, 3]
        assert_int_equal(all[i].eos_ids[1], 3);
    }
    c = all[1];
    assert_true(c.tied_embeddings && c.layers == 3 && c.kv_heads == 2);
    c = all[2];
    assert_true(c.rope_scaling == ROPE_LLAMA3 && c.rope_original_context == 64);
    c = all[3];
    assert_true(c.rope_scaling == ROPE_LINEAR && c.rope_theta > 499 && c.rope_theta < 501);
    assert_true(c.rope_factor > 3.9 && c.rope_factor < 4.1);
    c = all[4];
    assert_true(c.head_size == 24 && c.hidden == 36 && c.query_heads == 3);
    assert_int_equal(all[5].head_size, 16);
    assert_int_equal(all[6].stored_dtype, DTYPE_BF16);
    assert_int_equal(all[7].stored_dtype, DTYPE_F16);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_bad_configs),
        cmocka_unit_test(refuses_bad_files),
        cmocka_unit_test(reads_good_configs),
        cmocka_unit_test(generation_config_overrides_eos),
        cmocka_unit_test(reads_what_transformers_writes),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
