// lorad-sim: the command. Reads options, runs one simulation (or the published rows), prints.
// docs/simulator.md says what the model is and what it can and cannot tell.
#include "sim/sim_report.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

static const char help_text[] =
    "lorad-sim: lorad's scheduler and page pool against a cost model; no model, no device.\n"
    "Everything printed is a simulation, not a measurement. docs/simulator.md has the model.\n"
    "\n"
    "  --workload NAME    S1 (7B, rank 8), S2 (7B, ranks 8 to 64), S4 (13B, ranks 16 to 64):\n"
    "                     sets model, ranks, trace and the published pool; give it first [S1]\n"
    "  --model NAME       llama-7b, llama-13b or llama-160m\n"
    "  --device NAME      a100-80g, h100, h200 or cpu [a100-80g]\n"
    "  --engine NAME      slora (as fitted) or roofline (the hardware's bound) [slora]\n"
    "  --efficiency X     of bandwidth and flops in base matmuls and attention, instead\n"
    "  --step-ms X        fixed time of a step, instead\n"
    "  --load-layer-us X  fixed time of each layer of an adapter's copy, instead\n"
    "  --lora-reads HOW   decode reads an adapter once a token or once a step, instead\n"
    "  --policy NAME      lorad or slora [lorad]\n"
    "  --adapters N       0 to 1000000 [100]\n"
    "  --ranks A,B,..     adapter i has rank number i mod count\n"
    "  --modules NAME     qkvo or all [qkvo]\n"
    "  --rate X           requests a second [10]; --cv X, --alpha X, --duration S, --seed N as in\n"
    "                     S-LoRA's generator [1, 1, 120, 42]\n"
    "  --generator NAME   numpy (S-LoRA's own requests) or bench (lorad-bench's) [numpy]\n"
    "  --input A,B        prompt tokens, uniform in [A, B) [8,512]; --output A,B: the same\n"
    "  --pool-tokens N    pool size in tokens of KV; 0: what the device's memory leaves\n"
    "  --max-seqs N       sequences that run at once [1000]\n"
    "  --step-tokens N    lorad: tokens in a step [2048]\n"
    "  --load WAY         async (copied beside the steps) or blocking [async; slora: blocking]\n"
    "  --prefetch N       lorad: waiting requests whose adapters are copied ahead [0]\n"
    "  --eviction NAME    lorad: which idle adapters go first, cost or lru [cost]\n"
    "  --discard          lorad: drop idle adapters after each step, as S-LoRA does\n"
    "  --preempt-every N  lorad: preempt the newest every N steps [0: only when pages are short]\n"
    "  --slo S            first token within [6]\n"
    "  --early-abort      drop who waits when wait + 0.5 s reaches the SLO\n"
    "  --json FILE --csv FILE --svg FILE    the result; pages by owner over time\n"
    "  --check            walk every page in every step\n"
    "  --reproduce slora  S-LoRA's published rows: published, simulated, and our policy\n"
    "  --compare eviction ours, LRU and discarding, over several traces\n"
    "  --fit              search the fitted constants again (half a minute)\n"
    "  --help\n";

enum {
    OPT_WORKLOAD = 256, OPT_MODEL, OPT_DEVICE, OPT_ENGINE, OPT_EFFICIENCY, OPT_STEP_MS,
    OPT_LOAD_LAYER, OPT_LORA_READS, OPT_POLICY, OPT_ADAPTERS, OPT_RANKS, OPT_MODULES, OPT_RATE,
    OPT_GENERATOR, OPT_CV, OPT_ALPHA, OPT_DURATION, OPT_SEED, OPT_INPUT, OPT_OUTPUT, OPT_POOL,
    OPT_SEQS, OPT_STEP_TOKENS, OPT_LOAD, OPT_PREFETCH, OPT_DISCARD, OPT_PREEMPT, OPT_SLO, OPT_ABORT,
    OPT_JSON, OPT_CSV, OPT_SVG, OPT_CHECK, OPT_REPRODUCE, OPT_FIT, OPT_HELP,
    OPT_EVICTION, OPT_COMPARE
};

