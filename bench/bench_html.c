// A run as one HTML file: figures, and three plots as inline SVG. No other files, no network.
#include "bench/bench_internal.h"

#include <math.h>
#include <stdio.h>

enum { WIDTH = 760, HEIGHT = 260, LEFT = 60, BOTTOM = 34, TOP = 14 };

struct axes {
    FILE *file;
    double x_max, y_max;
};

// 1, 2 or 5 times a power of ten, about a fifth of `max`.
static double tick_step(double max) {
    if (!(max > 0)) return 1;
    double power = pow(10, floor(log10(max / 5))), steps = max / 5 / power;
    return power * (steps > 5 ? 10 : steps > 2 ? 5 : steps > 1 ? 2 : 1);
}

static double x_of(const struct axes *axes, double x) {
    return LEFT + x / axes->x_max * (WIDTH - LEFT - 10);
}

static double y_of(const struct axes *axes, double y) {
    return HEIGHT - BOTTOM - y / axes->y_max * (HEIGHT - BOTTOM - TOP);
}

static struct axes axes_begin(FILE *file, const char *title, const char *x_name, double x_max,
                              double y_max) {
    struct axes axes = {file, x_max > 0 ? x_max : 1, y_max > 0 ? y_max * 1.05 : 1};
    fprintf(file, "<h2>%s</h2>\n<svg width='%d' height='%d'>\n", title, WIDTH, HEIGHT);
    for (double y = 0, step = tick_step(axes.y_max); y <= axes.y_max; y += step)
        fprintf(file, "<line x1='%d' x2='%d' y1='%.1f' y2='%.1f' class='grid'/><text x='%d' y='%.1f' "
                      "text-anchor='end'>%g</text>\n", LEFT, WIDTH - 10, y_of(&axes, y),
                y_of(&axes, y), LEFT - 6, y_of(&axes, y) + 4, y);
    for (double x = 0, step = tick_step(axes.x_max); x <= axes.x_max; x += step)
        fprintf(file, "<text x='%.1f' y='%d' text-anchor='middle'>%g</text>\n", x_of(&axes, x),
                HEIGHT - BOTTOM + 16, x);
    fprintf(file, "<text x='%d' y='%d' text-anchor='end'>%s</text>\n", WIDTH - 10, HEIGHT - 4,
            x_name);
    return axes;
}

static void curve_name(const struct axes *axes, int index, const char *colour, const char *name) {
    fprintf(axes->file, "<rect x='%d' y='%d' width='12' height='3' fill='%s'/><text x='%d' y='%d'>%s"
                        "</text>\n", LEFT + 12 + 130 * index, TOP - 6, colour,
            LEFT + 28 + 130 * index, TOP - 1, name);
}

static void cdf_curve(const struct axes *axes, const struct samples *sorted, int index,
                      const char *colour, const char *name) {
    fprintf(axes->file, "<polyline fill='none' stroke='%s' points='", colour);
    for (size_t i = 0; i < sorted->count; i++)
        fprintf(axes->file, "%.1f,%.1f ", x_of(axes, sorted->value[i]),
                y_of(axes, 100.0 * (double)(i + 1) / (double)sorted->count));
    fprintf(axes->file, "'/>\n");
    curve_name(axes, index, colour, name);
}

static double moment_value(const struct bench_moment *m, int which) {
    return which == 0 ? m->running : which == 1 ? m->waiting : m->tokens_per_s;
}

static double moments_max(const struct bench_run *run, int first, int last) {
    double max = 0;
    for (size_t i = 0; i < run->moment_count; i++)
        for (int which = first; which <= last; which++)
            max = fmax(max, moment_value(&run->moments[i], which));
    return max;
}

static void moments_curve(const struct axes *axes, const struct bench_run *run, int which,
                          int index, const char *colour, const char *name) {
    fprintf(axes->file, "<polyline fill='none' stroke='%s' points='", colour);
    for (size_t i = 0; i < run->moment_count; i++)
        fprintf(axes->file, "%.1f,%.1f ", x_of(axes, run->moments[i].at_s),
                y_of(axes, moment_value(&run->moments[i], which)));
    fprintf(axes->file, "'/>\n");
    curve_name(axes, index, colour, name);
}

