// What a step costs and what it must cost. A step of M sequences, one token each (a decode), or of
// one sequence with M tokens (--prefill), runs through kernels/backend.h as the model's forward pass
// calls it: every layer has weights of its own, so that they stream from memory, every sequence its
// own KV pages, and, with --rank, its own adapter on all seven projections.
//
// Bytes are what has to come from memory: weights, KV and adapters once a step. Activations stay in
// caches and are not counted. The limit of an operation is max(bytes / bandwidth, flops / peak).
#include "bench/roofline.h"

#include "bench/roofline_internal.h"

#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ------------------------------------------------------------------ options

static void usage(FILE *to) {
    fprintf(to,
            "lorad-bench roofline --model DIR [options]\n"
            "Times each operation of a step and holds it against this machine's limits.\n"
            "  --model DIR        folder with a config.json; weights are random\n"
            "  --batch 1,16,64    tokens in a step (default 1,2,4,8,16,32,64,256)\n"
            "  --prefill          one sequence of that many tokens; default: that many decodes\n"
            "  --context N        tokens each decode attends to (default 64)\n"
            "  --rank R[,R...]    each sequence on an adapter; of these ranks in turn (default 0: none)\n"
            "  --sharing distinct|one|power  an adapter each, one for all, or one for half of them,\n"
            "                     one for a quarter, and so on (default distinct)\n"
            "  --modules all|qkvo  that the adapters have (default all)\n"
            "  --lora-only        lora_shrink and lora_expand alone, without base weights (cuda)\n"
            "  --device cpu|cuda  default cpu; on cuda the limits are measured through the backend's\n"
            "                     own operations: silu_mul over 1 GB, a matmul of 4096 x 8192 x 8192\n"
            "  --peak-rows N      the 4096 of these; the rest is in proportion\n"
            "  --dtype bf16|f32   of weights and KV (default bf16)\n"
            "  --quantization int8|int4   of the base weights (CPU)\n"
            "  --threads N        default: all cores\n"
            "  --rounds N         the best of so many steps counts (default 5)\n"
            "  --json FILE        write the figures;  --svg FILE  a breakdown of each step\n"
            "  --trace FILE       the last step as a Chrome trace: host and device, operation by\n"
            "                     operation; then from a recording (chrome://tracing, Perfetto)\n"
            "  --commit HASH      recorded in the JSON;  --machine TEXT  likewise\n");
}

// Numbers from 1 to `high`, comma-separated, at most BATCHES_MAX.
static bool list_parse(const char *text, int high, int *list, int *count) {
    *count = 0;
    for (char *end; *text; text = *end ? end + 1 : end) {
        long value = strtol(text, &end, 10);
        if (end == text || (*end && *end != ',') || value < 1 || value > high ||
            *count == BATCHES_MAX)
            return false;
        list[(*count)++] = (int)value;
    }
    return *count > 0;
}

static bool batches_parse(struct roofline_options *o, const char *text) {
    return list_parse(text, 4096, o->batch, &o->batch_count);
}

static bool number_parse(const char *text, int low, int high, int *out) {
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < low || value > high) return false;
    *out = (int)value;
    return true;
}

static bool ranks_parse(struct rig_options *o, const char *text) {
    int ranks[BATCHES_MAX], count = 0;
    o->rank_count = 0;
    if (strcmp(text, "0") == 0) return true;
    if (!list_parse(text, LORA_RANK_MAX, ranks, &count) || count > RIG_RANKS_MAX) return false;
    memcpy(o->ranks, ranks, (size_t)count * sizeof *ranks);
    o->rank_count = count;
    return true;
}

