/* executor.c - memory and threads of the CPU backends.
 *
 * Units of work, a layer of some steps each, are independent: a thread keeps a unit's activations in its own caches,
 * and nothing is synchronised within a unit. Threads take the next unit when they are done with one, so a thread that
 * the system slows down takes fewer; results do not depend on who does what.
 *
 * The threads of an executor start at its first use and sleep between runs. A forked child inherits the memory
 * but none of the threads: it notices by its process id and starts its own. */
#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "cpu.h"

typedef struct executor executor;

typedef struct worker {
    executor *owner;
    pthread_t thread;
    int32_t lane;
} worker;

struct executor {
    int32_t num_threads; /* the caller's included */
    int32_t num_started; /* workers alive in process pid */
    pid_t pid;
    pthread_mutex_t mutex;
    pthread_cond_t work_ready, work_done;
    uint64_t generation; /* of the run the workers are to join */
    int32_t num_running; /* workers that have not finished this generation */
    int32_t stopping;
    /* The current run. */
    btx_unit_function fn;
    void *context;
    int64_t num_units;
    atomic_llong next_unit;
    atomic_int failed;
    btx_status status; /* of the first failure, under mutex */
    btx_error failure;
    worker workers[]; /* [num_threads - 1] */
};

btx_status btx_cpu_allocate(size_t bytes, void **memory, btx_error *error)
{
    *memory = NULL;
    if (bytes > SIZE_MAX - 64)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory: %zu bytes", bytes);
    size_t rounded = bytes == 0 ? 64 : (bytes + 63) / 64 * 64;
    if (posix_memalign(memory, 64, rounded) != 0) {
        *memory = NULL;
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory: %zu bytes", bytes);
    }
    return BTX_OK;
}

void btx_cpu_release(void *memory)
{
    free(memory);
}

static void work(executor *run, int32_t lane)
{
    while (!atomic_load(&run->failed)) {
        int64_t unit = atomic_fetch_add(&run->next_unit, 1);
        if (unit >= run->num_units)
            return;
        btx_error error = {{0}};
        btx_status status = run->fn(run->context, unit, lane, &error);
        if (status == BTX_OK)
            continue;
        pthread_mutex_lock(&run->mutex);
        if (!atomic_load(&run->failed)) {
            run->status = status;
            run->failure = error;
            atomic_store(&run->failed, 1);
        }
        pthread_mutex_unlock(&run->mutex);
    }
}

static void *worker_main(void *argument)
{
    worker *self = argument;
    executor *run = self->owner;
    uint64_t seen = 0;
    fesetenv(FE_DFL_ENV);
    pthread_mutex_lock(&run->mutex);
    for (;;) {
        while (run->generation == seen && !run->stopping)
            pthread_cond_wait(&run->work_ready, &run->mutex);
        if (run->stopping)
            break;
        seen = run->generation;
        pthread_mutex_unlock(&run->mutex);
        work(run, self->lane);
        pthread_mutex_lock(&run->mutex);
        if (--run->num_running == 0)
            pthread_cond_signal(&run->work_done);
    }
    pthread_mutex_unlock(&run->mutex);
    return NULL;
}

/* Starts the workers that are missing; fewer than asked for is slower, not an error. */
static void start_workers(executor *run)
{
    if (run->pid != getpid()) {
        run->pid = getpid();
        run->num_started = 0;
        run->generation = 0;
        pthread_mutex_init(&run->mutex, NULL);
        pthread_cond_init(&run->work_ready, NULL);
        pthread_cond_init(&run->work_done, NULL);
    }
    if (run->num_started == run->num_threads - 1)
        return;
    sigset_t all, callers; /* signals are the host's business, on the host's threads */
    sigfillset(&all);
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}; /* these are the thread's own */
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &callers);
    while (run->num_started < run->num_threads - 1) {
        worker *next = &run->workers[run->num_started];
        next->owner = run;
        next->lane = run->num_started + 1;
        /* A worker started late has seen no generation; it must not join a run that is over. */
        if (run->generation != 0 || pthread_create(&next->thread, NULL, worker_main, next) != 0)
            break;
        run->num_started++;
    }
    pthread_sigmask(SIG_SETMASK, &callers, NULL);
}

btx_status btx_cpu_executor_create(int32_t num_threads, void **executor_out, btx_error *error)
{
    executor *created = calloc(1, sizeof *created + sizeof(worker) * (size_t)(num_threads - 1));
    *executor_out = created;
    if (created == NULL)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for an executor of %d threads", (int)num_threads);
    created->num_threads = num_threads;
    return BTX_OK; /* pid 0: the first run starts the workers */
}

void btx_cpu_executor_destroy(void *memory)
{
    executor *run = memory;
    if (run == NULL)
        return;
    if (run->pid == getpid()) {
        pthread_mutex_lock(&run->mutex);
        run->stopping = 1;
        pthread_cond_broadcast(&run->work_ready);
        pthread_mutex_unlock(&run->mutex);
        for (int32_t i = 0; i < run->num_started; i++)
            pthread_join(run->workers[i].thread, NULL);
        pthread_mutex_destroy(&run->mutex);
        pthread_cond_destroy(&run->work_ready);
        pthread_cond_destroy(&run->work_done);
    }
    free(run);
}

btx_status btx_cpu_executor_run(void *memory, int64_t num_units, btx_unit_function fn, void *context, btx_error *error)
{
    executor *run = memory;
    start_workers(run);
    run->fn = fn;
    run->context = context;
    run->num_units = num_units;
    run->status = BTX_OK;
    atomic_store(&run->next_unit, 0);
    atomic_store(&run->failed, 0);
    if (run->num_started > 0 && num_units > 1) {
        pthread_mutex_lock(&run->mutex);
        run->generation++;
        run->num_running = run->num_started;
        pthread_cond_broadcast(&run->work_ready);
        pthread_mutex_unlock(&run->mutex);
    }
    /* A host that flushes subnormals to zero gets the same bits as one that does not, on any number of threads. */
    fenv_t host;
    fegetenv(&host);
    fesetenv(FE_DFL_ENV);
    work(run, 0);
    fesetenv(&host);
    if (run->num_started > 0 && num_units > 1) {
        pthread_mutex_lock(&run->mutex);
        while (run->num_running > 0)
            pthread_cond_wait(&run->work_done, &run->mutex);
        pthread_mutex_unlock(&run->mutex);
    }
    if (run->status != BTX_OK && error != NULL)
        *error = run->failure;
    return run->status;
}
