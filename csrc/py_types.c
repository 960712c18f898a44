/* py_types.c - KVCache, QueryCache, Workspace, Processor, Linear, attention_mass, select_top_k.
 *
 * A cache object keeps the Python tensors it was given, and the views they had then. Each call looks at the tensors
 * anew and refuses those that moved or changed shape, so that memory freed or resized behind our back is never
 * touched. */
#include <float.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "py_module.h"

/* ---- shared ------------------------------------------------------------------------------------- */

static PyObject *tuple_of(PyObject *sequence, const char *name)
{
    PyObject *tuple = PySequence_Tuple(sequence);
    if (tuple == NULL && PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_Format(PyExc_TypeError, "%s must be a sequence of tensors, one per layer", name);
    return tuple;
}

static int same_view(const btx_tensor *a, const btx_tensor *b)
{
    if (a->data != b->data || a->dtype != b->dtype || a->num_dims != b->num_dims || a->device.type != b->device.type ||
        a->device.index != b->device.index)
        return 0;
    for (int32_t d = 0; d < a->num_dims; d++) {
        if (a->shape[d] != b->shape[d] || (a->shape[d] > 1 && a->stride[d] != b->stride[d]))
            return 0;
    }
    return 1;
}

static int check_unmoved(module_state *state, const borrowed_list *now, const btx_tensor *then, Py_ssize_t num_layers,
                         const char *const *names)
{
    for (Py_ssize_t i = 0; i < now->length; i++) {
        if (!same_view(&now->views[i], &then[i])) {
            PyErr_Format(state->invalid_argument_error,
                         "%s of layer %zd moved or changed shape since the cache was bound; bind it again",
                         names[i / num_layers], i % num_layers);
            return -1;
        }
    }
    return 0;
}

static PyObject *view_dtype(const btx_tensor *view)
{
    return PyUnicode_FromString(btx_dtype_name(view->dtype));
}

/* stream: None, which leaves both as they are, or a cudaStream_t as a number. *dlpack: new, what DLPack calls it. */
static int parse_stream(PyObject *stream, void **native, PyObject **dlpack)
{
    if (stream == Py_None)
        return 0;
    if (!PyLong_Check(stream)) {
        PyErr_Format(PyExc_TypeError, "stream is %R; it must be None or a cudaStream_t as a number", stream);
        return -1;
    }
    unsigned long long number = PyLong_AsUnsignedLongLong(stream);
    if (PyErr_Occurred())
        return -1;
    *native = (void *)(uintptr_t)number;
    /* DLPack calls the default stream 1. */
    *dlpack = number == 0 ? PyLong_FromLong(1) : Py_NewRef(stream);
    return *dlpack == NULL ? -1 : 0;
}

/* Frees an instance of a heap type. */
static void free_instance(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *new_instance(PyTypeObject *type)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return allocate(type, 0);
}

/* ---- KVCache and QueryCache ----------------------------------------------------------------------- */

typedef struct cache_object {
    PyObject_HEAD PyObject *tensors; /* Owned: tuple of num_tensors tensors (keys, then values; or queries). */
    PyObject *table;                 /* Owned: the query table, or NULL. */
    btx_tensor *views;               /* Owned: as they were when bound. */
    Py_ssize_t num_layers;
    int heads_first; /* the tensors are [num_blocks, num_kv_heads, block_size, head_dim] */
} cache_object;

static const char *const kv_names[2] = {"keys", "values"};
static const char *const query_names[1] = {"queries"};

static int cache_traverse(PyObject *object, visitproc visit, void *arg)
{
    cache_object *self = (cache_object *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->tensors);
    Py_VISIT(self->table);
    return 0;
}

static int cache_clear(PyObject *object)
{
    cache_object *self = (cache_object *)object;
    Py_CLEAR(self->tensors);
    Py_CLEAR(self->table);
    return 0;
}

static void cache_dealloc(PyObject *object)
{
    cache_object *self = (cache_object *)object;
    PyObject_GC_UnTrack(object);
    cache_clear(object);
    PyMem_Free(self->views);
    free_instance(object);
}

/* Borrows the tensors (a tuple of num_layers times the number of names) and views each as
 * [num_blocks, block_size, heads, head_dim]. then: what they were when they were bound; NULL: now. */
static int borrow_layers(module_state *state, PyObject *tensors, Py_ssize_t num_layers, const char *const *names,
                         int heads_first, const btx_tensor *then, PyObject *stream, borrowed_list *list)
{
    Py_ssize_t size = PyTuple_Size(tensors);
    if (size < 0 || borrowed_list_init(list, size, stream) < 0)
        return -1;
    for (Py_ssize_t i = 0; i < size; i++) {
        btx_tensor *view = &list->views[i];
        PyObject *tensor = PyTuple_GetItem(tensors, i);
        const char *name = names[i / num_layers];
        if (then == NULL ? borrow_tensor(state, list, i, tensor, name, i % num_layers) < 0
                         : look_at_tensor(state, list, i, tensor, then[i].read_only, name, i % num_layers) < 0)
            return -1;
        if (view->num_dims != 4) {
            PyErr_Format(state->invalid_argument_error, "%s of layer %zd have %d dimensions; they must have 4",
                         names[i / num_layers], i % num_layers, (int)view->num_dims);
            return -1;
        }
        if (heads_first) {
            int64_t heads = view->shape[1], head_stride = view->stride[1];
            view->shape[1] = view->shape[2], view->stride[1] = view->stride[2];
            view->shape[2] = heads, view->stride[2] = head_stride;
        }
    }
    return 0;
}

/* Takes over tensors after looking at each once. */
static PyObject *cache_new(PyTypeObject *type, PyObject *tensors, PyObject *table, Py_ssize_t num_layers,
                           const char *const *names, int heads_first)
{
    module_state *state = module_state_of_self(type);
    borrowed_list borrowed = {0};
    cache_object *self = NULL;
    if (num_layers == 0) {
        PyErr_Format(state->invalid_argument_error, "%s: no layers; pass one tensor per layer", names[0]);
        goto cleanup;
    }
    if (borrow_layers(state, tensors, num_layers, names, heads_first, NULL, NULL, &borrowed) < 0)
        goto cleanup;
    self = (cache_object *)new_instance(type);
    if (self == NULL)
        goto cleanup;
    self->tensors = Py_NewRef(tensors);
    self->table = Py_XNewRef(table);
    self->num_layers = num_layers;
    self->heads_first = heads_first;
    self->views = borrowed.views;
    borrowed.views = NULL;

cleanup:
    borrowed_list_clear(&borrowed);
    return (PyObject *)self;
}

/* The tensors again, for one call. */
static int cache_borrow(module_state *state, cache_object *self, PyObject *stream, borrowed_list *list,
                        const char *const *names)
{
    if (borrow_layers(state, self->tensors, self->num_layers, names, self->heads_first, self->views, stream, list) < 0)
        return -1;
    return check_unmoved(state, list, self->views, self->num_layers, names);
}

static PyObject *kv_cache_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"keys", "values", "heads_first", NULL};
    PyObject *keys = NULL, *values = NULL, *key_tuple = NULL, *value_tuple = NULL, *both = NULL, *self = NULL;
    int heads_first = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|$p:KVCache", names, &keys, &values, &heads_first))
        return NULL;
    key_tuple = tuple_of(keys, "keys");
    if (key_tuple == NULL)
        goto cleanup;
    value_tuple = tuple_of(values, "values");
    if (value_tuple == NULL)
        goto cleanup;
    if (PyTuple_Size(key_tuple) != PyTuple_Size(value_tuple)) {
        PyErr_Format(module_state_of_self(type)->invalid_argument_error,
                     "keys have %zd layers, values have %zd; pass one of each per layer", PyTuple_Size(key_tuple),
                     PyTuple_Size(value_tuple));
        goto cleanup;
    }
    both = PySequence_Concat(key_tuple, value_tuple);
    if (both != NULL)
        self = cache_new(type, both, NULL, PyTuple_Size(key_tuple), kv_names, heads_first);

