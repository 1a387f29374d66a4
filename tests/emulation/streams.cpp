// The queues of streams.h. One lock for all: the server copies adapters on a thread of their own.
#include "tests/emulation/emulate.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

uint64_t emulate_replays;

namespace {

struct work {
    std::function<void()> run;
    std::vector<std::shared_ptr<work>> after;
    bool done = false;
};
typedef std::shared_ptr<work> work_ptr;

std::recursive_mutex lock;
std::vector<work_ptr> pending;
uint64_t random_state;

[[noreturn]] void fail(const char *what) {
    fprintf(stderr, "emulation: %s\n", what);
    abort();
}

} // namespace

struct emulated_graph {
    std::vector<work_ptr> nodes; // in the order they were queued in
    std::vector<cudaStream_t> streams; // that are recorded
    std::thread::id thread;            // who records
};

struct emulated_stream {
    work_ptr last;
    std::vector<work_ptr> waits; // of events, for the next work
    emulated_graph *recording = nullptr;
    work_ptr before; // last, when a recording began

    void record(emulated_graph *graph) {
        recording = graph;
        graph->streams.push_back(this);
        before = last;
        last = nullptr;
    }
};

struct emulated_event {
    bool timed;
    work_ptr work;
    emulated_graph *recording = nullptr;
    std::chrono::steady_clock::time_point when; // of timed ones
};

static emulated_graph *recorded_now;

static void refuse_while_recording(const char *what) {
    if (recorded_now && recorded_now->thread == std::this_thread::get_id()) fail(what);
}

// ------------------------------------------------------------------ queueing and running

static bool ready(const work &w) {
    for (const work_ptr &before : w.after)
        if (!before->done) return false;
    return true;
}

// Runs one of the works that may run now.
static void run_one() {
    std::vector<size_t> can;
    for (size_t i = 0; i < pending.size(); i++)
        if (ready(*pending[i])) can.push_back(i);
    if (can.empty()) fail("streams wait for each other");
    random_state = random_state * 6364136223846793005u + 1442695040888963407u + emulate_seed;
    size_t chosen = can[(random_state >> 33) % can.size()];
    work_ptr w = pending[chosen];
    pending.erase(pending.begin() + (ptrdiff_t)chosen);
    w->run();
    w->done = true;
    w->after.clear(); // or a stream would keep all of its past
}

static void run_all() {
    while (!pending.empty()) run_one();
}

static work_ptr queue(cudaStream_t stream, std::function<void()> run) {
    work_ptr w = std::make_shared<work>();
    w->run = std::move(run);
    w->after = std::move(stream->waits);
    stream->waits.clear();
    if (stream->last) w->after.push_back(stream->last);
    stream->last = w;
    if (stream->recording) stream->recording->nodes.push_back(w);
    else pending.push_back(w);
    return w;
}

void emulate_queue(cudaStream_t stream, std::function<void()> run) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (stream) {
        queue(stream, std::move(run));
        return;
    }
    run_all();
    run();
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = new emulated_stream;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    refuse_while_recording("a wait for a stream that is recorded");
    if (!stream) run_all();
    else
        while (stream->last && !stream->last->done) run_one();
    return cudaSuccess;
}

// ------------------------------------------------------------------ events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = new emulated_event{flags != cudaEventDisableTiming, nullptr, nullptr, {}};
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

static void note_time(cudaEvent_t event, cudaStream_t stream) {
    queue(stream, [event] { event->when = std::chrono::steady_clock::now(); });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    // While it is recorded, an event only orders; see cudaEventRecordWithFlags.
    if (event->timed && !stream->recording) note_time(event, stream);
    event->work = stream->last;
    event->recording = stream->recording;
    return cudaSuccess;
}

// In a recording that it is external to, an event is a node that notes the time of each replay.
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (flags != cudaEventRecordExternal) return cudaEventRecord(event, stream);
    if (!stream->recording) fail("an external event outside of a recording");
    note_time(event, stream);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    const std::chrono::steady_clock::time_point never;
    if (begin->when == never || end->when == never) fail("the time of an event that nothing passed");
    *milliseconds = std::chrono::duration<float, std::milli>(end->when - begin->when).count();
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (event->recording && !stream->recording) { // it joins the recording
        stream->record(event->recording);
    }
    if (stream->recording && !event->recording && event->work && !event->work->done)
        fail("a recorded stream waits for an event outside of the recording");
    if (event->work) stream->waits.push_back(event->work);
    return cudaSuccess;
}