static const struct option longs[] = {
    {"workload", 1, NULL, OPT_WORKLOAD}, {"model", 1, NULL, OPT_MODEL},
    {"device", 1, NULL, OPT_DEVICE}, {"engine", 1, NULL, OPT_ENGINE},
    {"efficiency", 1, NULL, OPT_EFFICIENCY}, {"step-ms", 1, NULL, OPT_STEP_MS},
    {"load-layer-us", 1, NULL, OPT_LOAD_LAYER}, {"lora-reads", 1, NULL, OPT_LORA_READS},
    {"policy", 1, NULL, OPT_POLICY}, {"adapters", 1, NULL, OPT_ADAPTERS},
    {"ranks", 1, NULL, OPT_RANKS}, {"modules", 1, NULL, OPT_MODULES}, {"rate", 1, NULL, OPT_RATE},
    {"generator", 1, NULL, OPT_GENERATOR},
    {"cv", 1, NULL, OPT_CV}, {"alpha", 1, NULL, OPT_ALPHA}, {"duration", 1, NULL, OPT_DURATION},
    {"seed", 1, NULL, OPT_SEED}, {"input", 1, NULL, OPT_INPUT}, {"output", 1, NULL, OPT_OUTPUT},
    {"pool-tokens", 1, NULL, OPT_POOL}, {"max-seqs", 1, NULL, OPT_SEQS},
    {"step-tokens", 1, NULL, OPT_STEP_TOKENS}, {"load", 1, NULL, OPT_LOAD},
    {"prefetch", 1, NULL, OPT_PREFETCH}, {"discard", 0, NULL, OPT_DISCARD},
    {"preempt-every", 1, NULL, OPT_PREEMPT}, {"slo", 1, NULL, OPT_SLO},
    {"early-abort", 0, NULL, OPT_ABORT}, {"json", 1, NULL, OPT_JSON},
    {"csv", 1, NULL, OPT_CSV}, {"svg", 1, NULL, OPT_SVG}, {"check", 0, NULL, OPT_CHECK},
    {"eviction", 1, NULL, OPT_EVICTION}, {"compare", 1, NULL, OPT_COMPARE},
    {"reproduce", 1, NULL, OPT_REPRODUCE}, {"fit", 0, NULL, OPT_FIT}, {"help", 0, NULL, OPT_HELP},
    {NULL, 0, NULL, 0}};

struct command {
    struct sim_options sim;
    const char *json, *csv, *svg;
    bool reproduce, compare, fit, help, load_given;
};

static bool parse_int(const char *text, long min, long max, int *value) {
    char *end;
    long number = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || number < min || number > max) return false;
    *value = (int)number;
    return true;
}

static bool parse_double(const char *text, double min, double max, double *value) {
    char *end;
    double number = strtod(text, &end);
    if (*text == '\0' || *end != '\0' || !(number >= min && number <= max)) return false;
    *value = number;
    return true;
}

// Numbers between commas; returns how many, or 0 when something is wrong.
static int parse_list(const char *text, long min, long max, int *values, int values_max) {
    char copy[128], *save = NULL;
    int count = 0;
    if (strlen(text) >= sizeof copy) return 0;
    strcpy(copy, text);
    for (char *part = strtok_r(copy, ",", &save); part; part = strtok_r(NULL, ",", &save))
        if (count == values_max || !parse_int(part, min, max, &values[count++])) return 0;
    return count;
}

static bool parse_range(const char *text, int *min, int *end) {
    int range[2];
    if (parse_list(text, 1, 1 << 20, range, 2) != 2 || range[0] >= range[1]) return false;
    *min = range[0];
    *end = range[1];
    return true;
}

static bool parse_name(const char *text, const char *no, const char *yes, bool *value) {
    *value = strcmp(text, yes) == 0;
    return *value || strcmp(text, no) == 0;
}

// What shapes the trace and the adapters; false: the value is not of the option's form.
static bool apply_trace(struct sim_options *sim, int option, const char *value) {
    struct trace_options *trace = &sim->trace;
    double seed;
    bool all, bench;
    switch (option) {
    case OPT_ADAPTERS: return parse_int(value, 0, 1000000, &trace->adapters);
    case OPT_RATE: return parse_double(value, 1e-3, 1e5, &trace->rate);
    case OPT_CV: return parse_double(value, 1e-2, 100, &trace->cv);
    case OPT_ALPHA: return parse_double(value, 1e-2, 100, &trace->alpha);
    case OPT_DURATION: return parse_double(value, 1e-2, 1e6, &trace->duration_s);
    case OPT_INPUT: return parse_range(value, &trace->input_min, &trace->input_end);
    case OPT_OUTPUT: return parse_range(value, &trace->output_min, &trace->output_end);
    case OPT_SEED:
        if (!parse_double(value, 0, 2147483647, &seed)) return false;
        trace->seed = (uint32_t)seed;
        return true;
    case OPT_GENERATOR:
        if (!parse_name(value, "numpy", "bench", &bench)) return false;
        trace->generator = bench ? TRACE_BENCH : TRACE_NUMPY;
        return true;
    case OPT_RANKS:
        sim->rank_count = parse_list(value, 1, 256, sim->ranks, SIM_RANKS_MAX);
        return sim->rank_count > 0;
    case OPT_MODULES:
        if (!parse_name(value, "qkvo", "all", &all)) return false;
        sim->modules = all ? SIM_ALL : SIM_QKVO;
        return true;
    default: return false;
    }
}