cleanup:
    Py_XDECREF(key_tuple);
    Py_XDECREF(value_tuple);
    Py_XDECREF(both);
    return self;
}

static PyObject *query_cache_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"queries", "query_table", NULL};
    PyObject *queries = NULL, *table = Py_None, *tuple = NULL, *self = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O:QueryCache", names, &queries, &table))
        return NULL;
    tuple = tuple_of(queries, "queries");
    if (tuple != NULL)
        self = cache_new(type, tuple, table == Py_None ? NULL : table, PyTuple_Size(tuple), query_names, 0);
    Py_XDECREF(tuple);
    return self;
}

static PyObject *cache_num_layers(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromSsize_t(((cache_object *)self)->num_layers);
}

/* closure: which dimension of the first view. */
static PyObject *cache_dimension(PyObject *self, void *closure)
{
    return PyLong_FromLongLong(((cache_object *)self)->views[0].shape[(intptr_t)closure]);
}

static PyObject *cache_dtype(PyObject *self, void *closure)
{
    (void)closure;
    return view_dtype(&((cache_object *)self)->views[0]);
}

static PyGetSetDef kv_cache_getset[] = {
    {"num_layers", cache_num_layers, NULL, "Number of layers.", NULL},
    {"num_blocks", cache_dimension, NULL, "Blocks of each layer.", (void *)0},
    {"block_size", cache_dimension, NULL, "Positions in a block.", (void *)1},
    {"num_kv_heads", cache_dimension, NULL, "KV heads.", (void *)2},
    {"head_dim", cache_dimension, NULL, "Head size.", (void *)3},
    {"dtype", cache_dtype, NULL, "\"float32\", \"float16\" or \"bfloat16\".", NULL},
    {0},
};

static PyGetSetDef query_cache_getset[] = {
    {"num_layers", cache_num_layers, NULL, "Number of layers.", NULL},
    {"num_pages", cache_dimension, NULL, "Pages of each layer.", (void *)0},
    {"page_size", cache_dimension, NULL, "Query rows in a page.", (void *)1},
    {"num_query_heads", cache_dimension, NULL, "Query heads.", (void *)2},
    {"head_dim", cache_dimension, NULL, "Head size.", (void *)3},
    {"dtype", cache_dtype, NULL, "\"float32\", \"float16\" or \"bfloat16\".", NULL},
    {0},
};

PyDoc_STRVAR(
    kv_cache_doc,
    "KVCache(keys, values, *, heads_first=False)\n--\n\n"
    "A stack's KV cache, borrowed through DLPack: per layer one key and one value tensor\n"
    "[num_blocks, block_size, num_kv_heads, head_dim], any strides, float32, float16 or bfloat16.\n"
    "heads_first: they are [num_blocks, num_kv_heads, block_size, head_dim]; spares a transposed view of each.\n"
    "The tensors are kept alive; a call made after one of them moved is refused.");

PyDoc_STRVAR(query_cache_doc,
             "QueryCache(queries, query_table=None)\n--\n\n"
             "Captured queries, after RoPE: per layer a tensor [num_pages, page_size, num_query_heads, head_dim].\n"
             "The query of position p of sequence s is in page query_table[s, (p // page_size) % pages_per_sequence],\n"
             "row p % page_size. query_table: int32 [num_sequences, pages_per_sequence]; None: page s is sequence s's\n"
             "only one, a ring of page_size rows.");

static PyType_Slot kv_cache_slots[] = {
    {Py_tp_doc, (void *)kv_cache_doc},
    {Py_tp_new, kv_cache_new},
    {Py_tp_dealloc, cache_dealloc},
    {Py_tp_traverse, cache_traverse},
    {Py_tp_clear, cache_clear},
    {Py_tp_getset, kv_cache_getset},
    {0, NULL},
};

PyDoc_STRVAR(capture_doc,
             "capture($self, layer, query, slots, block_to_page, *, workspace, stream=None)\n--\n\n"
             "Copies the queries of tokens that attention has just computed to their pages of one layer: query\n"
             "[num_tokens, num_query_heads, head_dim], after RoPE, in the pages' dtype; slots int64 [n], of the first\n"
             "n tokens: where the stack's cache keeps a token, block * page_size + row, negative: skipped;\n"
             "block_to_page int32 [num_blocks]: the page that stands for a block, negative: skipped. All are of the\n"
             "workspace's device, where the copy is enqueued on stream (a cudaStream_t as a number; None: that on\n"
             "which query's library works now); a CUDA graph may hold it.\n\n"
             "InvalidArgumentError: nothing was written.");

static PyObject *query_cache_capture(PyObject *object, PyObject *args, PyObject *keywords);

static PyMethodDef query_cache_methods[] = {
    {"capture", (PyCFunction)(void (*)(void))query_cache_capture, METH_VARARGS | METH_KEYWORDS, capture_doc},
    {0},
};

static PyType_Slot query_cache_slots[] = {
    {Py_tp_doc, (void *)query_cache_doc}, {Py_tp_new, query_cache_new},
    {Py_tp_dealloc, cache_dealloc},       {Py_tp_traverse, cache_traverse},
    {Py_tp_clear, cache_clear},           {Py_tp_getset, query_cache_getset},
    {Py_tp_methods, query_cache_methods}, {0, NULL},
};

PyType_Spec kv_cache_spec = {
    .name = "bottleneck_ext.KVCache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = kv_cache_slots,
};

PyType_Spec query_cache_spec = {
    .name = "bottleneck_ext.QueryCache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = query_cache_slots,
};

/* ---- Workspace ------------------------------------------------------------------------------------ */

typedef struct workspace_object {
    PyObject_HEAD btx_workspace *workspace; /* Owned. */
    const btx_backend *backend;
    int32_t device_index;
    pid_t busy; /* the process in which a call is running without the GIL, or 0 */
} workspace_object;