static void escaped(FILE *file, const char *text) {
    for (; *text; text++) {
        if (*text == '<') fputs("&lt;", file);
        else if (*text == '&') fputs("&amp;", file);
        else fputc(*text, file);
    }
}

static void summary_row(FILE *file, const char *name, const struct summary *s) {
    fprintf(file, "<tr><td>%s<td>%.1f<td>%.1f<td>%.1f<td>%.1f<td>%.1f\n", name, s->mean * 1e3,
            s->p50 * 1e3, s->p90 * 1e3, s->p99 * 1e3, s->max * 1e3);
}

static void figures(FILE *file, const struct bench_options *options, const struct bench_run *run,
                    const struct bench_result *result) {
    fprintf(file, "<p><code>");
    escaped(file, options->command);
    fprintf(file, "</code><p>%zu completed, %zu failed in %.1f s: <b>%.2f requests/s, %.1f output "
                  "tok/s</b>. First token within %g s: %.1f%%. Jain's index over %d adapters: "
                  "%.4f.\n<table><tr><th>ms<th>mean<th>p50<th>p90<th>p99<th>max\n",
            result->completed, result->failed, run->wall_s, result->requests_per_s,
            result->output_tokens_per_s, options->slo_s, 100 * result->slo_share,
            result->adapter_count, result->jain);
    summary_row(file, "time to first token", &result->ttft_s);
    summary_row(file, "time per output token", &result->tpot_s);
    summary_row(file, "between tokens", &result->itl_s);
    summary_row(file, "end to end", &result->e2e_s);
    fprintf(file, "</table>\n");
    for (size_t i = 0; i < run->error_count; i++) {
        fprintf(file, "<p class='error'>%d times: ", run->errors[i].count);
        escaped(file, run->errors[i].text);
    }
}

static void adapters_table(FILE *file, const struct bench_result *result) {
    enum { ROWS = 50 };
    fprintf(file, "<h2>Adapters, the most requested %d</h2><table><tr><th>name<th>requests<th>tokens"
                  "<th>wanted<th>mean TTFT, ms\n",
            result->adapter_count < ROWS ? result->adapter_count : ROWS);
    for (int i = 0; i < result->adapter_count && i < ROWS; i++) {
        const struct bench_adapter *a = &result->adapters[i];
        fprintf(file, "<tr><td>");
        escaped(file, a->name);
        fprintf(file, "<td>%d<td>%.0f<td>%.0f<td>%.1f\n", a->requests, a->served, a->wanted,
                a->answered ? a->ttft_sum_s / a->answered * 1e3 : 0.0);
    }
    fprintf(file, "</table>\n");
}

bool bench_html(const char *path, const struct bench_options *options,
                const struct bench_run *run, const struct bench_result *result) {
    FILE *file = fopen(path, "w");
    if (!file) return false;
    fprintf(file, "<!doctype html><meta charset='utf-8'><title>lorad-bench</title>\n<style>"
                  "body{font:15px sans-serif;max-width:800px;margin:2em auto}td,th{padding:2px 12px;"
                  "text-align:right}td:first-child,th:first-child{text-align:left}svg text{font:11px "
                  "sans-serif}.grid{stroke:#ddd}.error{color:#b00}code{background:#f3f3f3}</style>\n"
                  "<h1>lorad-bench</h1>\n");
    figures(file, options, run, result);
    struct axes axes = axes_begin(file, "Latency, share of requests below", "seconds",
                                  result->e2e_s.max, 100);
    cdf_curve(&axes, &result->ttft, 0, "#225588", "first token, %");
    cdf_curve(&axes, &result->e2e, 1, "#cc3311", "end to end, %");
    fprintf(file, "</svg>\n");
    axes = axes_begin(file, "Requests", "seconds", run->wall_s, moments_max(run, 0, 1));
    moments_curve(&axes, run, 0, 0, "#228833", "running");
    moments_curve(&axes, run, 1, 1, "#cc3311", "waiting");
    fprintf(file, "</svg>\n");
    axes = axes_begin(file, "Throughput", "seconds", run->wall_s, moments_max(run, 2, 2));
    moments_curve(&axes, run, 2, 0, "#225588", "output chunks/s");
    fprintf(file, "</svg>\n");
    adapters_table(file, result);
    return fclose(file) == 0;
}
