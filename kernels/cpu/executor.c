/* executor.c - memory and threads of the CPU backends.
 *
 * Units of work, a layer of some steps each, are independent: a thread keeps a unit's activations in its own caches,
 * and nothing is synchronised within a unit. Threads take the next unit when they are done with one, so a thread that
 * the system slows down takes fewer; results do not depend on who does what.
 *
 * Whose threads? Where the process has an OpenMP runtime of GCC's interface (torch brings one), its pool is used: after
 * the host's own parallel regions its threads spin for a while, and threads of ours would have to share their cores
 * with them (docs/performance.md has figures). Elsewhere an executor starts threads of its own at its first use, which
 * sleep between runs. A forked child inherits the memory but none of the threads, of either kind: it notices by its
 * process id and starts its own. */
#include <dlfcn.h>
#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__)
#include <dirent.h>
#include <link.h>
#endif

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
    /* GOMP_parallel(fn, data, num_threads, flags) of the host's OpenMP runtime, or NULL. */
    void (*host_parallel)(void (*)(void *), void *, unsigned, unsigned);
    void *host_library; /* Owned: a reference, so that it stays. */
    pid_t host_pid;     /* 0: not looked for yet */
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
    atomic_int next_lane; /* of the host's threads */
    atomic_int failed;
    btx_status status; /* of the first failure */
    btx_error failure;
    worker workers[]; /* [num_threads - 1] */
};

#define HUGE_PAGE ((size_t)2 << 20)

/* There is one CPU. */
static btx_status check_device(int32_t device_index, btx_error *error)
{
    if (device_index == 0)
        return BTX_OK;
    return btx_fail(error, BTX_INVALID_ARGUMENT, "there is no cpu:%d; the CPU has device index 0", (int)device_index);
}

btx_status btx_cpu_allocate(int32_t device_index, size_t bytes, void **memory, btx_error *error)
{
    btx_status status = check_device(device_index, error);
    *memory = NULL;
    if (status != BTX_OK)
        return status;
    if (bytes > SIZE_MAX - 64)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory: %zu bytes", bytes);
    size_t rounded = bytes == 0 ? 64 : (bytes + 63) / 64 * 64;
    int is_large = rounded >= 2 * HUGE_PAGE;
    if (posix_memalign(memory, is_large ? HUGE_PAGE : 64, rounded) != 0) {
        *memory = NULL;
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory: %zu bytes", bytes);
    }
#if defined(MADV_HUGEPAGE)
    if (is_large) /* whole pages only: what the last part of one would waste is not asked for */
        madvise(*memory, rounded / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
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
        int none = 0;
        if (atomic_compare_exchange_strong(&run->failed, &none, 1)) { /* read once all lanes have ended */
            run->status = status;
            run->failure = error;
        }
    }
}

#if defined(__linux__)
static int find_openmp(struct dl_phdr_info *info, size_t size, void *argument)
{
    const char **found = argument;
    const char *slash = info->dlpi_name != NULL ? strrchr(info->dlpi_name, '/') : NULL;
    (void)size;
    if (slash == NULL || (strncmp(slash, "/libgomp", 8) != 0 && strncmp(slash, "/libiomp5", 9) != 0))
        return 0;
    *found = info->dlpi_name;
    return 1;
}

/* Threads of this process; 0 where that cannot be told. */
static int num_threads_here(void)
{
    DIR *tasks = opendir("/proc/self/task");
    int count = 0;
    for (struct dirent *entry; tasks != NULL && (entry = readdir(tasks)) != NULL;)
        count += entry->d_name[0] != '.';
    if (tasks != NULL)
        closedir(tasks);
    return count;
}

/* The process that loaded this library. */
static pid_t loaded_in;

__attribute__((constructor)) static void remember_process(void)
{
    loaded_in = getpid();
}

/* Looks once, at the first run: a host that computes with OpenMP has started its threads by then. A forked child may
 * have inherited a pool whose threads do not exist here, for which the runtime would wait for ever. That it is one
 * shows where this library was loaded before the fork; else, where there is no other thread. */
static void find_host_threads(executor *run)
{
    const char *path = NULL;
    run->host_pid = getpid();
    dl_iterate_phdr(find_openmp, &path);
    if (path == NULL || run->host_pid != loaded_in || num_threads_here() < 2)
        return;
    run->host_library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (run->host_library != NULL) {
        void *symbol = dlsym(run->host_library, "GOMP_parallel");
        memcpy(&run->host_parallel, &symbol, sizeof symbol); /* C has no cast from data to function pointers */
    }
}
#else
static void find_host_threads(executor *run)
{
    run->host_pid = getpid();
}
#endif

/* What each of the host's threads runs. */
static void host_thread_main(void *argument)
{
    executor *run = argument;
    fenv_t host;
    int32_t lane = atomic_fetch_add(&run->next_lane, 1);
    if (lane >= run->num_threads)
        return;
    fegetenv(&host);
    fesetenv(FE_DFL_ENV);
    work(run, lane);
    fesetenv(&host);
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

btx_status btx_cpu_executor_create(int32_t device_index, int32_t num_threads, void **executor_out, btx_error *error)
{
    *executor_out = NULL;
    btx_status status = check_device(device_index, error);
    if (status != BTX_OK)
        return status;
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
    if (run->host_library != NULL)
        dlclose(run->host_library);
    free(run);
}

/* On threads of our own and the caller's. */
static void run_on_workers(executor *run)
{
    int together = run->num_units > 1;
    if (together)
        start_workers(run);
    together = together && run->num_started > 0;
    if (together) {
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
    if (together) {
        pthread_mutex_lock(&run->mutex);
        while (run->num_running > 0)
            pthread_cond_wait(&run->work_done, &run->mutex);
        pthread_mutex_unlock(&run->mutex);
    }
}

btx_status btx_cpu_executor_run(void *memory, int64_t num_units, btx_unit_function fn, void *context, btx_error *error)
{
    executor *run = memory;
    run->fn = fn;
    run->context = context;
    run->num_units = num_units;
    run->status = BTX_OK;
    atomic_store(&run->next_unit, 0);
    atomic_store(&run->next_lane, 0);
    atomic_store(&run->failed, 0);
    if (run->num_threads > 1 && run->host_pid == 0)
        find_host_threads(run);
    if (run->host_parallel != NULL && run->host_pid == getpid() && num_units > 1)
        run->host_parallel(host_thread_main, run, (unsigned)run->num_threads, 0);
    else
        run_on_workers(run);
    if (run->status != BTX_OK && error != NULL)
        *error = run->failure;
    return run->status;
}