static PyObject *workspace_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"num_threads", "backend", "reserve", NULL};
    int num_threads = 1;
    Py_ssize_t reserve = 0;
    const char *backend_name = "cpu";
    module_state *state = module_state_of_self(type);
    btx_error error = {{0}};
    btx_workspace *workspace = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|is$n:Workspace", names, &num_threads, &backend_name, &reserve))
        return NULL;
    if (reserve < 0)
        return PyErr_Format(state->invalid_argument_error, "reserve is %zd; it must be 0 or more bytes", reserve);
    int32_t device_index;
    const btx_backend *backend = find_backend(state, backend_name, &device_index);
    if (backend == NULL)
        return NULL;
    btx_status status = btx_workspace_create(backend, device_index, num_threads, &workspace, &error);
    if (status == BTX_OK)
        status = btx_workspace_reserve(workspace, (size_t)reserve, &error);
    if (status != BTX_OK) {
        btx_workspace_destroy(workspace);
        return raise_status(state, status, &error);
    }
    workspace_object *self = (workspace_object *)new_instance(type);
    if (self == NULL) {
        btx_workspace_destroy(workspace);
        return NULL;
    }
    self->workspace = workspace;
    self->backend = backend;
    self->device_index = device_index;
    return (PyObject *)self;
}

static void workspace_dealloc(PyObject *object)
{
    btx_workspace *workspace = ((workspace_object *)object)->workspace;
    Py_BEGIN_ALLOW_THREADS /* joins the workers */
    btx_workspace_destroy(workspace);
    Py_END_ALLOW_THREADS
    free_instance(object);
}

static PyObject *backend_full_name(const btx_backend *backend, int32_t device_index)
{
    if (backend->variant[0] == '\0')
        return PyUnicode_FromFormat("%s:%d", backend->name, (int)device_index);
    return PyUnicode_FromFormat("%s:%s", backend->name, backend->variant);
}

static PyObject *workspace_num_threads(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(btx_workspace_num_threads(((workspace_object *)self)->workspace));
}

static PyObject *workspace_nbytes(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(btx_workspace_bytes(((workspace_object *)self)->workspace));
}

static PyObject *workspace_skipped_steps(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLongLong(btx_workspace_skipped_steps(((workspace_object *)self)->workspace));
}

static PyObject *workspace_backend(PyObject *self, void *closure)
{
    (void)closure;
    const workspace_object *workspace = (workspace_object *)self;
    return backend_full_name(workspace->backend, workspace->device_index);
}

/* Marks the workspace as in use; the GIL is about to be released. */
static int workspace_enter(module_state *state, workspace_object *workspace)
{
    if (workspace->busy != 0) {
        PyErr_SetString(state->invalid_argument_error,
                        workspace->busy == getpid()
                            ? "the workspace is in use by another thread; give each thread its own"
                            : "the workspace was in use when this process was forked; make a new one");
        return -1;
    }
    workspace->busy = getpid();
    return 0;
}

PyDoc_STRVAR(synchronize_doc,
             "synchronize($self)\n--\n\n"
             "Waits until everything called with this workspace is done. A boundary that its device refused after the\n"
             "call had returned is told here, or by a later call, once it is done, which then does nothing else:\n"
             "InvalidArgumentError, nothing of the refused one was written. One call tells of one. After DeviceError\n"
             "discard the sequences of all that was not waited for.");

static PyObject *workspace_synchronize(PyObject *object, PyObject *unused)
{
    (void)unused;
    workspace_object *self = (workspace_object *)object;
    module_state *state = module_state_of_self(Py_TYPE(object));
    btx_error error = {{0}};
    if (workspace_enter(state, self) < 0)
        return NULL;
    btx_status status;
    Py_BEGIN_ALLOW_THREADS
    status = btx_workspace_synchronize(self->workspace, &error);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    return status == BTX_OK ? Py_NewRef(Py_None) : raise_status(state, status, &error);
}

static PyMethodDef workspace_methods[] = {
    {"synchronize", workspace_synchronize, METH_NOARGS, synchronize_doc},
    {0},
};

static PyGetSetDef workspace_getset[] = {
    {"num_threads", workspace_num_threads, NULL, "Threads a call may use, the caller's own included.", NULL},
    {"nbytes", workspace_nbytes, NULL, "Bytes of staging memory: reserved, or grown to the largest call so far.", NULL},
    {"skipped_steps", workspace_skipped_steps, NULL,
     "Steps that max_relative_edit kept from being written, of all calls that are known to be done.", NULL},
    {"backend", workspace_backend, NULL, "For instance \"cpu:avx2\" or \"cuda:0\".", NULL},
    {0},
};

PyDoc_STRVAR(workspace_doc, "Workspace(num_threads=1, backend=\"cpu\", *, reserve=0)\n--\n\n"
                            "Staging memory and threads of one caller: one call at a time. Its threads start at the\n"
                            "first call and sleep between calls; a forked child starts its own. Of a CUDA backend the\n"
                            "caller's thread is enough. reserve: bytes to allocate now rather than when calls need\n"
                            "them, see Processor.workspace_bytes.");

static PyType_Slot workspace_slots[] = {
    {Py_tp_doc, (void *)workspace_doc}, {Py_tp_new, workspace_new},         {Py_tp_dealloc, workspace_dealloc},
    {Py_tp_getset, workspace_getset},   {Py_tp_methods, workspace_methods}, {0, NULL},
};

PyType_Spec workspace_spec = {
    .name = "bottleneck_ext.Workspace",
    .basicsize = sizeof(workspace_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = workspace_slots,
};

/* ---- query capture ---------------------------------------------------------------------------------- */

static PyObject *query_cache_capture(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"layer", "query", "slots", "block_to_page", "workspace", "stream", NULL};
    static const char *const tensor_names[4] = {"query", "slots", "block_to_page", "queries"};
    cache_object *self = (cache_object *)object;
    module_state *state = module_state_of_self(Py_TYPE(object));
    PyObject *tensors[4] = {NULL}, *workspace = NULL, *stream = Py_None, *number = NULL, *result = NULL;
    Py_ssize_t layer;
    borrowed_list borrowed = {0};
    void *native_stream = NULL;
    btx_error error = {{0}};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "nOOO|$O!O:capture", names, &layer, &tensors[0], &tensors[1],
                                     &tensors[2], state->workspace_type, &workspace, &stream))
        return NULL;
    if (workspace == NULL) {
        PyErr_SetString(PyExc_TypeError, "capture() needs the keyword argument workspace");
        return NULL;
    }
    if (layer < 0 || layer >= self->num_layers)
        return PyErr_Format(state->invalid_argument_error, "layer is %zd; there are %zd layers", layer,
                            self->num_layers);
    const workspace_object *of = (workspace_object *)workspace;
    tensors[3] = PyTuple_GetItem(self->tensors, layer);
    if (parse_stream(stream, &native_stream, &number) < 0 || borrowed_list_init(&borrowed, 4, number) < 0)
        goto cleanup;
    for (Py_ssize_t i = 0; i < 4; i++) { /* all but the last are only read */
        if (look_at_tensor(state, &borrowed, i, tensors[i], i == 3 && self->views[layer].read_only, tensor_names[i],
                           i == 3 ? layer : -1) < 0)
            goto cleanup;
    }
    if (!same_view(&borrowed.views[3], &self->views[layer])) {
        PyErr_Format(state->invalid_argument_error,
                     "queries of layer %zd moved or changed shape since the cache was bound; bind it again", layer);
        goto cleanup;
    }
    if (stream == Py_None)
        native_stream = current_stream(state, &borrowed, tensors[0]);
    btx_status status = btx_capture_queries(of->backend, of->device_index, &borrowed.views[0], &borrowed.views[1],
                                            &borrowed.views[2], &borrowed.views[3], native_stream, &error);
    result = status == BTX_OK ? Py_NewRef(Py_None) : raise_status(state, status, &error);