// 0: go on; otherwise exit with status - 1.
static int options_parse(int argc, char **argv, struct roofline_options *o) {
    static const struct option names[] = {
        {"model", 1, 0, 'm'},   {"batch", 1, 0, 'b'},  {"prefill", 0, 0, 'p'},
        {"context", 1, 0, 'c'}, {"rank", 1, 0, 'r'},   {"dtype", 1, 0, 'd'},
        {"quantization", 1, 0, 'q'},
        {"threads", 1, 0, 't'}, {"rounds", 1, 0, 'n'}, {"json", 1, 0, 'j'},
        {"svg", 1, 0, 's'},     {"commit", 1, 0, 'k'}, {"device", 1, 0, 'D'},
        {"peak-rows", 1, 0, 'R'}, {"machine", 1, 0, 'M'},
        {"sharing", 1, 0, 'S'}, {"lora-only", 0, 0, 'L'},
        {"modules", 1, 0, 'o'},   {"trace", 1, 0, 'T'},
        {"help", 0, 0, 'h'},    {0, 0, 0, 0}};
    *o = (struct roofline_options){.rig = {.device = "cpu", .dtype = DTYPE_BF16, .context = 64,
                                 .peak_rows = 4096}, .rounds = 5};
    batches_parse(o, "1,2,4,8,16,32,64,256");
    cpu_set_t set;
    o->rig.threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    for (int i = 0; i < argc; i++)
        snprintf(o->command + strlen(o->command), sizeof o->command - strlen(o->command), "%s%s",
                 i > 0 ? " " : "lorad-bench ", argv[i]);
    optind = 1;
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        bool good = true;
        switch (c) {
        case 'm': o->rig.model = optarg; break;
        case 'b': good = batches_parse(o, optarg); break;
        case 'p': o->rig.prefill = true; break;
        case 'c': good = number_parse(optarg, 1, 1 << 20, &o->rig.context); break;
        case 'r': good = ranks_parse(&o->rig, optarg); break;
        case 'L': o->rig.lora_only = true; break;
        case 'S':
            good = !strcmp(optarg, "distinct") || !strcmp(optarg, "one") || !strcmp(optarg, "power");
            o->rig.sharing = *optarg == 'd' ? RIG_DISTINCT : *optarg == 'o' ? RIG_ONE : RIG_POWER;
            break;
        case 'o':
            good = !strcmp(optarg, "all") || !strcmp(optarg, "qkvo");
            o->rig.qkvo_only = *optarg == 'q';
            break;
        case 'T': o->trace = optarg; break;
        case 'd':
            good = !strcmp(optarg, "bf16") || !strcmp(optarg, "f32");
            o->rig.dtype = !strcmp(optarg, "f32") ? DTYPE_F32 : DTYPE_BF16;
            break;
        case 'q':
            good = !strcmp(optarg, "int8") || !strcmp(optarg, "int4");
            o->rig.quantization = !strcmp(optarg, "int8") ? QUANT_INT8 : QUANT_INT4;
            break;
        case 't': good = number_parse(optarg, 1, 512, &o->rig.threads); break;
        case 'n': good = number_parse(optarg, 1, 1000, &o->rounds); break;
        case 'j': o->json = optarg; break;
        case 's': o->svg = optarg; break;
        case 'k': o->commit = optarg; break;
        case 'M': o->machine = optarg; break;
        case 'R': good = number_parse(optarg, 1, 1 << 16, &o->rig.peak_rows); break;
        case 'D': o->rig.device = optarg; break;
        case 'h': usage(stdout); return 1;
        default: usage(stderr); return 3;
        }
        if (!good) {
            fprintf(stderr, "lorad-bench roofline: '%s' will not do; see --help\n", optarg);
            return 3;
        }
    }
    for (int i = 0; i < o->batch_count; i++)
        if (o->batch[i] > o->rig.tokens_max) o->rig.tokens_max = o->batch[i];
    if (o->rig.lora_only && (strcmp(o->rig.device, "cpu") == 0 || o->rig.rank_count == 0)) {
        fprintf(stderr, "lorad-bench roofline: --lora-only goes with --device cuda and --rank\n");
        return 3;
    }
    if (o->rig.model && optind == argc) return 0;
    usage(stderr);
    return 3;
}

int roofline_main(int argc, char **argv) {
    struct roofline_options options;
    int parsed = options_parse(argc, argv, &options);
    if (parsed != 0) return parsed - 1;
    struct rig rig;
    bool host = strcmp(options.rig.device, "cpu") == 0;
    struct machine_peak peak = {0};
    if (host) peak = machine_peak_measure(options.rig.threads);
    if (!rig_init(&rig, &options.rig)) return 1;
    if (!host) peak = device_peak(&rig);
    printf("%s, %d threads: read %.1f GB/s, f32 %.0f GFLOP/s, bf16 %.0f GFLOP/s\n",
           options.rig.device, options.rig.threads, peak.read_bytes_per_s / 1e9, peak.f32_flops_per_s / 1e9,
           peak.bf16_flops_per_s / 1e9);
    struct step_cost steps[BATCHES_MAX] = {0};
    json_t *list = json_array();
    for (int i = 0; i < options.batch_count; i++) {
        steps[i].tokens = options.batch[i];
        step_measure(&rig, options.batch[i], options.rounds, &steps[i]);
        step_price(&rig, options.batch[i], &steps[i]);
        json_array_append_new(list, step_report(&rig, &peak, &steps[i]));
    }
    json_t *copy = NULL;
    if (options.rig.rank_count > 0) {
        double bytes = 0, seconds = adapter_copy_seconds(&rig, &bytes);
        printf("an adapter into its pages: %.1f MB in %.3f ms, %.1f GB/s\n", bytes / 1e6,
               seconds * 1e3, seconds > 0 ? bytes / seconds / 1e9 : 0);
        copy = json_pack("{s:f,s:f}", "seconds", seconds, "bytes", bytes);
    }
    json_t *root = roofline_json(&options, &peak, list);
    if (copy) json_object_set_new(root, "adapter_copy", copy);
    bool good = true;
    if (options.json && json_dump_file(root, options.json, JSON_INDENT(1) | JSON_REAL_PRECISION(6)))
        good = false, fprintf(stderr, "lorad-bench roofline: cannot write %s\n", options.json);
    if (options.svg && !svg_write(options.svg, &rig, &peak, steps, options.batch_count))
        good = false, fprintf(stderr, "lorad-bench roofline: cannot write %s\n", options.svg);
    if (options.trace && !trace_write(options.trace, &rig, options.batch[options.batch_count - 1]))
        good = false, fprintf(stderr, "lorad-bench roofline: cannot write %s\n", options.trace);
    json_decref(root);
    return good ? 0 : 1;
}