static bool apply_server(struct command *command, int option, const char *value) {
    struct sim_options *sim = &command->sim;
    const struct sim_engine *engine;
    bool slora, lru;
    double ms; // or microseconds, as the option says
    switch (option) {
    case OPT_WORKLOAD: return sim_workload(sim, value);
    case OPT_MODEL:
        sim->model = sim_model_find(value);
        sim->pool_tokens = 0;
        return sim->model != NULL;
    case OPT_DEVICE:
        sim->device = sim_device_find(value);
        sim->pool_tokens = 0;
        return sim->device != NULL;
    case OPT_ENGINE:
        engine = sim_engine_find(value);
        if (engine) sim->engine = *engine;
        return engine != NULL;
    case OPT_EFFICIENCY: return parse_double(value, 1e-3, 1, &sim->engine.efficiency);
    case OPT_STEP_MS:
        if (!parse_double(value, 0, 1e4, &ms)) return false;
        sim->engine.step_s = ms / 1e3;
        return true;
    case OPT_LOAD_LAYER:
        if (!parse_double(value, 0, 1e6, &ms)) return false;
        sim->engine.load_layer_s = ms / 1e6;
        return true;
    case OPT_LORA_READS: return parse_name(value, "step", "token", &sim->engine.lora_per_token);
    case OPT_POLICY:
        if (!parse_name(value, "lorad", "slora", &slora)) return false;
        sim->policy = slora ? SIM_SLORA : SIM_LORAD;
        return true;
    case OPT_EVICTION:
        if (!parse_name(value, "cost", "lru", &lru)) return false;
        sim->eviction = lru ? EVICTION_LRU : EVICTION_COST;
        return true;
    case OPT_POOL: return parse_int(value, 0, 1 << 28, &sim->pool_tokens);
    case OPT_SEQS: return parse_int(value, 1, 4096, &sim->sequences_max);
    case OPT_STEP_TOKENS: return parse_int(value, 1, 1 << 20, &sim->step_tokens_max);
    case OPT_LOAD:
        command->load_given = true;
        return parse_name(value, "async", "blocking", &sim->load_blocks);
    case OPT_PREFETCH: return parse_int(value, 0, 64, &sim->prefetch);
    case OPT_PREEMPT: return parse_int(value, 0, 1 << 30, &sim->preempt_every);
    case OPT_SLO: return parse_double(value, 1e-3, 1e6, &sim->slo_s);
    default: return apply_trace(sim, option, value);
    }
}

static bool apply(struct command *command, int option, const char *value) {
    switch (option) {
    case OPT_DISCARD: command->sim.keep_idle = false; return true;
    case OPT_ABORT: command->sim.early_abort = true; return true;
    case OPT_CHECK: command->sim.check = true; return true;
    case OPT_FIT: command->fit = true; return true;
    case OPT_HELP: command->help = true; return true;
    case OPT_JSON: command->json = value; return true;
    case OPT_CSV: command->csv = value; return true;
    case OPT_SVG: command->svg = value; return true;
    case OPT_COMPARE: command->compare = true; return strcmp(value, "eviction") == 0;
    case OPT_REPRODUCE: command->reproduce = true; return strcmp(value, "slora") == 0;
    default: return apply_server(command, option, value);
    }
}

static enum status parse(int argc, char **argv, struct command *command, struct error *err) {
    int option, index = 0;
    sim_options_default(&command->sim);
    while ((option = getopt_long(argc, argv, "", longs, &index)) != -1) {
        if (option == '?') return error_set(err, STATUS_INVALID, "see lorad-sim --help");
        if (!apply(command, option, optarg))
            return error_set(err, STATUS_INVALID, "--%s %s: not a value it takes; see --help",
                             longs[index].name, optarg ? optarg : "");
    }
    if (optind < argc)
        return error_set(err, STATUS_INVALID, "%s: not an option; see --help", argv[optind]);
    if (command->sim.policy == SIM_SLORA && !command->load_given) command->sim.load_blocks = true;
    if (command->sim.policy == SIM_SLORA && !command->sim.load_blocks)
        return error_set(err, STATUS_INVALID, "--load async is lorad's alone");
    return STATUS_OK;
}

static enum status run(const struct command *command, struct error *err) {
    static struct sim_result result;
    enum status status = sim_run(&command->sim, &result, err);
    if (status != STATUS_OK) return status;
    sim_print(stdout, &command->sim, &result);
    if (command->json) {
        json_t *value = sim_json(&command->sim, &result);
        status = sim_write_json(command->json, value, err);
        json_decref(value);
    }
    if (status == STATUS_OK && command->csv) status = sim_write_csv(command->csv, &result, err);
    if (status == STATUS_OK && command->svg) status = sim_write_svg(command->svg, &result, err);
    return status;
}

int main(int argc, char **argv) {
    struct command command = {0};
    struct error err = {0};
    bool within = true;
    enum status status = parse(argc, argv, &command, &err);
    if (status == STATUS_OK && command.help) {
        fputs(help_text, stdout);
        return 0;
    }
    if (status == STATUS_OK)
        status = command.fit         ? sim_fit(stdout, &err)
                 : command.compare   ? sim_compare(stdout, command.json, &err)
                 : command.reproduce ? sim_reproduce(stdout, command.json, &within, &err)
                                     : run(&command, &err);
    if (status != STATUS_OK) {
        fprintf(stderr, "lorad-sim: %s\n", err.text);
        return 2;
    }
    return within ? 0 : 1;
}