cleanup:
    Py_XDECREF(number);
    borrowed_list_clear(&borrowed);
    return result;
}

/* ---- one boundary's arguments ------------------------------------------------------------------------ */

typedef struct boundary_arguments {
    borrowed_list kv, queries;
    borrowed_list tables; /* block table, query table; absent where the identity serves */
    PyObject *stream;     /* Owned: the stream's number, or NULL: the library's current one */
    int32_t *identity;    /* Owned: [max(num_blocks, num_pages)] */
    btx_step *steps;      /* Owned. */
    btx_kv_cache kv_cache;
    btx_query_cache query_cache;
    btx_boundary boundary;
} boundary_arguments;

static void boundary_arguments_clear(boundary_arguments *arguments)
{
    borrowed_list_clear(&arguments->kv);
    borrowed_list_clear(&arguments->queries);
    borrowed_list_clear(&arguments->tables);
    Py_XDECREF(arguments->stream);
    PyMem_Free(arguments->identity);
    PyMem_Free(arguments->steps);
}

/* steps: a sequence of (sequence, sequence_begin, step_begin, step_end) or those and top_k. */
static int parse_steps(module_state *state, PyObject *steps, boundary_arguments *arguments)
{
    PyObject *fast = PySequence_Tuple(steps);
    if (fast == NULL)
        return -1;
    Py_ssize_t count = PyTuple_Size(fast);
    arguments->steps = PyMem_Calloc((size_t)count + 1, sizeof *arguments->steps);
    if (arguments->steps == NULL) {
        Py_DECREF(fast);
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        long long sequence, sequence_begin, step_begin, step_end, top_k = 0;
        PyObject *tuple = PySequence_Tuple(PyTuple_GetItem(fast, i));
        int parsed = tuple != NULL &&
                     PyArg_ParseTuple(tuple, "LLLL|L:step", &sequence, &sequence_begin, &step_begin, &step_end, &top_k);
        const int is_given = parsed && PyTuple_Size(tuple) > 4;
        Py_XDECREF(tuple);
        if (!parsed) {
            Py_DECREF(fast);
            return -1;
        }
        if (top_k < 0) { /* below, -1 has a meaning */
            PyErr_Format(state->invalid_argument_error,
                         "step %zd is to recall %lld positions; its top_k must be 0 to the Processor's, or left out", i,
                         top_k);
            Py_DECREF(fast);
            return -1;
        }
        arguments->steps[i] =
            (btx_step){sequence, sequence_begin, step_begin, step_end, is_given && top_k == 0 ? -1 : top_k};
    }
    Py_DECREF(fast);
    arguments->boundary.steps = arguments->steps;
    arguments->boundary.num_steps = count;
    return 0;
}

static int parse_table(module_state *state, boundary_arguments *arguments, Py_ssize_t index, PyObject *table,
                       const char *name, int64_t rows, btx_tensor *out)
{
    if (table == NULL || table == Py_None) {
        const int64_t shape[2] = {rows, 1};
        *out = btx_tensor_contiguous(arguments->identity, BTX_I32, 2, shape);
        return 0;
    }
    if (borrow_tensor(state, &arguments->tables, index, table, name, -1) < 0)
        return -1;
    *out = arguments->tables.views[index];
    return 0;
}

/* As float32. What is not zero does not become zero, which has a meaning of its own, by being rounded; nor may it be a
 * subnormal, which is zero to a host that flushes them. */
static float narrow(double value)
{
    float narrowed = (float)value;
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits); /* a comparison might flush it */
    if (bits << 1 == 0 || isnan(narrowed) || fabsf(narrowed) >= FLT_MIN)
        return narrowed;
    return bits >> 63 ? -FLT_MIN : FLT_MIN;
}

static int boundary_arguments_parse(module_state *state, boundary_arguments *arguments, cache_object *kv_cache,
                                    cache_object *query_cache, PyObject *steps, PyObject *block_table,
                                    double softmax_scale, double max_relative_edit, PyObject *stream)
{
    if (parse_stream(stream, &arguments->boundary.stream, &arguments->stream) < 0 ||
        cache_borrow(state, kv_cache, arguments->stream, &arguments->kv, kv_names) < 0 ||
        cache_borrow(state, query_cache, arguments->stream, &arguments->queries, query_names) < 0 ||
        borrowed_list_init(&arguments->tables, 2, NULL) < 0 || parse_steps(state, steps, arguments) < 0)
        return -1;
    if (stream == Py_None)
        arguments->boundary.stream = current_stream(state, &arguments->kv, PyTuple_GetItem(kv_cache->tensors, 0));
    int64_t num_blocks = kv_cache->views[0].shape[0], num_pages = query_cache->views[0].shape[0];
    int64_t longest = num_blocks > num_pages ? num_blocks : num_pages;
    int64_t rows = num_blocks < num_pages ? num_blocks : num_pages;
    if (longest > INT32_MAX) {
        PyErr_Format(state->invalid_argument_error, "the caches have %lld blocks; at most 2^31 - 1 can be addressed",
                     (long long)longest);
        return -1;
    }
    int defaults = query_cache->table == NULL || block_table == Py_None;
    arguments->identity = PyMem_Calloc(defaults ? (size_t)longest + 1 : 1, sizeof(int32_t));
    if (arguments->identity == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t i = 0; defaults && i < longest; i++)
        arguments->identity[i] = (int32_t)i;
    arguments->kv_cache =
        (btx_kv_cache){(int32_t)kv_cache->num_layers, arguments->kv.views, arguments->kv.views + kv_cache->num_layers};
    arguments->query_cache = (btx_query_cache){(int32_t)query_cache->num_layers, arguments->queries.views};
    arguments->boundary.kv_cache = &arguments->kv_cache;
    arguments->boundary.query_cache = &arguments->query_cache;
    arguments->boundary.softmax_scale = narrow(softmax_scale);
    arguments->boundary.max_relative_edit = narrow(max_relative_edit);
    if (block_table == Py_None) {
        if (parse_table(state, arguments, 1, query_cache->table, "query_table", rows,
                        &arguments->boundary.query_table) < 0)
            return -1;
        if (query_cache->table != NULL && arguments->boundary.query_table.num_dims == 2)
            rows = arguments->boundary.query_table.shape[0] < num_blocks ? arguments->boundary.query_table.shape[0]
                                                                         : num_blocks;
        return parse_table(state, arguments, 0, NULL, "block_table", rows, &arguments->boundary.block_table);
    }
    if (parse_table(state, arguments, 0, block_table, "block_table", 0, &arguments->boundary.block_table) < 0)
        return -1;
    if (arguments->boundary.block_table.num_dims == 2)
        rows = arguments->boundary.block_table.shape[0];
    if (query_cache->table == NULL && rows > num_pages) {
        PyErr_Format(state->invalid_argument_error,
                     "the block table has %lld sequences, the query cache %lld pages; pass a query_table",
                     (long long)rows, (long long)num_pages);
        return -1;
    }
    return parse_table(state, arguments, 1, query_cache->table, "query_table", rows, &arguments->boundary.query_table);
}