// ------------------------------------------------------------------ graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, int) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (recorded_now) fail("two recordings at once");
    recorded_now = new emulated_graph;
    recorded_now->thread = std::this_thread::get_id();
    stream->record(recorded_now);
    return cudaSuccess;
}

static void mark_reached(const work_ptr &w, std::map<work *, bool> *reached) {
    if (!w || (*reached)[w.get()]) return;
    (*reached)[w.get()] = true;
    for (const work_ptr &before : w->after) mark_reached(before, reached);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (!stream->recording || stream->recording != recorded_now) fail("no recording to end");
    std::map<work *, bool> reached;
    mark_reached(stream->last, &reached);
    for (const work_ptr &w : stream->waits) mark_reached(w, &reached);
    for (const work_ptr &node : recorded_now->nodes)
        if (!reached[node.get()])
            fail("a recording ends before a stream that joined it came back");
    *graph = recorded_now;
    for (cudaStream_t s : recorded_now->streams) { // what was queued before comes before the next
        s->last = s->before;
        s->before = nullptr;
        s->recording = nullptr;
        s->waits.clear();
    }
    recorded_now = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new emulated_graph(*graph);
    return cudaSuccess;
}

// The nodes anew, in their order among themselves, behind what `stream` has.
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    emulate_replays++;
    std::map<work *, work_ptr> copies;
    work_ptr before = stream->last, end = std::make_shared<work>();
    for (const work_ptr &node : exec->nodes) {
        work_ptr copy = std::make_shared<work>();
        copy->run = node->run;
        for (const work_ptr &w : node->after)
            if (copies.count(w.get())) copy->after.push_back(copies[w.get()]);
        if (before) copy->after.push_back(before);
        copies[node.get()] = copy;
        end->after.push_back(copy);
        pending.push_back(copy);
    }
    end->run = [] {};
    if (before) end->after.push_back(before);
    pending.push_back(end);
    stream->last = end;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

// ------------------------------------------------------------------ memory

// Device memory lies against a page that faults.
static std::map<void *, std::pair<void *, size_t>> mappings;
static std::map<const char *, size_t> page_locked;

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    refuse_while_recording("device memory allocated while a stream is recorded");
    size_t rounded = (bytes + 15) / 16 * 16, pages = (rounded + 4095) / 4096 * 4096;
    void *mapping = mmap(nullptr, pages + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED || mprotect(mapping, pages, PROT_READ | PROT_WRITE) != 0)
        return cudaErrorMemoryAllocation;
    *memory = static_cast<char *>(mapping) + (pages - rounded);
    memset(*memory, 0xff, rounded); // NaN, as memory that nobody wrote may be
    mappings[*memory] = {mapping, pages + 4096};
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    if (!memory) return cudaSuccess;
    std::lock_guard<std::recursive_mutex> guard(lock);
    refuse_while_recording("device memory given back while a stream is recorded");
    run_all();
    auto found = mappings.find(memory);
    if (found == mappings.end()) abort();
    munmap(found->second.first, found->second.second);
    mappings.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **memory, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    *memory = malloc(bytes);
    if (*memory) page_locked[static_cast<const char *>(*memory)] = bytes;
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    run_all();
    page_locked.erase(static_cast<const char *>(memory));
    free(memory);
    return cudaSuccess;
}

static bool is_page_locked(const void *memory) {
    const char *at = static_cast<const char *>(memory);
    auto found = page_locked.upper_bound(at);
    if (found == page_locked.begin()) return false;
    --found;
    return at < found->first + found->second;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    bool locked = is_page_locked(kind == cudaMemcpyHostToDevice ? from : to);
    if (!locked && stream->recording) fail("a copy of pageable memory is recorded");
    if (locked) {
        queue(stream, [=] { memcpy(to, from, bytes); });
    } else if (kind == cudaMemcpyHostToDevice) {
        auto taken = std::make_shared<std::vector<char>>(static_cast<const char *>(from),
                                                         static_cast<const char *>(from) + bytes);
        queue(stream, [=] { memcpy(to, taken->data(), bytes); });
    } else {
        work_ptr copy = queue(stream, [=] { memcpy(to, from, bytes); });
        while (!copy->done) run_one();
    }
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t stream) {
    emulate_queue(stream, [=] { memset(to, byte, bytes); });
    return cudaSuccess;
}
