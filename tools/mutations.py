#!/usr/bin/env python3
"""Breaks the code of each invariant on purpose, and shows which test notices.

    tools/mutations.py [--build DIR] [--only TEXT]     rewrites docs/mutations.md

Works in a copy of the sources under /tmp. For each mutation: apply it, build the tests named, run
them; "caught" when one fails (an assertion of the program itself counts: it would have stopped the
server). Exits 1 when a mutation survives or no longer applies. Invariants are those of
server/README.md and pager/README.md; the numbers here: 1 tokens are the same alone and in any batch,
2 preemption, chunks and prefix hits change nothing, 3 pages are accounted for, 4 a token's pages and
adapter generation are its request's, 5 prefixes are shared within a scope alone, 6 one terminal event
a request, 7 a failed load changes nothing, F fairness between tenants, C calm: nobody is held up.
"""
import argparse
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
T, P, R, E, A, N, H, D = ("test_engine_tiers", "test_prefix", "test_residency", "test_engine",
                          "test_adapter", "test_tenants", "test_host_store", "test_draft")
B, C, M, Q = "test_backend_cpu", "test_compact", "test_model", "test_quant"

# invariant, file, what is there, what is put there, tests that shall notice
MUTATIONS = [
    ("1", "server/engine_batch.c", "open->weight == weight &&", "", [E]),
    ("1", "server/engine_batch.c", "open->pages == adapter->pages && ", "", [E]),
    ("1", "server/engine_batch.c", "builder->open[i] > after && ", "", [T]),
    ("1", "server/engine_batch.c",
     "sequence->active_from[i] > first ? sequence->active_from[i] - first : 0", "0", [T]),
    ("1", "server/engine_output.c", "ended || sequence->tokens[item->tokens_total - 1] != draft",
     "ended || accepted == drafts", [D]),
    ("1", "server/engine_draft.c", "if (most > item->tokens_left) most = item->tokens_left;", "", [D]),
    ("1", "server/engine_output.c", ".position = (uint64_t)(sequence->item.tokens_total + ahead)",
     ".position = engine->step", [E]),
    ("1", "pager/host_store.c", "((size_t)layer * elems + at) * bytes", "at * bytes", [H]),
    ("1", "pager/host_store.c", "adapter->pages + at / geometry->page_elems", "adapter->pages", [H]),
    ("1", "kernels/row_block.c", "part.v_first += skipped;", "", [M, "test_row_block"]),
    ("1", "kernels/row_block.c", "part.token_first -= first;", "", [M, "test_row_block"]),
    ("1", "server/model/forward.c", "activation_row(m, m->delta, rows->first)", "m->delta", [M]),
    ("1", "kernels/cpu/cpu_kernels_body.h", "KERNELS_BF16 && stride % 2 == 0 && k % 2 == 0",
     "KERNELS_BF16", [B]),
    ("1", "kernels/cpu/cpu_quant.c", "(size_t)rows * (size_t)l->in);\n        x = wide;",
     "(size_t)l->in);\n        x = wide;", [Q]),
    ("1", "kernels/cpu/cpu_internal.h", "adds && r < rows", "r < 0", [B]),
    ("1", "kernels/cpu/cpu_kv.c", "&= 0xffff;", "&= 0xffffffff;", [B]),
    ("1", "kernels/cpu/cpu_kv.c", "if (D == padded && !half)", "if (!half)", [B]),
    ("1", "kernels/cpu/cpu_kv.c", "(to[i] & 0xffff) | ", "", [B]),
    ("1", "kernels/cpu/cpu_elementwise.c", "both ? v + width : NULL", "NULL", [B]),
    ("1", "kernels/cpu/cpu_lora.c", "if (cost <= first[target]) return 0;", "", [B]),
    ("1", "kernels/cpu/cpu_lora.c", "return min_int((int)panels * LORA_PANEL, out);",
     "return min_int((int)panels * LORA_PANEL + 1, out);", [B]),
    ("1", "kernels/cpu/cpu_panels.c", "* chunk / job->chunks * job->at_once", "* chunk / job->chunks", [B]),
    ("1", "kernels/cpu/cpu_linear.c", "panel_at(l, chunk, at, count)",
     "panel_at(l, chunk, at, PIECE_WORDS)", [B]),
    ("1", "kernels/cpu/cpu_panels.c", "if (!stream || job->outside)", "if (!stream)", [B]),
    ("1", "kernels/cpu/cpu_linear.c", "tile.from = part->first > 0 ? sums : NULL;", "tile.from = NULL;", [B]),
    ("1", "kernels/cpu/cpu_linear.c", "(size_t)(panels_before * PANEL) * rows", "0 * rows", [B]),
    ("1", "kernels/cpu/cpu_linear.c", "sums += columns * (size_t)panels->groups.padded;", "", [B]),
    ("1", "kernels/cpu/cpu_linear.c", "whole ? groups->padded :", "true ? groups->padded :", [B]),
    ("1", "kernels/cpu/cpu_threads.c", "last ? share_of(first, end - 1) : share_of",
     "share_of", [B]),
    ("1", "kernels/cpu/cpu_attention.c", ".panel_stride = last - keys", ".panel_stride = 0", [B]),
    ("1", "kernels/cpu/cpu_attention.c",
     "if (values != copy) memcpy(copy, values, page_words * sizeof *copy);", "", [B]),
    ("1", "kernels/cpu/cpu_compact.c", "word = 2 * i + byte % 16 / 8", "word = 2 * i", [C]),
    ("1", "kernels/cpu/cpu_compact.c", "codes_at(c, panel + i, first", "codes_at(c, panel, first", [C]),
    ("1", "kernels/cpu/cpu_compact.c", "<= numbers / EXCEPTION_SHARE", "<= numbers", [C]),
    ("1", "kernels/cpu/cpu_compact_body.h", "first[c] = words[0], second[c] = words[1];", "", [C]),
    ("1", "kernels/cpu/cpu_compact_body.h", "if (until < groups) groups = until;",
     "groups = until < groups ? until + 1 : groups;", [C]),
    ("1", "kernels/cpu/cpu_compact_body.h",
     "while (place.exception[c]->at < 2 * PANEL * place.word) place.exception[c]++;", "", [C]),
    ("1", "kernels/cpu/cpu_compact_body.h", "if (half == 1) code = _mm512_srli_epi16(code, 4);", "",
     [C]),
    ("2", "pager/prefix.c", "!memcmp(node->tokens, tokens, sizeof node->tokens))", "1)", [P]),
    ("2", "pager/prefix.c", "node->parent == parent &&", "", [P]),
    ("2", "pager/prefix.c", "pages[shared] = equal;\n", "", [P, T]),
    ("2", "server/engine_swap.c", "for (int layer = 0; layer < engine->geometry.layers; layer++)",
     "for (int layer = 1; layer < engine->geometry.layers; layer++)", [T]),
    ("2", "server/engine_swap.c", "    move(engine, sequence, false);\n", "", [T]),
    ("2", "server/sequence.c", "    sequence->item.tokens_cached = 0;\n", "", [E]),
    ("3", "pager/prefix.c", "            pool_give(prefix->pool, PAGE_KV, &pages[shared], 1);\n", "",
     [P, T]),
    ("3", "pager/prefix.c", "    if (node->refs > 0 || node->children > 0) return;",
     "    if (node->refs > 0) return;", [P]),
    ("3", "pager/prefix.c", "    prefix->used_pages++;\n    eviction_remove", "    eviction_remove",
     [P]),
    ("3", "pager/prefix.c", "    eviction_remove(prefix->eviction, &node->evictable);\n    pool_change",
     "    pool_change", [P]),
    ("3", "pager/residency.c",
     "    residency->idle_pages[adapter->evictable.tier] -= adapter->page_count;\n    eviction_remove",
     "    eviction_remove", [R]),
    ("3", "pager/residency.c", "for (int tier = tier_max + 1;", "for (int tier = tier_max + 2;", [R]),
    ("3", "pager/residency.c",
     "    pool_give(residency->pool, PAGE_ADAPTER, adapter->pages, adapter->page_count);\n", "", [R]),
    ("3", "pager/eviction.c", "a->tier != b->tier ? a->tier < b->tier : ", "", [R]),
    ("3", "pager/eviction.c", "        rise(eviction, last);\n        sink(eviction, last);\n",
     "        rise(eviction, last);\n", [R]),
    ("3", "server/engine_output.c",
     "    pool_give(engine->pool, PAGE_KV, sequence->pages + keep, sequence->page_count - keep);\n", "",
     [D]),
    ("3", "server/scheduler.c", "item->drafts = min_int(item->drafts, limits->rows_max - planner->rows);",
     "", [D]),
    ("3", "server/engine_step.c", "sequence->pages + shared, sequence->page_count - shared",
     "sequence->pages, sequence->page_count", [T]),
    ("3", "server/engine_swap.c",
     "    host_store_release(engine->host_store, swap_bytes(engine, sequence->swap_tokens));\n", "",
     [T]),
    ("3", "pager/host_store.c", "    adapter->image_users--;\n    event_add", "    event_add", [T]),
    ("3", "pager/host_store.c", "return adapter->image_users == 0;", "return true;", [T, H]),
    ("4", "server/engine_adapters.c", "page_tag_adapter(adapter->generation);", "0;", [T]),
    ("4", "pager/residency.c", "        residency->counts.running++;\n        idle_leave(residency, adapter);\n",
     "        residency->counts.running++;\n", [R]),
    ("4", "server/engine_output.c",
     "        engine->page_tags[sequence->pages[i]] = page_tag_shared(sequence, i);", "        ;", [T]),
    ("4", "pager/residency.c",
     "    if (residency->prefix) prefix_drop(residency->prefix, &adapter->prefixes);\n", "", [R]),
    ("4", "pager/adapter_load.c", "if (strcmp(hex, adapter->digest) != 0) return files_changed(err);",
     "", [A]),
    ("4", "server/engine_step.c",
     "        tag_pages(engine, pages, missing, page_tag_kv(sequence));\n        sequence->page_count +=",
     "        sequence->page_count +=", [D]),
    ("4", "server/registry.c", "        part_twins(registry, *link);\n        replaced", "        replaced", ["test_registry"]),
    ("4", "server/registry.c", "strcmp(other->adapter->digest, entry->adapter->digest) == 0", "1", ["test_registry"]),
    ("5", "pager/prefix.c", "page < scope->base_pages ? base : scope", "scope", [T, P]),
    ("5", "pager/prefix.c", "page < scope->base_pages ? base : scope",
     "page <= scope->base_pages ? base : scope", [T, P]),
    ("5", "server/sequence.c", "scope->base_pages = from / PAGE_TOKENS;",
     "scope->base_pages = from == INT32_MAX ? from : (from + PAGE_TOKENS - 1) / PAGE_TOKENS;", [T]),
    ("5", "server/sequence.c", "sha256_update(&hash, salt, strlen(salt) + 1);",
     "sha256_update(&hash, salt, 0);", [T]),
    ("5", "server/sequence.c",
     "    sha256_update(&hash, request->tenant, strlen(request->tenant) + 1);\n", "", [T]),
    ("5", "server/sequence.c",
     "        sha256_update(&hash, &sequence->generations[i], sizeof(uint64_t));\n", "", [T]),
    ("5", "server/sequence.c",
     "        sha256_update(&hash, &request->adapter_weights[i], sizeof(float));\n", "", [T]),
    ("5", "pager/prefix.c",
     "            !memcmp(node->scope.bytes, scope->bytes, sizeof scope->bytes) &&\n", "", [P, T]),
    ("6", "server/engine_adapters.c",
     "else engine_end_with(engine, sequence, STATUS_IO, text, now_s);", "else i++;", [T]),
    ("6", "server/engine_output.c", "    int unfinished = atomic_fetch_sub(&engine->unfinished, 1);",
     "    int unfinished = atomic_load(&engine->unfinished);", ["test_engine_ends"]),
    ("6", "server/engine_output.c", "        atomic_fetch_add(&metrics->aborted, 1);\n", "        ;\n",
     ["test_engine_ends"]),
    ("7", "pager/host_store.c", "        store->counts.bytes_used -= adapter->image_bytes;\n        if (image)",
     "        if (image)", [H]),
    ("7", "pager/host_store.c", "        atomic_store(&adapter->tier, ADAPTER_ON_DISK);\n    }\n", "    }\n",
     [T]),
    ("7", "pager/adapter_folder.c", "        if (!scale_values(r->values, count * columns, scale))",
     "        if (scale_values(r->values, count * columns, scale) && 0)", [A]),
    ("F", "server/tenants.c", "    t->tenant[place].counter += PROMPT_COST * tokens",
     "    t->tenant[place].counter += 0 * PROMPT_COST * tokens", [N]),
    ("F", "server/tenants.c", "    t->tenant[place].counter += OUTPUT_COST * tokens",
     "    t->tenant[place].counter += 0 * OUTPUT_COST * tokens", [N]),
    ("F", "server/tenants.c", "    if (tenant->counter < least) tenant->counter = least;\n", "", [N]),
    ("F", "server/tenants.c", "    if (waits(tenant)) return;\n", "", [N, T]),
    ("C", "server/engine_adapters.c", "nothing_else || first->item.passed >= HOLDER_PASSES", "0", [T]),
    ("C", "server/engine_adapters.c",
     "        if (away(adapter)) engine->reserved_pages += adapter->page_count;\n", "", [T]),
    ("C", "server/engine_adapters.c",
     "    if (cold != item->cold) tenants_set_cold(engine->tenants, item, cold);", "    (void)cold;",
     [T]),
    ("C", "server/engine.c", "        gather(engine);", "", [E]),
    ("C", "server/engine_ends.c", "now_s + wait_s <= first_token_limit_s(engine, sequence)", "1",
     ["test_engine_ends"]),
]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--build", default="/tmp/lorad-mutations")
    options.add_argument("--only", default="")
    options = options.parse_args()
    copy = pathlib.Path(options.build)
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    files = run(["git", "ls-files"], cwd=ROOT).stdout.split()
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    lists = copy / "CMakeLists.txt" # what becomes unused is not the point
    lists.write_text(lists.read_text().replace("-Werror;", ""))
    run(["cmake", "-G", "Ninja", "-S", ".", "-B", "build", "-DLORAD_CUDA=OFF",
         "-DCMAKE_C_FLAGS_RELEASE=-O1"], cwd=copy, check=True)
    tests = sorted({test for mutation in MUTATIONS for test in mutation[4]})
    built = run(["ninja", "-C", "build", *tests], cwd=copy)
    assert built.returncode == 0, built.stdout[-2000:]
    for test in tests:
        assert run([f"build/tests/{test}"], cwd=copy, timeout=300).returncode == 0, test
    rows, bad = [], 0
    for invariant, name, old, new, noticing in MUTATIONS:
        if options.only and options.only not in name + old:
            continue
        path = copy / name
        text = path.read_text()
        result = "no longer applies"
        if text.count(old) == 1:
            path.write_text(text.replace(old, new))
            built = run(["ninja", "-C", "build", *noticing], cwd=copy)
            result = "does not build"
            if built.returncode == 0:
                result = "survives"
                for test in noticing:
                    try:
                        code = run([f"build/tests/{test}"], cwd=copy, timeout=120).returncode
                    except subprocess.TimeoutExpired:
                        code = "no end"
                    if code != 0:
                        result = f"`{test}`" + (" (no end)" if code == "no end" else
                                                " (an assertion)" if code < 0 else "")
                        break
            path.write_text(text)
        bad += not result.startswith("`")
        shown = " ".join(old.split())
        put = " ".join(new.split())
        rows.append(f"| {invariant} | `{name}` | `{shown.replace('|', '&#124;')}` | "
                    f"{'`' + put.replace('|', '&#124;') + '`' if put else 'nothing'} | {result} |")
        print(rows[-1], flush=True)
    if not options.only:
        head = (f"# Mutations\n{len(rows)} breakages of the invariants' code, made by "
                "`tools/mutations.py` (which writes this page), and the test\nthat notices. The "
                "script's head says what the invariants' numbers stand for.\n\n"
                "| | file | instead of | put | noticed by |\n|---|---|---|---|---|\n")
        (ROOT / "docs" / "mutations.md").write_text(head + "\n".join(rows) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