/* ---- Processor -------------------------------------------------------------------------------------- */

typedef struct processor_object {
    PyObject_HEAD btx_processor *processor; /* Owned. */
} processor_object;

/* config[name] as a new reference; KeyError with a sentence where it is missing. */
static PyObject *get_setting(PyObject *config, const char *name)
{
    PyObject *value = PyMapping_GetItemString(config, name);
    if (value == NULL && PyErr_ExceptionMatches(PyExc_KeyError))
        PyErr_Format(PyExc_KeyError, "the configuration lacks %s", name);
    return value;
}

static int read_int(PyObject *config, const char *name, int32_t *out)
{
    PyObject *value = get_setting(config, name);
    if (value == NULL)
        return -1;
    long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_Format(PyExc_TypeError, "%s is %R; it must be an integer", name, value);
    Py_DECREF(value);
    if (number == -1 && PyErr_Occurred())
        return -1;
    if (number < INT32_MIN || number > INT32_MAX) {
        PyErr_Format(PyExc_OverflowError, "%s is %lld; it does not fit 32 bits", name, number);
        return -1;
    }
    *out = (int32_t)number;
    return 0;
}

static int read_number(PyObject *config, const char *name, float *out)
{
    PyObject *value = get_setting(config, name);
    if (value == NULL)
        return -1;
    double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_Format(PyExc_TypeError, "%s is %R; it must be a number", name, value);
    Py_DECREF(value);
    if (number == -1.0 && PyErr_Occurred())
        return -1;
    *out = (float)number;
    return 0;
}

/* rope_inv_freq: None, or a sequence of head_dim / 2 numbers. */
static int read_inv_freq(module_state *state, PyObject *config, btx_config *out, float **owned)
{
    PyObject *value = get_setting(config, "rope_inv_freq");
    if (value == NULL)
        return -1;
    out->key_space = value == Py_None ? BTX_KEYS_ROTATED : BTX_KEYS_UNROTATED;
    PyObject *tuple = value == Py_None ? NULL : PySequence_Tuple(value);
    int missing = value != Py_None && tuple == NULL;
    Py_DECREF(value);
    if (tuple == NULL)
        return missing ? -1 : 0;
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count * 2 != out->head_dim) {
        PyErr_Format(state->invalid_argument_error,
                     "rope_inv_freq has %zd entries for head_dim %d; it must have half "
                     "as many",
                     count, (int)out->head_dim);
        Py_DECREF(tuple);
        return -1;
    }
    *owned = PyMem_Calloc((size_t)count + 1, sizeof **owned);
    if (*owned == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; *owned != NULL && i < count; i++) {
        (*owned)[i] = (float)PyFloat_AsDouble(PyTuple_GetItem(tuple, i));
        if (PyErr_Occurred())
            break;
    }
    Py_DECREF(tuple);
    out->rope_inv_freq = *owned;
    return PyErr_Occurred() ? -1 : 0;
}

static int read_weight_dtype(module_state *state, const char *name, btx_dtype *out)
{
    if (strcmp(name, "float32") == 0)
        *out = BTX_F32;
    else if (strcmp(name, "bfloat16") == 0)
        *out = BTX_BF16;
    else {
        PyErr_Format(state->invalid_argument_error, "weight_dtype is '%s'; it must be 'float32' or 'bfloat16'", name);
        return -1;
    }
    return 0;
}

static int read_config(module_state *state, PyObject *config, const char *weight_dtype, btx_config *out,
                       float **inv_freq)
{
    if (read_weight_dtype(state, weight_dtype, &out->weight_dtype) < 0)
        return -1;
    if (read_int(config, "num_layers", &out->num_layers) < 0 ||
        read_int(config, "num_kv_heads", &out->num_kv_heads) < 0 ||
        read_int(config, "num_query_heads", &out->num_query_heads) < 0 ||
        read_int(config, "head_dim", &out->head_dim) < 0 ||
        read_int(config, "processor_dim", &out->processor_dim) < 0 ||
        read_int(config, "processor_heads", &out->processor_heads) < 0 ||
        read_int(config, "processor_mlp_dim", &out->processor_mlp_dim) < 0 ||
        read_int(config, "top_k", &out->top_k) < 0 || read_int(config, "recent_window", &out->recent_window) < 0 ||
        read_number(config, "norm_eps", &out->norm_eps) < 0 || read_inv_freq(state, config, out, inv_freq) < 0)
        return -1;
    btx_error error = {{0}};
    btx_status status = btx_config_check(out, &error);
    if (status != BTX_OK) {
        raise_status(state, status, &error);
        return -1;
    }
    return 0;
}

static int borrow_weights(module_state *state, PyObject *weights, int32_t num_layers, borrowed_list *list)
{
    if (borrowed_list_init(list, (Py_ssize_t)num_layers * BTX_NUM_WEIGHTS, NULL) < 0)
        return -1;
    for (Py_ssize_t i = 0; i < list->length; i++) {
        char name[64];
        PyOS_snprintf(name, sizeof name, "layers.%d.%s", (int)(i / BTX_NUM_WEIGHTS),
                      btx_weight_name((btx_weight)(i % BTX_NUM_WEIGHTS)));
        PyObject *tensor = PyMapping_GetItemString(weights, name);
        if (tensor == NULL) {
            if (PyErr_ExceptionMatches(PyExc_KeyError))
                PyErr_Format(state->invalid_argument_error, "tensor %s is missing", name);
            return -1;
        }
        int borrowed = borrow_tensor(state, list, i, tensor, name, -1);
        Py_DECREF(tensor);
        if (borrowed < 0)
            return -1;
    }
    return 0;
}

static PyObject *processor_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"config", "weights", "weight_dtype", "backend", NULL};
    PyObject *config_mapping = NULL, *weights = NULL;
    const char *weight_dtype = "float32", *backend_name = "cpu";
    module_state *state = module_state_of_self(type);
    borrowed_list borrowed = {0};
    float *inv_freq = NULL;
    btx_config config = {0};
    btx_processor *processor = NULL;
    btx_error error = {{0}};
    processor_object *self = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|$ss:Processor", names, &config_mapping, &weights,
                                     &weight_dtype, &backend_name))
        return NULL;
    int32_t device_index;
    const btx_backend *backend = find_backend(state, backend_name, &device_index);
    if (backend == NULL || read_config(state, config_mapping, weight_dtype, &config, &inv_freq) < 0 ||
        borrow_weights(state, weights, config.num_layers, &borrowed) < 0)
        goto cleanup;
    Py_ssize_t num_tensors = PyMapping_Size(weights);
    if (num_tensors < 0)
        goto cleanup;
    if (num_tensors != borrowed.length) {
        PyErr_Format(state->invalid_argument_error,
                     "there are %zd tensors; a Processor of %d layers has %zd: remove what is not its own", num_tensors,
                     (int)config.num_layers, borrowed.length);
        goto cleanup;
    }
    btx_status status;
    Py_BEGIN_ALLOW_THREADS
    status = btx_processor_create(backend, device_index, &config, borrowed.views, &processor, &error);
    Py_END_ALLOW_THREADS
    if (status != BTX_OK) {
        raise_status(state, status, &error);
        goto cleanup;
    }
    self = (processor_object *)new_instance(type);
    if (self == NULL)
        btx_processor_destroy(processor);
    else
        self->processor = processor;

cleanup:
    borrowed_list_clear(&borrowed);
    PyMem_Free(inv_freq);
    return (PyObject *)self;
}

static void processor_dealloc(PyObject *object)
{
    btx_processor_destroy(((processor_object *)object)->processor);
    free_instance(object);
}

static PyObject *processor_nbytes(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(btx_processor_bytes(((processor_object *)self)->processor));
}

static PyObject *processor_backend(PyObject *self, void *closure)
{
    (void)closure;
    const btx_processor *processor = ((processor_object *)self)->processor;
    return backend_full_name(btx_processor_backend(processor), btx_processor_device_index(processor));
}

static PyGetSetDef processor_getset[] = {
    {"nbytes", processor_nbytes, NULL, "Bytes held by the packed weights.", NULL},
    {"backend", processor_backend, NULL, "For instance \"cpu:avx2\" or \"cuda:0\".", NULL},
    {0},
};

static int is_empty(const btx_tensor *tensor)
{
    for (int32_t d = 0; d < tensor->num_dims; d++) {
        if (tensor->shape[d] == 0)
            return 1;
    }
    return 0;
}

PyDoc_STRVAR(rewrite_doc,
             "rewrite($self, kv_cache, query_cache, steps, block_table=None, *, workspace, softmax_scale=0.0,\n"
             "        max_relative_edit=0.0, recalled=None, delta_norm=None, row_norm=None, skipped=None,\n"
             "        stream=None, wait=True)\n--\n\n"
             "Rewrites the steps that just ended, in place (arXiv 2505.16950, section 3.2): one call for all\n"
             "sequences and layers. steps: (sequence, sequence_begin, step_begin, step_end) in cache positions,\n"
             "and, where a step is to recall fewer than the Processor's top_k, how many.\n"
             "block_table: int32 [num_sequences, max_blocks]; None: block s is sequence s's only one.\n"
             "softmax_scale: 1e-30 or more; 0 means 1 / sqrt(head_dim).\n"
             "max_relative_edit above 0: a step is skipped, left as it is,\n"
             "where in any layer the norm of its gated edit exceeds this many times the norm of its rows, or is not\n"
             "finite; 0: no limit, and an edit that is not finite refuses the call. Outputs, where given: recalled\n"
             "int64 [num_layers, num_steps, top_k] (positions ascending, then -1), delta_norm and row_norm float32\n"
             "[num_layers, num_steps], skipped int32 [num_steps] (1 or 0), all of the CPU. Returns seconds per stage,\n"
             "summed over threads.\n"
             "stream: a cudaStream_t as a number; None: that on which the caches' library works now. wait False: no\n"
             "outputs, and None returned before a device is done; see Workspace.synchronize for its errors.\n\n"
             "InvalidArgumentError, UnsupportedError, DeviceError, MemoryError: nothing was written.\n"
             "RebuildNeededError: the write began and failed; discard these sequences.");

static PyObject *processor_rewrite(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {
        "kv_cache", "query_cache", "steps",    "block_table", "workspace", "softmax_scale", "max_relative_edit",
        "recalled", "delta_norm",  "row_norm", "skipped",     "stream",    "wait",          NULL};
    module_state *state = module_state_of_self(Py_TYPE(object));
    const btx_processor *processor = ((processor_object *)object)->processor;
    PyObject *kv_cache, *query_cache, *steps, *block_table = Py_None, *workspace = NULL, *result = NULL;
    PyObject *outputs[4] = {Py_None, Py_None, Py_None, Py_None}, *stream = Py_None;
    int wait = 1;
    static const char *const output_names[4] = {"recalled", "delta_norm", "row_norm", "skipped"};
    double softmax_scale = 0.0, max_relative_edit = 0.0;
    boundary_arguments arguments = {0};
    borrowed_list borrowed = {0};
    char nothing = 0;
    PyObject *too_late = NULL; /* made before the write: there may be no memory after it */
    btx_report report = {0};
    btx_error error = {{0}};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!O|O$O!ddOOOOOp:rewrite", names, state->kv_cache_type,
                                     &kv_cache, state->query_cache_type, &query_cache, &steps, &block_table,
                                     state->workspace_type, &workspace, &softmax_scale, &max_relative_edit, &outputs[0],
                                     &outputs[1], &outputs[2], &outputs[3], &stream, &wait))
        return NULL;
    if (workspace == NULL) {
        PyErr_SetString(PyExc_TypeError, "rewrite() needs the keyword argument workspace");
        return NULL;
    }
    workspace_object *scratch = (workspace_object *)workspace;
    if (boundary_arguments_parse(state, &arguments, (cache_object *)kv_cache, (cache_object *)query_cache, steps,
                                 block_table, softmax_scale, max_relative_edit, stream) < 0 ||
        borrowed_list_init(&borrowed, 4, NULL) < 0)
        goto cleanup;
    for (Py_ssize_t i = 0; i < 4; i++) {
        if (outputs[i] == Py_None)
            continue;
        if (!wait) {
            PyErr_Format(state->invalid_argument_error, "%s is given, which has to be waited for; leave it out or wait",
                         output_names[i]);
            goto cleanup;
        }
        if (borrow_tensor(state, &borrowed, i, outputs[i], output_names[i], -1) < 0)
            goto cleanup;
        if (borrowed.views[i].data == NULL) { /* to be checked, not taken for "not wanted" */
            if (!is_empty(&borrowed.views[i])) {
                PyErr_Format(state->invalid_argument_error, "%s has no data", output_names[i]);
                goto cleanup;
            }
            borrowed.views[i].data = &nothing;
        }
    }
    report.recalled = borrowed.views[0];
    report.delta_norm = borrowed.views[1];
    report.row_norm = borrowed.views[2];
    report.skipped = borrowed.views[3];
    result = PyDict_New();
    too_late = PyObject_CallFunction(state->rebuild_needed_error, "s",
                                     "out of memory after the caches were rewritten: discard these sequences");
    if (result == NULL || too_late == NULL || workspace_enter(state, scratch) < 0) {
        Py_CLEAR(result);
        goto cleanup;
    }
    btx_status status;
    Py_BEGIN_ALLOW_THREADS
    status = btx_rewrite(processor, scratch->workspace, &arguments.boundary, wait ? &report : NULL, &error);
    Py_END_ALLOW_THREADS
    scratch->busy = 0;
    if (status != BTX_OK) {
        Py_CLEAR(result);
        raise_status(state, status, &error);
        goto cleanup;
    }
    if (!wait) {
        Py_DECREF(result);
        result = Py_NewRef(Py_None);
        goto cleanup;
    }
    for (int stage = 0; result != NULL && stage < BTX_NUM_STAGES; stage++) {
        PyObject *seconds = PyFloat_FromDouble(report.stage_seconds[stage]);
        if (seconds == NULL || PyDict_SetItemString(result, btx_stage_name((btx_stage)stage), seconds) < 0) {
            Py_CLEAR(result);
            PyErr_Clear();
            PyErr_SetObject(state->rebuild_needed_error, too_late);
        }
        Py_XDECREF(seconds);
    }

cleanup:
    Py_XDECREF(too_late);
    borrowed_list_clear(&borrowed);
    boundary_arguments_clear(&arguments);
    return result;
}

PyDoc_STRVAR(
    workspace_bytes_doc,
    "workspace_bytes($self, num_threads, num_sequences, max_tokens, *, cache_dtype=\"float32\")\n--\n\n"
    "What a workspace of num_threads grows to by boundaries of up to num_sequences (1 to 65536) steps at once,\n"
    "each of a sequence of up to max_tokens positions, in a cache of cache_dtype (\"float32\", which is enough\n"
    "for all, \"float16\", \"bfloat16\"): the largest such boundary takes exactly this, none takes more.");

static PyObject *processor_workspace_bytes(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"num_threads", "num_sequences", "max_tokens", "cache_dtype", NULL};
    module_state *state = module_state_of_self(Py_TYPE(object));
    int num_threads;
    long long num_sequences, max_tokens;
    const char *name = "float32";
    btx_dtype cache_dtype = BTX_F32;
    btx_error error = {{0}};
    size_t bytes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iLL|$s:workspace_bytes", names, &num_threads, &num_sequences,
                                     &max_tokens, &name))
        return NULL;
    if (strcmp(name, "float16") == 0)
        cache_dtype = BTX_F16;
    else if (strcmp(name, "bfloat16") == 0)
        cache_dtype = BTX_BF16;
    else if (strcmp(name, "float32") != 0)
        return PyErr_Format(state->invalid_argument_error,
                            "cache_dtype is '%s'; it must be 'float32', 'float16' or 'bfloat16'", name);
    btx_status status = btx_processor_workspace_bytes(((processor_object *)object)->processor, num_threads,
                                                      num_sequences, max_tokens, cache_dtype, &bytes, &error);
    return status == BTX_OK ? PyLong_FromSize_t(bytes) : raise_status(state, status, &error);
}

static PyMethodDef processor_methods[] = {
    {"workspace_bytes", (PyCFunction)(void (*)(void))processor_workspace_bytes, METH_VARARGS | METH_KEYWORDS,
     workspace_bytes_doc},
    {"rewrite", (PyCFunction)(void (*)(void))processor_rewrite, METH_VARARGS | METH_KEYWORDS, rewrite_doc},
    {0},
};

PyDoc_STRVAR(processor_doc,
             "Processor(config, weights, *, weight_dtype=\"float32\", backend=\"cpu\")\n--\n\n"
             "Immutable packed weights of a Cache Processor; may be shared between threads. config: a mapping with\n"
             "num_layers, num_kv_heads, num_query_heads, head_dim, processor_dim, processor_heads,\n"
             "processor_mlp_dim, top_k, recent_window, norm_eps and rope_inv_freq (None: keys are used as cached;\n"
             "else head_dim / 2 numbers). weights: a mapping from checkpoint names to tensors. weight_dtype\n"
             "\"bfloat16\": operands of every product are rounded to bfloat16, sums are float32.");

static PyType_Slot processor_slots[] = {
    {Py_tp_doc, (void *)processor_doc}, {Py_tp_new, processor_new},         {Py_tp_dealloc, processor_dealloc},
    {Py_tp_getset, processor_getset},   {Py_tp_methods, processor_methods}, {0, NULL},
};

PyType_Spec processor_spec = {
    .name = "bottleneck_ext.Processor",
    .basicsize = sizeof(processor_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = processor_slots,
};

/* ---- Linear ----------------------------------------------------------------------------------------- */

typedef struct linear_object {
    PyObject_HEAD btx_packed_linear *linear; /* Owned. */
} linear_object;

static PyObject *linear_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"weight", "bias", "weight_dtype", "backend", NULL};
    PyObject *weight = NULL, *bias = Py_None;
    const char *weight_dtype_name = "float32", *backend_name = "cpu";
    module_state *state = module_state_of_self(type);
    borrowed_list borrowed = {0};
    btx_dtype weight_dtype;
    btx_packed_linear *linear = NULL;
    btx_error error = {{0}};
    linear_object *self = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O$ss:Linear", names, &weight, &bias, &weight_dtype_name,
                                     &backend_name))
        return NULL;
    int32_t device_index;
    const btx_backend *backend = find_backend(state, backend_name, &device_index);
    if (backend == NULL || read_weight_dtype(state, weight_dtype_name, &weight_dtype) < 0 ||
        borrowed_list_init(&borrowed, 2, NULL) < 0)
        return NULL;
    if (borrow_tensor(state, &borrowed, 0, weight, "weight", -1) < 0 ||
        (bias != Py_None && borrow_tensor(state, &borrowed, 1, bias, "bias", -1) < 0))
        goto cleanup;
    btx_status status;
    Py_BEGIN_ALLOW_THREADS
    status = btx_packed_linear_create(backend, &borrowed.views[0], bias != Py_None ? &borrowed.views[1] : NULL,
                                      weight_dtype, &linear, &error);
    Py_END_ALLOW_THREADS
    if (status != BTX_OK) {
        raise_status(state, status, &error);
        goto cleanup;
    }
    self = (linear_object *)new_instance(type);
    if (self == NULL)
        btx_packed_linear_destroy(linear);
    else
        self->linear = linear;

cleanup:
    borrowed_list_clear(&borrowed);
    return (PyObject *)self;
}

static void linear_dealloc(PyObject *object)
{
    btx_packed_linear_destroy(((linear_object *)object)->linear);
    free_instance(object);
}

static PyObject *linear_nbytes(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(btx_packed_linear_bytes(((linear_object *)self)->linear));
}

static PyObject *linear_backend(PyObject *self, void *closure)
{
    (void)closure;
    return backend_full_name(btx_packed_linear_backend(((linear_object *)self)->linear), 0);
}

static PyGetSetDef linear_getset[] = {
    {"nbytes", linear_nbytes, NULL, "Bytes held by the packed weights and biases.", NULL},
    {"backend", linear_backend, NULL, "For instance \"cpu:avx2\".", NULL},
    {0},
};

PyDoc_STRVAR(apply_doc,
             "apply($self, x, out, *, accumulate=False, workspace)\n--\n\n"
             "out = x W^T + bias, plus what out held where accumulate is true. x: float32\n"
             "[num_layers, rows, in_dim], out: float32 [num_layers, rows, out_dim], both row-major, without\n"
             "shared memory. Layers are spread over the workspace's threads.\n\n"
             "InvalidArgumentError, MemoryError: nothing was written.");

static PyObject *linear_apply(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"x", "out", "accumulate", "workspace", NULL};
    static const char *const tensor_names[2] = {"x", "out"};
    module_state *state = module_state_of_self(Py_TYPE(object));
    const btx_packed_linear *linear = ((linear_object *)object)->linear;
    PyObject *tensors[2] = {NULL, NULL}, *workspace = NULL, *result = NULL;
    int accumulate = 0;
    borrowed_list borrowed = {0};
    btx_error error = {{0}};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|$pO!:apply", names, &tensors[0], &tensors[1], &accumulate,
                                     state->workspace_type, &workspace))
        return NULL;
    if (workspace == NULL) {
        PyErr_SetString(PyExc_TypeError, "apply() needs the keyword argument workspace");
        return NULL;
    }
    workspace_object *scratch = (workspace_object *)workspace;
    if (borrowed_list_init(&borrowed, 2, NULL) < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < 2; i++) {
        if (borrow_tensor(state, &borrowed, i, tensors[i], tensor_names[i], -1) < 0)
            goto cleanup;
    }
    if (workspace_enter(state, scratch) < 0)
        goto cleanup;
    btx_status status;
    Py_BEGIN_ALLOW_THREADS
    status =
        btx_packed_linear_apply(linear, scratch->workspace, &borrowed.views[0], accumulate, &borrowed.views[1], &error);
    Py_END_ALLOW_THREADS
    scratch->busy = 0;
    if (status != BTX_OK)
        raise_status(state, status, &error);
    else
        result = Py_NewRef(Py_None);

cleanup:
    borrowed_list_clear(&borrowed);
    return result;
}

static PyMethodDef linear_methods[] = {
    {"apply", (PyCFunction)(void (*)(void))linear_apply, METH_VARARGS | METH_KEYWORDS, apply_doc},
    {0},
};

PyDoc_STRVAR(linear_doc, "Linear(weight, bias=None, *, weight_dtype=\"float32\", backend=\"cpu\")\n--\n\n"
                         "The product the Processor is made of, alone, for tests and benchmarks: immutable packed\n"
                         "weights, float32 [num_layers, out_dim, in_dim], and biases, float32 [num_layers, out_dim];\n"
                         "may be shared between threads. weight_dtype \"bfloat16\": both operands are rounded to\n"
                         "bfloat16, sums are float32.");

static PyType_Slot linear_slots[] = {
    {Py_tp_doc, (void *)linear_doc}, {Py_tp_new, linear_new},         {Py_tp_dealloc, linear_dealloc},
    {Py_tp_getset, linear_getset},   {Py_tp_methods, linear_methods}, {0, NULL},
};

PyType_Spec linear_spec = {
    .name = "bottleneck_ext.Linear",
    .basicsize = sizeof(linear_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = linear_slots,
};

/* ---- functions ---------------------------------------------------------------------------------------- */

PyObject *module_attention_mass(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"kv_cache",  "query_cache",   "steps",         "block_table", "out",
                            "workspace", "recent_window", "softmax_scale", "stream",      NULL};
    module_state *state = module_state_of(module);
    PyObject *kv_cache, *query_cache, *steps, *block_table = Py_None, *out = NULL, *workspace = NULL, *result = NULL;
    PyObject *stream = Py_None;
    int recent_window = BTX_MAX_RECENT_WINDOW;
    double softmax_scale = 0.0;
    boundary_arguments arguments = {0};
    borrowed_list borrowed = {0};
    btx_error error = {{0}};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!O|O$OO!idO:attention_mass", names, state->kv_cache_type,
                                     &kv_cache, state->query_cache_type, &query_cache, &steps, &block_table, &out,
                                     state->workspace_type, &workspace, &recent_window, &softmax_scale, &stream))
        return NULL;
    if (out == NULL || workspace == NULL) {
        PyErr_SetString(PyExc_TypeError, "attention_mass() needs the keyword arguments out and workspace");
        return NULL;
    }
    workspace_object *scratch = (workspace_object *)workspace;
    if (boundary_arguments_parse(state, &arguments, (cache_object *)kv_cache, (cache_object *)query_cache, steps,
                                 block_table, softmax_scale, 0.0, stream) < 0)
        goto cleanup;
    if (borrowed_list_init(&borrowed, 1, arguments.stream) < 0 ||
        borrow_tensor(state, &borrowed, 0, out, "out", -1) < 0 || workspace_enter(state, scratch) < 0)
        goto cleanup;
    btx_status status;
    Py_BEGIN_ALLOW_THREADS
    status = btx_attention_mass(scratch->backend, scratch->workspace, &arguments.boundary, recent_window,
                                &borrowed.views[0], &error);
    Py_END_ALLOW_THREADS
    scratch->busy = 0;
    if (status != BTX_OK)
        raise_status(state, status, &error);
    else
        result = Py_NewRef(Py_None);

cleanup:
    borrowed_list_clear(&borrowed);
    boundary_arguments_clear(&arguments);
    return result;
}

PyObject *module_select_top_k(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"mass", "lengths", "out", "backend", NULL};
    static const char *const tensor_names[3] = {"mass", "lengths", "out"};
    module_state *state = module_state_of(module);
    PyObject *tensors[3] = {NULL, NULL, NULL}, *result = NULL;
    const char *backend_name = "cpu";
    borrowed_list borrowed = {0};
    btx_error error = {{0}};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO|$s:select_top_k", names, &tensors[0], &tensors[1],
                                     &tensors[2], &backend_name))
        return NULL;
    int32_t device_index;
    const btx_backend *backend = find_backend(state, backend_name, &device_index);
    if (backend == NULL || borrowed_list_init(&borrowed, 3, NULL) < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < 3; i++) {
        if (borrow_tensor(state, &borrowed, i, tensors[i], tensor_names[i], -1) < 0)
            goto cleanup;
    }
    btx_status status;
    Py_BEGIN_ALLOW_THREADS
    status = btx_select_top_k(backend, &borrowed.views[0], &borrowed.views[1], &borrowed.views[2], &error);
    Py_END_ALLOW_THREADS
    if (status != BTX_OK)
        raise_status(state, status, &error);
    else
        result = Py_NewRef(Py_None);

cleanup:
    borrowed_list_clear(&borrowed);
    return result;
}
